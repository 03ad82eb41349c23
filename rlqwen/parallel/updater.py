"""How an update is carried out: gradients added up over the ranks, clipped, applied.

Trainers call `backward` on each micro-batch's share of the loss and `step` once an update.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import get_scheduler

from rlqwen.config import TrainerConfig
from rlqwen.errors import ConfigError, NonFiniteError
from rlqwen.parallel.moments import moments_are_finite
from rlqwen.parallel.optimizer_state import restore_optimizer, save_optimizer
from rlqwen.parallel.part import Part
from rlqwen.parallel.ranks import Ranks
from rlqwen.tensor_parallel import is_shard


@dataclass(slots=True, frozen=True)
class UpdateResult:
    """What became of one update."""

    grad_norms: dict[str, float]
    """Norm of each part's gradient before clipping."""
    lr: float
    """Learning rate of the first part."""
    skipped: bool
    """Loss, gradient or a moment was not finite: weights and optimiser are as before, to the bit."""

    @property
    def grad_norm(self) -> float:
        """Of the first part."""
        return next(iter(self.grad_norms.values()))


class Updater:
    """Optimiser, schedule and clipping; one schedule scales the learning rates of all parts.

    On several ranks each holds all weights, and gradients are added up once an update.
    """

    def __init__(
        self, parts: Sequence[Part], args: TrainerConfig, *, total_updates: int, ranks: Ranks | None = None
    ) -> None:
        if not all(part.parameters for part in parts):
            raise ConfigError("nothing to train: every weight of the model is frozen")
        self.parts = list(parts)
        self.ranks = ranks or Ranks()
        self.max_grad_norm = args.max_grad_norm
        self.max_nonfinite_steps = args.max_nonfinite_steps
        self.optimizer = torch.optim.AdamW(
            [group for part in parts for group in part.groups(args.weight_decay)],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            fused=args.optim == "adamw_torch_fused",
        )
        try:
            self.scheduler = get_scheduler(
                args.lr_scheduler_type,
                self.optimizer,
                num_warmup_steps=warmup_updates(args, total_updates),
                num_training_steps=total_updates,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"lr_scheduler_type={args.lr_scheduler_type!r}: {error}") from error
        self._finite = True
        self._touched = False
        self._nonfinite_in_a_row = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""
        self._finite = self._finite and bool(torch.isfinite(loss.detach()))
        self._touched = True
        loss.backward()

    def step(self) -> UpdateResult:
        """Clip, update, advance the schedule; raises NonFiniteError after too many skipped updates in a row."""
        sound = moments_are_finite(self.optimizer)
        self._finite = self._finite and sound
        self._add_up_gradients()
        lr = self.scheduler.get_last_lr()[0]
        norms = {part.name: self._clip(part) for part in self.parts}
        skipped = not (self._finite and all(map(math.isfinite, norms.values())))
        if not skipped:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        self._finite, self._touched = True, False
        self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skipped else 0
        if self._nonfinite_in_a_row >= self.max_nonfinite_steps:
            culprit = "loss or gradient was" if sound else "a moment of the optimizer was"
            raise NonFiniteError(
                f"{culprit} not finite in {self._nonfinite_in_a_row} updates in a row "
                f"(max_nonfinite_steps); no weight was changed by them. Lower learning_rate (now {lr:.3g}), or look at "
                "the batches saved under nonfinite/ in the run folder"
            )
        return UpdateResult(norms, lr, skipped)

    def save(self, folder: Path) -> None:
        """Write what the optimiser and the schedule remember into `folder`; on every rank."""
        if self.ranks.is_main:
            save_optimizer(folder, self.optimizer, self.scheduler, self.parts, nonfinite=self._nonfinite_in_a_row)

    def restore(self, folder: Path) -> None:
        """Read back what `save` wrote; on every rank."""
        self._nonfinite_in_a_row = restore_optimizer(folder, self.optimizer, self.scheduler, self.parts)

    def _add_up_gradients(self) -> None:
        """Each rank's share of the loss is divided by global counts already, so gradients add up to the whole one.

        A weight without a gradient on any rank rests. Where nothing was to be trained on at all the gradient is exactly
        0, which is another thing: momentum and weight decay still move the weights.
        """
        parameters = [parameter for part in self.parts for parameter in part.parameters]
        by_rank = self.ranks.gather((self._finite, self._touched, [weight.grad is not None for weight in parameters]))
        finite, touched, given = zip(*by_rank, strict=True)
        self._finite = all(finite)
        for parameter, given_by in zip(parameters, zip(*given, strict=True), strict=True):
            if any(touched) and not any(given_by):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.ranks.world_size > 1:
                dist.all_reduce(parameter.grad, group=self.ranks.gradient_group)

    def _clip(self, part: Part) -> float:
        """Clip a part's gradient; returns its norm before, over the shards of all ranks."""
        limit = self.max_grad_norm or math.inf
        if self.ranks.tensor_group is None:
            return float(nn.utils.clip_grad_norm_(part.parameters, limit))
        shards = [parameter.grad for parameter in part.parameters if is_shard(parameter) and parameter.grad is not None]
        rest = [
            parameter.grad for parameter in part.parameters if not is_shard(parameter) and parameter.grad is not None
        ]
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square, group=self.ranks.tensor_group)
        norm = (square + nn.utils.get_total_norm(rest).square()).sqrt()
        nn.utils.clip_grads_with_norm_(part.parameters, limit, norm)
        return float(norm)


def warmup_updates(args: TrainerConfig, total_updates: int) -> int:
    """Warm-up in updates, from `warmup_steps` (a count, or a share below 1) or `warmup_ratio`."""
    if args.warmup_steps >= 1:
        return int(args.warmup_steps)
    return math.ceil((args.warmup_steps or args.warmup_ratio) * total_updates)
