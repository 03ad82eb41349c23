"""Hold one parameter group under DeepSpeed ZeRO: the only module that uses an engine's internals (of version 0.19).

The optimizer step, not the engine, decides when an update is complete, scales the loss, and decides whether a gradient
is applied.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlqwen.distributed.parameter_group import ParameterGroup


class Engine:
    """Hold one parameter group under ZeRO stage 1, 2 or 3."""

    def __init__(self, group: ParameterGroup, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        """Start DeepSpeed's engine; it replaces the group's parameters in `optimizer` by shards."""
        deepspeed = _quiet_deepspeed()
        assert group.module is not None
        self.group = group
        rounded = _rounded_by(config, group.parameters)
        frozen = [p for p in group.module.parameters() if not p.requires_grad and p.is_floating_point()]
        kept = _rounded_by(config, frozen) if not dist.is_initialized() or dist.get_rank() == 0 else []
        self.engine, *_ = deepspeed.initialize(model=group.module, optimizer=optimizer, config=config)
        self.zero = self.engine.optimizer
        self.stage = int(self.engine.zero_optimization_stage())
        self.optimizer = optimizer
        self.touched = False
        """Whether there was a gradient since the last update."""
        self._came = False
        """Whether this backward pass gave a gradient."""
        for parameter in group.parameters:
            parameter.register_post_accumulate_grad_hook(self._touch)
        self._scaled_norm = 0.0
        """Norm of the gradient that is about to be applied, times the loss scale; infinite if it must not be applied."""
        if self.stage == 3:
            for weight in group.module.parameters():
                weight.sharding = self.zero  # type: ignore[attr-defined]
            measure = self.zero._get_norm_groups
            self._true_norm: Callable[[], Any] = lambda: _joined(measure())
            self.zero._get_norm_groups = lambda: [torch.tensor(self._scaled_norm)]
        else:
            self._true_norm = self.zero.scaled_global_norm
            self.zero.scaled_global_norm = lambda norm_type=2: torch.tensor(self._scaled_norm)
            self.zero.check_grad_overflow = True
            self.zero.check_overflow = lambda partition_gradients=True: (
                None
            )  # an infinite norm reports overflow instead
        for parameter in group.parameters if self.keeps_master else ():
            parameter.engine = self  # type: ignore[attr-defined]
        for parameter, value in rounded:
            self.set_master(parameter, value)
        for parameter, value in kept:
            parameter.exact = value  # type: ignore[attr-defined]

    def _touch(self, parameter: Tensor) -> None:
        self.touched = self._came = True

    @property
    def averages_over(self) -> int:
        """Return the number of ranks by which DeepSpeed divides gradients."""
        return dist.get_world_size(self.zero.dp_process_group)

    def scale_loss(self, scale: float) -> None:
        """Divide gradients by `scale` before they are applied."""
        self.zero.override_loss_scale(scale)

    def before_backward(self, loss: Tensor) -> None:
        """Prepare the engine; call it before each `loss.backward()`."""
        self._came = False
        self.zero.clear_backward_seen_flag()
        self.engine._running_engine_backward = True
        loss.register_hook(lambda grad: self.engine._backward_prologue())

    def after_backward(self) -> None:
        """Reduce what the stage reduces at every micro-batch; call it after each `loss.backward()`."""
        if self._came:
            self.engine._backward_epilogue()
        else:
            self.zero.exit_backward()
        self.engine._running_engine_backward = False

    def start_over(self) -> None:
        """Have the next backward replace the gradients of the last update, instead of adding to them.

        ZeRO-3 keeps them until the first backward reaches each weight.
        """
        if self.stage == 3:
            self.zero.micro_step_id = 0
            self.zero._epilogue_ran_this_backward = False

    def finish_gradient(self) -> float:
        """Add up the gradients over the ranks, and return their norm, which is not finite if any entry is not."""
        if not self.touched:
            return 0.0
        self.engine._running_engine_step = True
        if self.stage >= 2:
            self.zero.finalize_gradient_accumulation_boundary()
        else:
            self.engine.allreduce_gradients()
        norm = float(self._true_norm()) / float(self.zero.loss_scale)
        return norm if norm >= 0 else math.inf

    def apply(self, norm: float, *, skip: bool) -> None:
        """Clip the gradient and update, or discard the gradient; a group without a gradient does not move."""
        if self.touched:
            self._scaled_norm = math.inf if skip else norm * float(self.zero.loss_scale)
            self.zero.step()
            self.zero.zero_grad(set_to_none=True)
        self.engine._running_engine_step = False
        self.touched = False

    # Optimizer state by parameter

    @property
    def keeps_master(self) -> bool:
        """Return whether the optimizer's weights are more exact than the model's."""
        return bool(self.engine.bfloat16_enabled() or self.engine.fp16_enabled())

    def master_of(self, parameter: nn.Parameter) -> Tensor:
        """Return the float32 weight that the optimizer keeps; call it on all ranks together."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)  # type: ignore[no-any-return]

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace the float32 weight that the optimizer keeps."""
        self._set(parameter, value, None)

    def state_of(self, name: str, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors by name, none before the first update; call it on all ranks together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.keeps_master:
            yield f"{name}/master", self.master_of(parameter)
        if not any(self.optimizer.state.values()):
            return
        self._link()
        for key in ("exp_avg", "exp_avg_sq"):
            yield f"{name}/{key}", safe_get_full_optimizer_state(parameter, key)
        step = next(state["step"] for state in self.optimizer.state.values() if state)
        yield f"{name}/step", torch.as_tensor(step)

    def restore_weights(self) -> None:
        """Adopt weights that were written into the model; rounded ones are set by `set_master` instead."""
        if not self.keeps_master:
            self.zero.refresh_fp32_params()

    def restore_state(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Restore the state that `state_of` returned for each of the group's parameters."""
        steps = [entries["step"] for entries in states.values() if "step" in entries]
        if steps:
            for group in self.optimizer.param_groups:
                for flat in self._flat(group):
                    self.optimizer.state[flat] = {
                        "step": steps[0].clone(),
                        "exp_avg": torch.zeros_like(flat),
                        "exp_avg_sq": torch.zeros_like(flat),
                    }
            self._link()
        for name, parameter in self.group.named():
            for key, value in states.get(name, {}).items():
                if key in ("exp_avg", "exp_avg_sq"):
                    self._set(parameter, value, key)
                elif key == "master" and self.keeps_master:
                    self.set_master(parameter, value)

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        if self.stage < 3:
            parameter.set_full_hp_param(value.to(self.engine.device), key)
            return
        count = parameter.ds_tensor.numel()
        rank = self.zero._get_param_partition_rank(parameter)
        own = value.flatten()[count * rank : count * (rank + 1)]
        padded = torch.nn.functional.pad(own, (0, count - own.numel()))
        self.zero.set_local_hp_param(padded.to(self.engine.device), parameter, key)

    def _link(self) -> None:
        """Link parameters to their moments again; DeepSpeed does so only once, when only the first group has any."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _flat(self, group: dict[str, Any]) -> list[Tensor]:
        if self.stage < 3:
            return list(group["params"])
        return list(self.zero.fp32_partitioned_groups_flat) if group is self.optimizer.param_groups[0] else []


def _rounded_by(config: dict[str, Any], parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return exact copies of the weights that the engine's dtype cannot hold.

    DeepSpeed makes the optimizer's weights from rounded ones, so that the model would change before its first update.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((dtype for key, dtype in dtypes.items() if config[key]["enabled"]), torch.float32)
    return [
        (parameter, parameter.detach().to("cpu", torch.float32, copy=True))
        for parameter in parameters
        if not torch.equal(parameter.detach().to(dtype).to(parameter.dtype), parameter.detach())
    ]


def _quiet_deepspeed() -> Any:
    """Return DeepSpeed, configured to print nothing and to compile nothing."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    # DeepSpeed would compile communication through shared memory, on which a rank waits forever if another has died.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _joined(norms: list[Any]) -> Tensor:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(norms)  # type: ignore[no-any-return]
