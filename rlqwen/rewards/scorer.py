"""Score groups of completions while others are still being generated."""

import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from rlqwen.config import ScoringConfig
from rlqwen.rewards.call_counts import CallCounts
from rlqwen.rewards.dispatcher import Dispatcher, WorkerCall
from rlqwen.rewards.failure_log import FailureLog
from rlqwen.rewards.hang_search import group_timeout, settle
from rlqwen.rewards.placement import check_arguments, must_isolate, pickle_rewards
from rlqwen.rewards.registry import Reward, call_arguments, check_columns
from rlqwen.rewards.result_recorder import ResultRecorder
from rlqwen.rewards.reward_call import CallResult, call
from rlqwen.rewards.reward_logging import LOGGERS
from rlqwen.rewards.reward_model import RewardModel
from rlqwen.rewards.scoring_batch import ScoringBatch, ScoringJob
from rlqwen.rewards.total_reward import total_rewards
from rlqwen.rewards.wait_budget import WaitBudget
from rlqwen.rewards.worker_main import CONFINED_PYTHON
from rlqwen.types import Group


class Scorer:
    """Call rewards on groups: in worker processes with a deadline, or in this process if they cannot be pickled.

    Workers start at once, in the background.

    Args:
        rewards: reward functions and reward models.
        config: the `scoring` section of the recipe.
        weights: one per reward; 1 each by default.
        failures_dir: folder that inputs of failed calls are written to; None writes none.
        tokenizer: for reward models that come without one.

    Example:
        with Scorer(build_rewards(["accuracy", my_reward]), ScoringConfig(timeout=10)) as scorer:
            scorer.score(groups)
            print(groups[0].total_rewards_G)
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        config: ScoringConfig,
        *,
        weights: Sequence[float] | None = None,
        failures_dir: Path | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.rewards = tuple(rewards)
        self.weights = (1.0,) * len(self.rewards) if weights is None else tuple(weights)
        self.columns: set[str] = set()
        """Names of the dataset's columns. A row that lacks one of them passes None for it."""
        self.trainer_state: Any = None
        """Passed to rewards that take `trainer_state`, as a copy of its numbers and strings, such as `global_step`."""
        self._config = config
        check_arguments(self.rewards, self.weights, config)
        self._tokenizer = tokenizer
        self._changed = threading.Condition()
        self._batch: ScoringBatch | None = None
        self._results = ResultRecorder(self.rewards, config.max_failure_share, FailureLog(failures_dir))
        self._budget = WaitBudget(config)
        self._restarts_before = 0
        pickled = pickle_rewards(self.rewards, config)
        self._dispatchers: list[Dispatcher] = []
        self._places: dict[int, tuple[Dispatcher, int]] = {}
        """Index of a reward -> its dispatcher and its index there. Rewards that are absent are called in this process."""
        for isolate in (False, True):
            chosen = [index for index in pickled if must_isolate(self.rewards[index], config) is isolate]
            if not chosen:
                continue
            labels = [f"{self.rewards[index].name!r} ({self.rewards[index].origin})" for index in chosen]
            functions = [pickled[index] for index in chosen]
            dispatcher = Dispatcher(functions, labels, config, self._changed, isolate=isolate)
            self._dispatchers.append(dispatcher)
            self._places |= {index: (dispatcher, place) for place, index in enumerate(chosen)}
            # Ends the workers if the scorer is garbage-collected, or the interpreter exits, without `close`.
            weakref.finalize(self, dispatcher.close)

    def check(self, columns: Collection[str], where: str) -> None:
        """Raise RewardSpecError if a reward takes a column that the dataset lacks. `where` names the dataset."""
        for reward in self.rewards:
            check_columns(reward, columns, where)

    def wait_until_ready(self) -> None:
        """Wait until every worker has imported the rewards and reward models are loaded; raise if one cannot."""
        for reward in self.rewards:
            if isinstance(reward.function, RewardModel):
                reward.function.load(self._tokenizer)
        with self._changed:
            while any(dispatcher.num_ready < self._config.num_workers for dispatcher in self._dispatchers):
                self._raise_dispatcher_error()
                self._changed.wait()

    def open_batch(self) -> ScoringBatch:
        """Return a new batch, which may be scored while others are. Its rewards see the trainer's state of now."""
        return ScoringBatch(_plain_state(self.trainer_state))

    def submit(self, group: Group, batch: ScoringBatch | None = None) -> None:
        """Begin to score a group and return at once; thread-safe.

        `batch`: None adds the group to the batch that the next `wait()` waits for.
        """
        self._raise_dispatcher_error()
        batch = self._default_batch() if batch is None else batch
        group.rewards = {reward.name: [None] * len(group) for reward in self.rewards}
        group.call_statuses = {reward.name: ["ok"] * len(group) for reward in self.rewards}
        group.extras = {}
        jobs = [ScoringJob(batch, reward, group, range(len(group))) for reward in range(len(self.rewards))]
        with self._changed:
            batch.groups.append(group)
            batch.num_samples += len(group)
            self._add_open_jobs(group, batch, len(jobs))
        for job in jobs:
            self._begin(job)

    def wait(self, batch: ScoringBatch | None = None) -> list[Group]:
        """Return the scored groups of a batch, in the order of submission.

        Rewards that are not in workers are called here, in the caller's thread. `metrics` includes the calls of a batch
        from `open_batch` only once its counts are passed to `add_counts`.

        `batch`: None waits for all groups submitted without a batch since the last `wait()`.

        Raises RewardFailure as soon as a reward is certain to fail on too large a share of the batch, or hangs for too
        long (rlqwen.rewards.wait_budget); the batch is then discarded.
        """
        is_default = batch is None
        batch = self._default_batch() if batch is None else batch
        if is_default:
            self._batch = None
        with self._changed:
            batch.waiting_since = time.monotonic()
        try:
            while batch.local_jobs:
                self._call_here(batch.local_jobs.popleft())
                with self._changed:
                    self._results.raise_if_failing(batch)
            with self._changed:
                while batch.num_open_jobs:
                    self._raise_dispatcher_error()
                    self._results.raise_if_failing(batch)
                    self._budget.check(self._results.hanging_seconds(batch))
                    self._changed.wait()
                    self._results.add_waiting(batch)
                self._results.raise_if_failing(batch)
                self._budget.end_step(self._results.hanging_seconds(batch))
                self._results.say_what_was_lost(batch)
        except BaseException:
            self._discard(batch)
            raise
        finally:
            batch.is_open = False
            batch.waiting_since = None
            if is_default:
                self.add_counts(batch.counts)
        for group in batch.groups:
            self._add_up(group)
        return batch.groups

    def take_scored(self, batch: ScoringBatch, *, is_complete: Callable[[], bool]) -> list[Group]:
        """Return groups of an open batch that were scored since the last call, at least one if there will be more.

        Call it in the thread that calls `wait`, which must still be called at the end. `is_complete`: whether nothing will
        be submitted any more; asked again after each `notify`.
        """
        while not batch.scored:
            while batch.local_jobs:
                self._call_here(batch.local_jobs.popleft())
            with self._changed:
                while not (batch.scored or batch.local_jobs):
                    self._raise_dispatcher_error()
                    if is_complete() and not batch.num_open_jobs:
                        return []
                    self._changed.wait()
        scored = [batch.scored.popleft() for _ in range(len(batch.scored))]
        for group in scored:
            self._add_up(group)
        return scored

    def notify(self) -> None:
        """Make a waiting `take_scored` ask again whether its batch is complete."""
        with self._changed:
            self._changed.notify_all()

    def _add_up(self, group: Group) -> None:
        weights = dict(zip((reward.name for reward in self.rewards), self.weights, strict=True))
        group.total_rewards_G = total_rewards(group, weights)

    def add_counts(self, counts: CallCounts) -> None:
        """Include the counts of a scored batch in `metrics`."""
        with self._changed:
            self._results.add_counts(counts)

    def score(self, groups: Sequence[Group]) -> None:
        """Submit all groups and wait for them."""
        for group in groups:
            self.submit(group)
        self.wait()

    def metrics(self) -> dict[str, float]:
        """Return metrics since the last reset.

        Per reward: samples by call status, seconds of its calls, and seconds that `wait` waited for them. Then the
        number of workers restarted, and the means of what rewards passed to `log_metric`.
        """
        with self._changed:
            return self._results.metrics() | {"scoring/restarts": self._num_restarts() - self._restarts_before}

    def reset_metrics(self) -> None:
        """Set all counts to 0."""
        with self._changed:
            self._results.reset()
            self._restarts_before = self._num_restarts()

    def close(self) -> None:
        """End the workers; idempotent. Groups that are still being scored are lost."""
        for dispatcher in self._dispatchers:
            dispatcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, job: ScoringJob) -> None:
        if job.reward not in self._places:
            job.batch.local_jobs.append(job)
            self.notify()
            return
        dispatcher, index = self._places[job.reward]
        services = self._loggers(job)
        if CONFINED_PYTHON in self.rewards[job.reward].parameters:
            services += (CONFINED_PYTHON,)
        begin, finish = partial(self._call_begun, job), partial(self._finish, job)
        count, seconds = len(job.samples), job.seconds
        if seconds is None:
            seconds = group_timeout(self._config.timeout, count)
        dispatcher.submit(WorkerCall(index, count, self._arguments(job), seconds, services, begin, finish, job.batch))

    def _arguments(self, job: ScoringJob) -> dict[str, Any]:
        prompt = job.group.prompt
        chosen = [job.group.completions[sample] for sample in job.samples]
        completions: list[Any] = [completion.text for completion in chosen]
        if prompt.is_conversational:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        row = dict.fromkeys(sorted(self.columns)) | prompt.columns
        columns = {name: [value] * len(chosen) for name, value in row.items()}
        return call_arguments(
            self.rewards[job.reward],
            [prompt.content] * len(chosen),
            completions,
            [completion.token_ids for completion in chosen],
            {"prompt_opens_reasoning": [prompt.opens_reasoning] * len(chosen)}
            | columns
            | {"trainer_state": job.batch.state},
        )

    def _loggers(self, job: ScoringJob) -> tuple[str, ...]:
        reward = self.rewards[job.reward]
        return tuple(name for name in LOGGERS if reward.accepts_any_column or name in reward.parameters)

    def _call_here(self, job: ScoringJob) -> None:
        function = self.rewards[job.reward].function
        if isinstance(function, RewardModel):
            function.load(self._tokenizer)
        self._call_begun(job)
        result = call(
            function,
            partial(self._arguments, job),
            len(job.samples),
            loggers=self._loggers(job),
            let_through=(KeyboardInterrupt, SystemExit),
        )
        self._finish(job, result)

    def _call_begun(self, job: ScoringJob) -> None:
        with self._changed:
            self._results.add_running(job, 1)

    def _finish(self, job: ScoringJob, result: CallResult) -> None:
        """Record a result. If a whole group failed, call sample by sample instead, to keep the rewards of the others."""
        with self._changed:
            self._results.add_running(job, -1)
            self._results.add_seconds(job, result.seconds)
            if "timeout" in result.statuses:
                job.batch.hanging.add(job.reward)
            if not job.batch.is_open:
                return
            timeout = self._config.timeout if job.reward in self._places else None
            retries, num_recorded = settle(job, result, self._results.record, timeout)
            self._add_open_jobs(job.group, job.batch, len(retries) - num_recorded)
        for retry in retries:
            self._begin(retry)

    def _add_open_jobs(self, group: Group, batch: ScoringBatch, number: int) -> None:
        """Count calls that begin, or are recorded; the caller holds the lock."""
        batch.num_open_jobs += number
        batch.open_jobs[id(group)] += number
        if not batch.open_jobs[id(group)]:
            batch.scored.append(group)
        self._changed.notify_all()

    def _raise_dispatcher_error(self) -> None:
        for dispatcher in self._dispatchers:
            if dispatcher.error is not None:
                raise dispatcher.error

    def _num_restarts(self) -> int:
        return sum(dispatcher.num_restarts for dispatcher in self._dispatchers)

    def _default_batch(self) -> ScoringBatch:
        if self._batch is None:
            self._batch = self.open_batch()
        return self._batch

    def _discard(self, batch: ScoringBatch) -> None:
        """Drop the queued calls of a batch."""
        with self._changed:
            for dispatcher in self._dispatchers:
                dispatcher.drop_queued(batch)


def _plain_state(state: Any) -> SimpleNamespace:
    """Copy the numbers and strings of a trainer's state, so that workers need neither its class nor its history."""
    public = {name: value for name, value in vars(state).items() if name[0] != "_"} if state is not None else {}
    plain = {name: value for name, value in public.items() if isinstance(value, int | float | str | None)}
    return SimpleNamespace(**{"global_step": 0, "max_steps": 0, "epoch": 0.0} | plain)
