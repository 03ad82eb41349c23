"""Carry out optimizer updates: add up gradients over the ranks, clip them, and apply them.

Trainers call `backward` on each micro-batch's share of the loss, and `step` once per update.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlqwen.config import TrainerConfig
from rlqwen.distributed.adamw import build_adamw, restore_state, state_to_save
from rlqwen.distributed.deepspeed_config import fp16_settings
from rlqwen.distributed.gradient_sum import add_up_over_ranks
from rlqwen.distributed.loss_scale import LossScale
from rlqwen.distributed.lr_schedule import build_schedulers
from rlqwen.distributed.master_weights import MasterWeights, check_bfloat16
from rlqwen.distributed.optimizer_state import (
    MASTER,
    PARTS_FOLDER,
    read_tensors,
    refuse_other_shapes,
    restore_plain,
    save_optimizer,
)
from rlqwen.distributed.parameter_group import ParameterGroup
from rlqwen.distributed.ranks import Ranks
from rlqwen.distributed.shards import Shards
from rlqwen.distributed.state_parts import save_parts
from rlqwen.distributed.tensor_parallel import is_shard
from rlqwen.errors import ConfigError, NonFiniteError


@dataclass(slots=True, frozen=True)
class UpdateResult:
    """Hold the result of one update."""

    grad_norms: dict[str, float]
    """Gradient norm of each parameter group before clipping."""
    lr: float
    """Learning rate of the first parameter group."""
    skipped: bool
    """Whether the loss, a gradient or a moment was not finite; weights and optimizer are then unchanged, to the bit."""

    @property
    def grad_norm(self) -> float:
        """Gradient norm of the first parameter group (the policy)."""
        return next(iter(self.grad_norms.values()))


class OptimizerStep:
    """Hold the optimizer and the schedule, which scales the learning rates of all parameter groups.

    On several ranks each holds all weights, and gradients are added up once per update; or each holds a part of every
    matrix, under FSDP2, whose gradients are added up in each backward pass. For DeepSpeed's ZeRO see ZeroStep.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], args: TrainerConfig, *, total_updates: int, ranks: Ranks | None = None
    ) -> None:
        if not all(group.parameters for group in groups):
            raise ConfigError("nothing to train: every weight of the model is frozen")
        self.masters, self.shards = MasterWeights(), Shards()
        self.groups = self._take_over(groups, args)
        self.ranks = ranks or Ranks()
        self.full_determinism = args.full_determinism
        self.max_grad_norm = args.max_grad_norm
        self.max_nonfinite_steps = args.max_nonfinite_steps
        self.scale = LossScale(args.fp16, fp16_settings(args))
        self.optimizers = self._build_optimizers(args)
        self.schedulers = build_schedulers(args, self.optimizers, total_updates)
        self._finite: Tensor | bool = True
        """Whether every loss since the last update was finite; read when the update is made."""
        self._touched = False
        self._nonfinite_in_a_row = 0

    def _take_over(self, groups: Sequence[ParameterGroup], args: TrainerConfig) -> list[ParameterGroup]:
        """Return the groups with what the optimizer updates: float32 masters, if asked for, or this rank's parts."""
        if not args.master_weights:
            return [self.shards.take_over(group) for group in groups]
        check_bfloat16(args, groups[0].parameters[0].device)
        return [self.masters.take_over(group) for group in groups]

    def _build_optimizers(self, args: TrainerConfig) -> list[torch.optim.Optimizer]:
        return [build_adamw(self.groups, args)]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""
        self._finite = torch.isfinite(loss.detach()).all() & self._finite
        self._touched = True
        with self._determinism():
            self._backward(loss)

    @contextmanager
    def _determinism(self) -> Iterator[None]:
        """Use deterministic kernels inside, if asked; in training only the backward pass has other kernels."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if self.full_determinism:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def _backward(self, loss: Tensor) -> None:
        (loss * self.scale.value).backward()

    def step(self, rescale: float = 1.0) -> UpdateResult:
        """Clip, update, advance the schedule; raises NonFiniteError after too many skipped updates in a row.

        `rescale`: multiply the gathered gradient by it first, for losses whose divisor is known only now.
        """
        sound = all(self.ranks.gather(all(map(moments_are_finite, self.optimizers))))
        norms = self._finish_gradients(rescale)
        finite = all(self.ranks.gather(bool(self._finite)))
        lr = self.schedulers[0].get_last_lr()[0]
        overflowed = not all(map(math.isfinite, norms.values()))
        skipped = overflowed or not (finite and sound)
        self._apply(norms, skip=skipped)
        if not skipped:
            for scheduler in self.schedulers:
                scheduler.step()
        self._finite, self._touched = True, False
        if not (overflowed and finite and sound and self.scale.can_fall):
            self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skipped else 0
        self.scale.update(overflow=overflowed)
        if self._nonfinite_in_a_row >= self.max_nonfinite_steps:
            culprit = "loss or gradient was" if sound else "a moment of the optimizer was"
            raise NonFiniteError(
                f"{culprit} not finite in {self._nonfinite_in_a_row} updates in a row "
                f"(max_nonfinite_steps); no weight was changed by them. Lower learning_rate (now {lr:.3g}), or look at "
                "the batches saved under nonfinite/ in the run folder"
            )
        return UpdateResult(norms, lr, skipped)

    def _finish_gradients(self, rescale: float) -> dict[str, float]:
        """Add up and rescale the gradients, and return the norm of each group's gradient before clipping."""
        self.shards.take_gradients()
        self._add_up_gradients()
        norms = {}
        divisor = self.scale.value / rescale
        for group in self.groups:
            gradients = [parameter.grad for parameter in group.parameters if parameter.grad is not None]
            if divisor != 1.0 and gradients:
                torch._foreach_div_(gradients, divisor)
            norms[group.name] = self._norm(group)
        return norms

    def _apply(self, norms: dict[str, float], *, skip: bool) -> None:
        """Clip the gradients and update the weights, or discard the gradients."""
        if not skip:
            for group in self.groups:
                if self.max_grad_norm:
                    norm = torch.tensor(norms[group.name])
                    nn.utils.clip_grads_with_norm_(group.parameters, self.max_grad_norm, norm)
            for optimizer in self.optimizers:
                optimizer.step()
            self.masters.write_back()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def save_checkpoint(self, folder: Path) -> None:
        """Write the state of optimizer and schedule into `folder`; called on every rank."""
        tensors = dict(self._state()) if self.shards.is_empty else None
        if tensors is None:
            save_parts(folder / PARTS_FOLDER, dict(self._parts()), self.ranks.group)
        if self.ranks.is_main:
            memory = {"nonfinite_in_a_row": self._nonfinite_in_a_row, "loss_scale": self.scale.state_dict()}
            save_optimizer(folder, tensors, self.optimizers, self.schedulers, memory)

    def load_checkpoint(self, folder: Path) -> None:
        """Read back what this class or ZeroStep wrote; called on every rank, after the weights are restored."""
        named = {name: parameter for group in self.groups for name, parameter in group.named()}
        states = read_tensors(
            folder, lambda name, like: self.shards.empty(named.get(name), like), named, self.ranks.group
        )
        for name, parameter in named.items():
            refuse_other_shapes(name, states.get(name, {}), self.shards.shape(parameter))
        memory = restore_plain(folder, self.optimizers, self.schedulers)
        self._restore_state(states)
        self._nonfinite_in_a_row = int(memory["nonfinite_in_a_row"])
        self.scale.load_state_dict(memory["loss_scale"])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer state of each parameter by name; on the main rank only."""
        for group in self.groups if self.ranks.is_main else ():
            for name, parameter in group.named():
                if self.masters.owns(parameter):
                    yield f"{name}/{MASTER}", parameter.detach().cpu().contiguous()
                for key, value in state_to_save(self.optimizers[0], parameter).items():
                    yield f"{name}/{key}", value

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer state of each parameter by name, of sharded weights this rank's part."""
        for group in self.groups:
            for name, parameter in group.named():
                for key, value in self.optimizers[0].state.get(parameter, {}).items():
                    yield f"{name}/{key}", self.shards.sharded(parameter, value)

    def _restore_state(self, states: dict[str, dict[str, Tensor]]) -> None:
        for group in self.groups:
            for name, parameter in group.named():
                if name not in states:
                    continue
                own = {key: self.shards.own_part(parameter, value) for key, value in states[name].items()}
                kept = {key: value for key, value in own.items() if key != MASTER}
                if MASTER in own:
                    parameter.data.copy_(own[MASTER])
                if kept:
                    restore_state(self.optimizers[0], parameter, kept)
        self.masters.write_back()

    def _add_up_gradients(self) -> None:
        """Sum the gradients over the ranks: each share of the loss is divided by global counts already.

        A weight without a gradient on any rank does not move. If there was nothing to train on at all, the gradient is
        exactly 0, which is different: momentum and weight decay still move the weights.
        """
        parameters = [parameter for group in self.groups for parameter in group.parameters]
        by_rank = self.ranks.gather((self._touched, [weight.grad is not None for weight in parameters]))
        touched, given = zip(*by_rank, strict=True)
        gradients = []
        for parameter, given_by in zip(parameters, zip(*given, strict=True), strict=True):
            if any(touched) and not any(given_by):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not self.shards.owns(parameter):
                gradients.append(parameter.grad)
        if self.ranks.world_size > 1:
            add_up_over_ranks(gradients, self.ranks.gradient_group)

    def _norm(self, group: ParameterGroup) -> float:
        """Return the norm of a group's gradient, over the parts of all ranks if weights are sharded."""
        own = [parameter for parameter in group.parameters if parameter.grad is not None]
        cut = [parameter for parameter in own if self.shards.owns(parameter) or is_shard(parameter)]
        if not cut:
            return float(_total_norm(own))
        square = _total_norm(cut).square()
        dist.all_reduce(square, group=self.ranks.tensor_group)
        parts = set(map(id, cut))
        rest = _total_norm(parameter for parameter in own if id(parameter) not in parts)
        return float((square + rest.square().to(square.device)).sqrt())


def _total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def moments_are_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether all moments are finite; NaN or infinity would spoil a weight at the next update, or freeze it.

    Reads the moments once, a fraction of the time of an update, and waits for each device once.
    """
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    by_device: dict[torch.device, list[Tensor]] = {}
    for moment in moments:
        by_device.setdefault(moment.device, []).append(moment)
    if all(bool(torch.stack(_sums(part)).isfinite().all()) for part in by_device.values()):
        return True
    # A sum of finite values may overflow.
    return all(bool(moment.isfinite().all()) for moment in moments)


def _sums(moments: list[Tensor]) -> list[Tensor]:
    """Return a sum per tensor, finite if its values are and the sum does not overflow; takes few kernels on a GPU."""
    if moments[0].is_cuda:
        return list(torch._foreach_norm(moments, 1))
    return [moment.sum(dtype=torch.float32) for moment in moments]
