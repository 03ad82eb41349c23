"""Train on groups as they arrive: score and pack them, and gather their gradient, while others are being sampled.

A loss is divided by counts of the whole update, which are known only once its last group is scored. Until then it is
divided by powers of two in their place, and the gradient is corrected when the update is made: multiplying by a power of
two rounds nothing, so this changes no more than the rounding of one division.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rlqwen.algorithms.losses import Totals
from rlqwen.config import OnlineConfig
from rlqwen.config.online import COUNTED_BY
from rlqwen.errors import ConfigError
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.engine_placement import count_workers, this_machine
from rlqwen.rollout.resources import shares_processors
from rlqwen.trainers.micro_batching import arriving_micro_batches
from rlqwen.trainers.online import OnlineTrainer, Update
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Group, Prompt

Args = TypeVar("Args", bound=OnlineConfig)
Share = Iterable[tuple[Group, list[int]]]
"""Groups, each with the indices of those of its completions that are in an update."""


@dataclass(slots=True)
class Count:
    """Count what a loss is divided by, while groups arrive."""

    tokens: int = 0
    sequences: int = 0

    @property
    def totals(self) -> Totals:
        return Totals(tokens=self.tokens, sequences=self.sequences)


class ArrivalTrainer(OnlineTrainer[Args]):
    """Hold what GRPO and distillation need to train on groups as they arrive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trains_on_arrival = self._choose_arrival()

    def _choose_arrival(self) -> bool:
        """Return whether to train on arrival; raise ConfigError if that is asked for and impossible."""
        asked, rollout = self.args.train_on_arrival, self.args.rollout
        obstacle = self.args.arrival_obstacle
        engine = engine_class(rollout)
        if not engine.in_workers:
            obstacle = f"the engine {engine.title} samples in the trainer's own process"
        elif self.policy.routers.coefficient:
            obstacle = "the routers' loss is weighed by the packed tokens of the whole update"
        if asked and obstacle:
            raise ConfigError(f"train_on_arrival=true is impossible, because {obstacle}: leave it out")
        if asked is not None:
            return asked
        if obstacle is None and shares_processors(rollout, self.policy.device.type):
            obstacle = "workers and trainer compute on the same processors"
        if obstacle is not None:
            self.logger.note(f"train_on_arrival is off, because {obstacle}")
        return obstacle is None

    # What an algorithm supplies

    @abstractmethod
    def trees(self, share: Share, count: Count) -> Iterator[Tree]:
        """Yield the trees of completions to train on, and count what the loss is divided by."""

    @abstractmethod
    def accumulate(self, micro: PackedBatch, update: Update) -> None:
        """Add the gradient of a micro-batch to that of an update."""

    def add_fixed_logprobs(self, micro: PackedBatch) -> None:
        """Fill in what the policy and others compute before the first update; nothing by default."""

    # What a step calls

    def draw_groups(self, prompts_P: list[Prompt], metrics: Metrics) -> Iterator[Group]:
        """Yield the scored groups of a draw on every rank, and add its metrics to `metrics` at the end.

        If the trainer trains on arrival, they come as soon as they are ready: in the order of the prompts, so that runs
        repeat to the bit, unless several workers sample without `rollout.deterministic`, whose runs do not anyway.
        """
        if self.trains_on_arrival:
            rollout = self.args.rollout
            alone = count_workers(rollout, this_machine(self.policy.device.type)) == 1
            in_order = rollout.deterministic or self.args.full_determinism or alone
            among = self.train_rows or prompts_P
            drawn = yield from self.rollouts.stream_groups(
                prompts_P, self.coming_prompts(), among=among, in_order=in_order
            )
        else:
            groups_P, drawn = self.next_groups(prompts_P)
            yield from groups_P
        for key, value in drawn.items():
            metrics[key] = metrics.get(key, 0.0) + value

    def gather_on_arrival(self, groups: Iterable[Group]) -> list[Update]:
        """Return the updates of a pass over `groups`; the gradient of the first is gathered while they arrive.

        Those of later updates need the weights that the first one leaves.
        """
        updates: list[Update] = []
        for share in split_arriving(groups, self.plan.completions_per_update):
            update, count = Update([], self._provisional_totals()), Count()
            for micro in self._arriving_micro_batches(self.trees(share, count)):
                self.add_fixed_logprobs(micro)
                update.micro_batches.append(micro)
                if not updates:
                    self.accumulate(micro, update)
            if not updates:
                counted = COUNTED_BY[self.args.normalizer]
                update.rescale = getattr(update.totals, counted) / max(getattr(count.totals, counted), 1)
                update.loss = update.loss * update.rescale
            update.totals = count.totals
            updates.append(update)
        return updates

    def make_update(self, update: Update) -> None:
        """Make one optimizer update."""
        if update.rescale is None:
            for micro in update.micro_batches:
                self.accumulate(micro, update)
        self.update(update.micro_batches, rescale=update.rescale or 1.0)
        update.rescale = None

    def _arriving_micro_batches(self, trees: Iterator[Tree]) -> Iterator[PackedBatch]:
        limit = self.args.max_tokens_per_micro_batch
        size = self.args.per_device_train_batch_size if limit is None else None
        return arriving_micro_batches(trees, self.ranks, max_tokens=limit, max_branches=size)

    def _provisional_totals(self) -> Totals:
        """Return powers of two that stand in for the totals of an update until it is complete."""
        sequences = self.plan.completions_per_update
        tokens = sequences * self.args.max_completion_length
        return Totals(tokens=2 ** (tokens - 1).bit_length(), sequences=2 ** (sequences - 1).bit_length())


def split_arriving(groups: Iterable[Group], size: int) -> Iterator[Iterator[tuple[Group, list[int]]]]:
    """Yield shares of `size` completions, in order; each must be read to its end before the next.

    A share takes no more groups than it needs, so it may wait for a group, but not for one of the next share.
    """
    arriving = iter(groups)
    waiting: list[tuple[Group, list[int]]] = []

    def refill() -> bool:
        if not waiting and (group := next(arriving, None)) is not None:
            waiting.append((group, list(range(len(group)))))
        return bool(waiting)

    def read_share() -> Iterator[tuple[Group, list[int]]]:
        missing = size
        while missing and refill():
            group, indices = waiting.pop()
            if indices[missing:]:
                waiting.append((group, indices[missing:]))
            yield group, indices[:missing]
            missing -= min(missing, len(indices))

    while refill():
        yield read_share()
