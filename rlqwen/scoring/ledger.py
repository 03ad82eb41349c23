"""Keeps count of what became of the reward calls of a batch, and says when too many failed."""

import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlqwen.errors import RewardFailure
from rlqwen.registry import Reward
from rlqwen.scoring.failures import FailureLog
from rlqwen.scoring.outcomes import CallResult
from rlqwen.secrets import redact
from rlqwen.types import Group

logger = logging.getLogger(__name__)

OUTCOMES = ("ok", "timeout", "error", "invalid")


@dataclass(slots=True)
class Batch:
    """What was submitted since the last wait."""

    groups: list[Group] = field(default_factory=list)
    num_samples: int = 0
    num_open_jobs: int = 0
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
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._logged: dict[str, list[float]] = defaultdict(list)

    def metrics(self) -> dict[str, float]:
        """Samples by outcome and seconds of each reward, and the means of what rewards logged, since the reset."""
        metrics = {name: statistics.fmean(values) for name, values in self._logged.items()}
        for reward in self._rewards:
            for outcome in OUTCOMES:
                metrics[f"reward/{reward.name}/{outcome}"] = self._counts[reward.name, outcome]
            metrics[f"reward/{reward.name}/seconds"] = self._seconds[reward.name]
        return metrics

    def add_seconds(self, job: Job, seconds: float) -> None:
        """Count time that a call took, whatever came of it."""
        self._seconds[self._rewards[job.reward].name] += seconds

    def record(self, job: Job, result: CallResult) -> None:
        """The final word on the samples of a job."""
        name, group = self._rewards[job.reward].name, job.group
        for metric, value in result.metrics:
            self._logged[metric].append(value)
        for position, sample in enumerate(job.samples):
            for column, values in result.extras.items():
                group.extras.setdefault(column, [None] * len(group))[sample] = values[position]
            group.rewards[name][sample] = result.rewards[position]
            outcome = group.outcomes[name][sample] = result.outcomes[position]
            self._counts[name, outcome] += 1
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
