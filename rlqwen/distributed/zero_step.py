"""Carry out updates with optimizer state, gradients and weights sharded among the ranks: DeepSpeed ZeRO."""

import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rlqwen.config import TrainerConfig
from rlqwen.distributed.adamw import build_adamw
from rlqwen.distributed.deepspeed_config import check_batch_size, complete_ds_config
from rlqwen.distributed.device import compute_dtype
from rlqwen.distributed.optimizer_step import OptimizerStep
from rlqwen.distributed.parameter_group import ParameterGroup
from rlqwen.distributed.ranks import Ranks
from rlqwen.distributed.whole_weights import gathered_zero3
from rlqwen.distributed.zero_engine import Engine


class ZeroStep(OptimizerStep):
    """Carry out updates by ZeRO stages 1 to 3, with one engine per parameter group.

    With bf16 or fp16 the model computes with weights of that dtype, and the optimizer keeps float32 ones.
    """

    def _take_over(self, groups: Sequence[ParameterGroup], args: TrainerConfig) -> list[ParameterGroup]:
        return list(groups)  # the engines keep masters whenever they round weights

    def _build_optimizers(self, args: TrainerConfig) -> list[torch.optim.Optimizer]:
        _join_alone()
        dtype = _engine_dtype(self.groups, args)
        self.engines: list[Engine] = []
        for group in self.groups:
            hidden = max(parameter.shape[-1] for parameter in group.parameters)
            config = complete_ds_config(args, data_size=self.ranks.data_size, hidden_size=hidden, dtype=dtype)
            assert group.module is not None
            if dtype == "fp32":
                group.module.float()
            self.engines.append(Engine(group, build_adamw([group], args), config))
        return [engine.optimizer for engine in self.engines]

    def _backward(self, loss: Tensor) -> None:
        for engine in self.engines:
            # DeepSpeed averages over ranks what must be added up. A larger loss would compensate for that too, but it
            # overflows in float16 at a scale at which no rank's gradient does.
            engine.scale_loss(self.scale.value / engine.averages_over)
        scaled = loss * self.scale.value
        for engine in self.engines:
            engine.before_backward(scaled)
        scaled.backward()
        for engine in self.engines:
            engine.after_backward()

    def _finish_gradients(self, rescale: float) -> dict[str, float]:
        if not any(self.ranks.gather(self._touched)):
            self._backward_zeros()
        for engine in self.engines:
            engine.scale_loss(self.scale.value / engine.averages_over / rescale)
        return {engine.group.name: engine.finish_gradient() for engine in self.engines}

    def _backward_zeros(self) -> None:
        """Make a gradient of exactly 0, because momentum and weight decay still move the weights."""
        for engine in self.engines:
            for parameter in engine.group.parameters:
                engine.start_over()
                with gathered_zero3([parameter]):
                    self._backward(parameter.float().sum() * 0.0)

    def _apply(self, norms: dict[str, float], *, skip: bool) -> None:
        for engine in self.engines:
            engine.apply(norms[engine.group.name], skip=skip)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for engine in self.engines:
            for name, parameter in engine.group.named():
                for key, value in engine.state_of(name, parameter):
                    if self.ranks.is_main:
                        yield key, value.detach().to("cpu", copy=True).reshape(value.shape).contiguous()

    def _restore_state(self, states: dict[str, dict[str, Tensor]]) -> None:
        for engine in self.engines:
            engine.restore_weights()
            engine.restore_state(states)


def build_optimizer_step(
    groups: Sequence[ParameterGroup], args: TrainerConfig, *, total_updates: int, ranks: Ranks
) -> OptimizerStep:
    """Return the optimizer step that `args.parallel` asks for: the plain one for ZeRO stage 0, which shards nothing."""
    check_batch_size(args, ranks.data_size)
    kind = ZeroStep if args.parallel.zero_stage else OptimizerStep
    return kind(groups, args, total_updates=total_updates, ranks=ranks)


def _engine_dtype(groups: Sequence[ParameterGroup], args: TrainerConfig) -> str:
    """Return the dtype of the weights that a forward reads.

    If DeepSpeed finds no float16 instructions, as on most CPUs, they stay float32, and only the forward's products are
    float16, as without DeepSpeed.
    """
    if args.fp16:
        from deepspeed.accelerator import get_accelerator

        return "fp16" if get_accelerator().is_fp16_supported() else "fp32"
    return "bf16" if compute_dtype(args, groups[0].parameters[0].device) == torch.bfloat16 else "fp32"


def _join_alone() -> None:
    """Make a process group of one, which DeepSpeed needs even for one process."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
