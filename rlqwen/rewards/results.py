"""Keeps count of what became of the reward calls of a batch, and says when too many failed."""

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rlqwen.errors import RewardFailure
from rlqwen.rewards.call import CallResult
from rlqwen.rewards.failure_log import FailureLog
from rlqwen.rewards.registry import Reward
from rlqwen.secrets import redact, redact_values
from rlqwen.types import Group

logger = logging.getLogger(__name__)

OUTCOMES = ("ok", "timeout", "error", "invalid")


@dataclass(slots=True)
class Tally:
    """What became of reward calls."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Samples by reward and outcome."""
    seconds: Counter[str] = field(default_factory=Counter)
    """That calls took, by reward."""
    waited: Counter[str] = field(default_factory=Counter)
    """Seconds that the trainer waited while calls of a reward were running, by reward."""
    logged: dict[str, list[float]] = field(default_factory=dict)
    """What rewards gave to `log_metric`."""

    def add(self, other: "Tally") -> None:
        """Count what `other` counted too."""
        self.counts.update(other.counts)
        self.seconds.update(other.seconds)
        self.waited.update(other.waited)
        for name, values in other.logged.items():
            self.logged.setdefault(name, []).extend(values)

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        counts = [[*key, count] for key, count in self.counts.items()]
        times = {"seconds": dict(self.seconds), "waited": dict(self.waited)}
        return {"counts": counts, **times, "logged": self.logged}

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> "Tally":
        """What `plain` told of."""
        counts = Counter({(reward, outcome): count for reward, outcome, count in plain["counts"]})
        return cls(counts, Counter(plain["seconds"]), Counter(plain.get("waited", {})), plain["logged"])


@dataclass(slots=True, eq=False)
class Batch:
    """Groups that are waited for together."""

    state: SimpleNamespace
    """The trainer's state as rewards of this batch see it."""
    tally: Tally = field(default_factory=Tally)
    local_jobs: "deque[Job]" = field(default_factory=deque)
    """Calls that are left to the process that waits."""
    is_open: bool = True
    """Not given up, and not waited for to the end."""
    groups: list[Group] = field(default_factory=list)
    num_samples: int = 0
    num_open_jobs: int = 0
    running: Counter[int] = field(default_factory=Counter)
    """Calls that workers are at, by reward."""
    waiting_since: float | None = None
    """When the trainer began to wait for it, or when that was last counted; monotonic clock. None: it does not wait."""
    hanging: set[int] = field(default_factory=set)
    """Rewards of which a call ran out of time."""
    failures: dict[int, Counter[str]] = field(default_factory=dict)
    """Failed samples by reward and outcome."""
    traces: dict[int, str] = field(default_factory=dict)
    """The first traceback of each failing reward."""


@dataclass(slots=True, frozen=True)
class Job:
    """One reward on some samples of a group; `batch` tells results of a batch that was given up from today's."""

    batch: Batch
    reward: int
    group: Group
    samples: Sequence[int]


class Ledger:
    """Writes results into groups and counts them; its caller sees to it that one thread at a time does."""

    def __init__(self, rewards: Sequence[Reward], max_failure_share: float, failures: FailureLog) -> None:
        self._rewards = rewards
        self._max_failure_share = max_failure_share
        self._failures = failures
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._tally = Tally()

    def count(self, tally: Tally) -> None:
        """Have `metrics` tell of it."""
        self._tally.add(tally)

    def metrics(self) -> dict[str, float]:
        """Return, since the reset: samples by outcome, and seconds of calls and of waiting for them, for each reward;
        the means of what rewards logged."""
        metrics = {name: statistics.fmean(values) for name, values in self._tally.logged.items()}
        for reward in self._rewards:
            for outcome in OUTCOMES:
                metrics[f"reward/{reward.name}/{outcome}"] = self._tally.counts[reward.name, outcome]
            metrics[f"reward/{reward.name}/seconds"] = self._tally.seconds[reward.name]
            metrics[f"reward/{reward.name}/wait_seconds"] = self._tally.waited[reward.name]
        return metrics

    def add_seconds(self, job: Job, seconds: float) -> None:
        """Count time that a call took, whatever came of it."""
        job.batch.tally.seconds[self._rewards[job.reward].name] += seconds  # type: ignore[assignment]

    def count_waiting(self, batch: Batch) -> None:
        """Count the time since `batch.waiting_since` for the rewards that have been running since then."""
        if batch.waiting_since is None:
            return
        now = time.monotonic()
        for reward in (reward for reward, count in batch.running.items() if count):
            batch.tally.waited[self._rewards[reward].name] += now - batch.waiting_since  # type: ignore[assignment]
        batch.waiting_since = now

    def add_call(self, job: Job, number: int) -> None:
        """Record that a call begins (1) or ends (-1)."""
        self.count_waiting(job.batch)
        job.batch.running[job.reward] += number

    def waited_for_hanging(self, batch: Batch) -> dict[str, float]:
        """Return reward -> seconds waited, for each reward of which a call ran out of time."""
        names = [self._rewards[reward].name for reward in batch.hanging]
        return {name: batch.tally.waited[name] for name in names}

    def record(self, job: Job, result: CallResult) -> None:
        """The final word on the samples of a job."""
        name, group = self._rewards[job.reward].name, job.group
        for metric, value in result.metrics:
            job.batch.tally.logged.setdefault(redact(metric), []).append(value)
        extras = redact_values(result.extras)
        for position, sample in enumerate(job.samples):
            for column, values in extras.items():
                group.extras.setdefault(column, [None] * len(group))[sample] = values[position]
            group.rewards[name][sample] = result.rewards[position]
            outcome = group.outcomes[name][sample] = result.outcomes[position]
            job.batch.tally.counts[name, outcome] += 1
            if outcome == "ok":
                continue
            trace = redact(result.traces[position] or "")
            counts = job.batch.failures.setdefault(job.reward, Counter())
            counts[outcome] += 1
            job.batch.traces.setdefault(job.reward, trace)
            self._failures.write(name, outcome, group, sample, trace)
            if counts[outcome] == 1:
                logger.warning("reward %r: %s; the sample counts as missing, not as 0. %s", name, outcome, trace)

    def raise_if_failing(self, batch: Batch) -> None:
        """Raise RewardFailure once too large a share failed: it can only grow, for the batch's size is known."""
        for index, outcomes in batch.failures.items():
            failed = outcomes.total()
            if failed <= self._max_failure_share * batch.num_samples:
                continue
            reward = self._rewards[index]
            counts = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
            saved = f" Inputs are in {self._failures.path}." if self._failures.path else ""
            raise RewardFailure(
                f"reward {reward.name!r} ({reward.origin}) failed on {failed} of {batch.num_samples} completions "
                f"({counts}), more than scoring.max_failure_share={self._max_failure_share:g} allows.{saved} "
                f"Its first failure:\n{batch.traces[index]}"
            )
