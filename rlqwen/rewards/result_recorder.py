"""Write results of reward calls into groups, count them, and stop the run if too many calls failed."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence

from rlqwen.errors import RewardFailure
from rlqwen.rewards.call_counts import CallCounts
from rlqwen.rewards.failure_log import FailureLog
from rlqwen.rewards.registry import Reward
from rlqwen.rewards.reward_call import CallResult
from rlqwen.rewards.scoring_batch import ScoringBatch, ScoringJob
from rlqwen.secrets import redact, redact_values
from rlqwen.terminal import get_logger

logger = get_logger(__name__)

CALL_STATUSES = ("ok", "timeout", "error", "invalid")


class ResultRecorder:
    """Record results of reward calls. Not thread-safe: the caller holds a lock."""

    def __init__(self, rewards: Sequence[Reward], max_failure_share: float, failures: FailureLog) -> None:
        self._rewards = rewards
        self._max_failure_share = max_failure_share
        self._failures = failures
        self._told: set[str] = set()
        """Rewards of which `say_what_was_lost` has warned."""
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self._counts = CallCounts()

    def add_counts(self, counts: CallCounts) -> None:
        """Include `counts` in `metrics`."""
        self._counts.add(counts)

    def metrics(self) -> dict[str, float]:
        """Return metrics since the last reset.

        Per reward: samples by call status, seconds of its calls, and seconds that the trainer waited for them. Per
        metric that rewards logged: the mean.
        """
        metrics = {name: statistics.fmean(values) for name, values in self._counts.logged.items()}
        for reward in self._rewards:
            for status in CALL_STATUSES:
                metrics[f"reward/{reward.name}/{status}"] = self._counts.num_samples[reward.name, status]
            metrics[f"reward/{reward.name}/seconds"] = self._counts.seconds[reward.name]
            metrics[f"reward/{reward.name}/wait_seconds"] = self._counts.waited[reward.name]
        return metrics

    def add_seconds(self, job: ScoringJob, seconds: float) -> None:
        """Add the duration of a call, whether or not it succeeded."""
        job.batch.counts.seconds[self._rewards[job.reward].name] += seconds  # type: ignore[assignment]

    def add_waiting(self, batch: ScoringBatch) -> None:
        """Add the time since `batch.waiting_since` to every reward that has been running since then."""
        if batch.waiting_since is None:
            return
        now = time.monotonic()
        for reward in (reward for reward, count in batch.running.items() if count):
            batch.counts.waited[self._rewards[reward].name] += now - batch.waiting_since  # type: ignore[assignment]
        batch.waiting_since = now

    def add_running(self, job: ScoringJob, number: int) -> None:
        """Record that a call begins (`number` 1) or ends (-1)."""
        self.add_waiting(job.batch)
        job.batch.running[job.reward] += number

    def hanging_seconds(self, batch: ScoringBatch) -> dict[str, float]:
        """Return reward -> seconds waited, for each reward of which a call ran into its deadline."""
        names = [self._rewards[reward].name for reward in batch.hanging]
        return {name: batch.counts.waited[name] for name in names}

    def say_what_was_lost(self, batch: ScoringBatch) -> None:
        """Warn once of each reward that hung on samples of a complete batch: how many, and how long that took."""
        for name, seconds in self.hanging_seconds(batch).items():
            count = batch.counts.num_samples[name, "timeout"]
            if count and name not in self._told:
                self._told.add(name)
                logger.warning(
                    "reward %r hung on %d of %d samples, which took %.1f s with the calls beside them, at most one "
                    "scoring.timeout a sample; reward/%s/timeout and /wait_seconds count them from here on",
                    name, count, batch.num_samples, seconds, name,
                )  # fmt: skip

    def record(self, job: ScoringJob, result: CallResult) -> None:
        """Write the final result of a job into its group."""
        name, group = self._rewards[job.reward].name, job.group
        for metric, value in result.metrics:
            job.batch.counts.logged.setdefault(redact(metric), []).append(value)
        extras = redact_values(result.extras)
        for position, sample in enumerate(job.samples):
            for column, values in extras.items():
                group.extras.setdefault(column, [None] * len(group))[sample] = values[position]
            group.rewards[name][sample] = result.rewards[position]
            status = group.call_statuses[name][sample] = result.statuses[position]
            job.batch.counts.num_samples[name, status] += 1
            if status == "ok":
                continue
            trace = redact(result.traces[position] or "")
            counts = job.batch.failures.setdefault(job.reward, Counter())
            counts[status] += 1
            job.batch.traces.setdefault(job.reward, trace)
            self._failures.write(name, status, group, sample, trace)
            if counts[status] == 1:
                logger.warning("reward %r: %s; the sample counts as missing, not as 0. %s", name, status, trace)

    def raise_if_failing(self, batch: ScoringBatch) -> None:
        """Raise RewardFailure if a reward failed on more than `max_failure_share` of the batch.

        May be called before the batch is complete: its size is known, so the share can only grow.
        """
        for index, statuses in batch.failures.items():
            failed = statuses.total()
            if failed <= self._max_failure_share * batch.num_samples:
                continue
            reward = self._rewards[index]
            counts = ", ".join(f"{status} {count}" for status, count in sorted(statuses.items()))
            saved = f" Inputs are in {self._failures.path}." if self._failures.path else ""
            raise RewardFailure(
                f"reward {reward.name!r} ({reward.origin}) failed on {failed} of {batch.num_samples} completions "
                f"({counts}), more than scoring.max_failure_share={self._max_failure_share:g} allows.{saved} "
                f"Its first failure:\n{batch.traces[index]}"
            )
