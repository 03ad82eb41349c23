"""Find the samples of a group on which a reward hangs, so that each costs the run at most one `scoring.timeout`."""

from collections.abc import Callable
from dataclasses import dataclass, field

from rlqwen.rewards.reward_call import CallResult
from rlqwen.rewards.scoring_batch import ScoringJob


def group_timeout(timeout: float, count: int) -> float:
    """Return the seconds that a call on `count` samples may take.

    A call on n samples may take n/(n+1) of `timeout` (T). If it takes longer, each sample is called alone for T/(n+1). If
    one of them does not answer, it is the one that hangs. If k > 1 do not, each is called again, for (k-1)/k of what the
    group could take, because they may only be slow. Hanging samples cost kT together, whatever their number k:
    nT/(n+1) + kT/(n+1) + k (k-1)/k nT/(n+1) = kT.
    """
    return timeout if count == 1 else timeout * count / (count + 1)


@dataclass(slots=True)
class HangSearch:
    """Call a reward on each sample of a group alone, after its call on all of them ran out of time."""

    timeout: float
    """scoring.timeout."""
    count: int
    """Number of samples in the group."""
    num_open: int = 0
    """Samples that have not answered in the first round."""
    unfinished: list[tuple[ScoringJob, CallResult]] = field(default_factory=list)
    """Samples that ran out of time in the first round."""

    def first_round(self, job: ScoringJob) -> list[ScoringJob]:
        """Return the calls on the samples of a group alone."""
        self.num_open = self.count
        seconds = self.timeout / (self.count + 1)
        return [ScoringJob(job.batch, job.reward, job.group, (sample,), seconds, self) for sample in job.samples]

    def second_round(self) -> list[ScoringJob]:
        """Return the calls on the samples that ran out of time, of which there is more than one."""
        share = 1 - 1 / len(self.unfinished)
        seconds = share * group_timeout(self.timeout, self.count)
        return [ScoringJob(job.batch, job.reward, job.group, job.samples, seconds) for job, _ in self.unfinished]


def settle(
    job: ScoringJob, result: CallResult, record: Callable[[ScoringJob, CallResult], None], timeout: float | None
) -> tuple[list[ScoringJob], int]:
    """Record the results that are final once a call has ended.

    `timeout`: scoring.timeout; None for a reward without a deadline.

    Returns:
        The calls to make next, and how many calls that were counted as open are settled or replaced by them.
    """
    ran_out = not result.is_settled and result.statuses[0] == "timeout"
    if not result.is_settled and len(job.samples) > 1:
        if ran_out and timeout is not None:
            return HangSearch(timeout, len(job.samples)).first_round(job), 1
        return [ScoringJob(job.batch, job.reward, job.group, (sample,)) for sample in job.samples], 1
    search, num_settled = job.search, 0
    if search is not None and ran_out:
        search.unfinished.append((job, result))
    else:
        record(job, result)
        num_settled = 1
    if search is None:
        return [], num_settled
    search.num_open -= 1
    if search.num_open or not search.unfinished:
        return [], num_settled
    if len(search.unfinished) > 1:
        return search.second_round(), num_settled + len(search.unfinished)
    record(*search.unfinished[0])
    return [], num_settled + 1
