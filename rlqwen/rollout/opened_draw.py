"""Read a rollout batch while it is being sampled, and measure how long that is waited for."""

import time

from rlqwen.rollout.prefetch import RolloutBatch
from rlqwen.types import Group


class OpenedDraw:
    """A rollout batch whose groups the trainer takes as they are scored."""

    def __init__(self, batch: RolloutBatch, metrics: dict[str, float]) -> None:
        """Read `batch`, whose draw has `metrics` so far."""
        self._batch = batch
        self.metrics = metrics
        self._waited = self._waited_for_rewards = 0.0

    @property
    def is_sampled(self) -> bool:
        """Return whether sampling has ended."""
        return self._batch.sampled_at is not None

    def take(self, *, in_order: bool) -> list[Group]:
        """See RolloutBatch.take."""
        started = time.monotonic()
        groups = self._batch.take(in_order=in_order)
        self._count_wait(started)
        return groups

    @property
    def groups(self) -> list[Group]:
        """Return all groups, once they are taken and the draw is closed."""
        return self._batch.score()

    def close(self) -> dict[str, float]:
        """Return how long was waited, once all groups are taken; raise RewardFailure if a reward failed too often."""
        started = time.monotonic()
        self._batch.score()
        self._batch.count()
        self._count_wait(started)
        return {
            "time/rollout": self._waited,
            "time/rollout_hidden": max(self._batch.seconds - self._waited, 0.0),
            "time/reward": self._waited_for_rewards,
        }

    def _count_wait(self, started: float) -> None:
        """Count the time since `started` as one of sampling while that went on, and as one of rewards after it."""
        now = time.monotonic()
        sampled_at = now if self._batch.sampled_at is None else min(max(self._batch.sampled_at, started), now)
        self._waited += sampled_at - started
        self._waited_for_rewards += now - sampled_at
