"""Scores groups while others are still being generated."""

import threading
import time
import weakref
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from rlqwen.config import ScoringConfig
from rlqwen.rewards.call import CallResult, call
from rlqwen.rewards.dispatcher import Call, Dispatcher
from rlqwen.rewards.failure_log import FailureLog
from rlqwen.rewards.placement import check_arguments, must_isolate, pack_travellers
from rlqwen.rewards.registry import Reward, call_arguments, check_columns
from rlqwen.rewards.results import Batch, Job, Ledger, Tally
from rlqwen.rewards.reward_logging import LOGGERS
from rlqwen.rewards.reward_model import RewardModel
from rlqwen.rewards.total_reward import total_rewards
from rlqwen.rewards.wait_budget import WaitBudget
from rlqwen.rewards.worker_main import CONFINED_PYTHON
from rlqwen.types import Group


class Scorer:
    """Calls rewards on groups: in worker processes with a deadline, or in this process where they cannot travel.

    `weights`: one a reward, 1 each by default. `failures_dir`: where inputs of failed calls are kept, or nowhere.
    `tokenizer`: for reward models that come without one. Workers start at once, in the background.

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
        """Names of the data's columns; a row that lacks one of them gives None for it."""
        self.trainer_state: Any = None
        """Given to rewards that ask for `trainer_state`, as a copy of its plain attributes, such as `global_step`."""
        self._config = config
        check_arguments(self.rewards, self.weights, config)
        self._tokenizer = tokenizer
        self._changed = threading.Condition()
        self._batch: Batch | None = None
        self._ledger = Ledger(self.rewards, config.max_failure_share, FailureLog(failures_dir))
        self._budget = WaitBudget(config)
        self._restarts_before = 0
        packed = pack_travellers(self.rewards, config)
        self._dispatchers: list[Dispatcher] = []
        self._places: dict[int, tuple[Dispatcher, int]] = {}
        """Number of a reward -> who calls it, and its number there; not in it: called in this process."""
        for isolate in (False, True):
            chosen = [index for index in packed if must_isolate(self.rewards[index], config) is isolate]
            if not chosen:
                continue
            labels = [f"{self.rewards[index].name!r} ({self.rewards[index].origin})" for index in chosen]
            functions = [packed[index] for index in chosen]
            dispatcher = Dispatcher(functions, labels, config, self._changed, isolate=isolate)
            self._dispatchers.append(dispatcher)
            self._places |= {index: (dispatcher, place) for place, index in enumerate(chosen)}
            # Ends the workers when the scorer is garbage, or the interpreter exits, without a close.
            weakref.finalize(self, dispatcher.close)

    def check(self, columns: Collection[str], where: str) -> None:
        """Raise RewardSpecError if a reward asks for a column that the data, called `where`, lacks."""
        for reward in self.rewards:
            check_columns(reward, columns, where)

    def wait_until_ready(self) -> None:
        """Return when every worker has imported the rewards and reward models are loaded; raise if one cannot."""
        for reward in self.rewards:
            if isinstance(reward.function, RewardModel):
                reward.function.load(self._tokenizer)
        with self._changed:
            while any(dispatcher.num_ready < self._config.num_workers for dispatcher in self._dispatchers):
                self._raise_dispatcher_error()
                self._changed.wait()

    def open(self) -> Batch:
        """A batch of its own, which may be scored while others are; as rewards see it, the trainer's state is today's."""
        return Batch(_plain_state(self.trainer_state))

    def submit(self, group: Group, batch: Batch | None = None) -> None:
        """Begin to score a group and return at once; from any thread. None: to the batch of the next plain `wait`."""
        self._raise_dispatcher_error()
        batch = self._default_batch() if batch is None else batch
        group.rewards = {reward.name: [None] * len(group) for reward in self.rewards}
        group.outcomes = {reward.name: ["ok"] * len(group) for reward in self.rewards}
        group.extras = {}
        jobs = [Job(batch, reward, group, range(len(group))) for reward in range(len(self.rewards))]
        with self._changed:
            batch.groups.append(group)
            batch.num_samples += len(group)
            batch.num_open_jobs += len(jobs)
        for job in jobs:
            self._begin(job)

    def wait(self, batch: Batch | None = None) -> list[Group]:
        """Return the scored groups of a batch in the order of submission; None: all since the last plain wait.

        Raises RewardFailure as soon as it is certain that a reward fails on too large a share of them, or hangs for too
        long (rlqwen.rewards.wait_budget), and then forgets the batch. Rewards of this process are called here, in the caller's thread. `metrics` tells of the calls
        of a batch of its own once its tally is given to `count`.
        """
        plain = batch is None
        batch = self._default_batch() if batch is None else batch
        if plain:
            self._batch = None
        with self._changed:
            batch.waiting_since = time.monotonic()
        try:
            while batch.local_jobs:
                self._call_here(batch.local_jobs.popleft())
                with self._changed:
                    self._ledger.raise_if_failing(batch)
            with self._changed:
                while batch.num_open_jobs:
                    self._raise_dispatcher_error()
                    self._ledger.raise_if_failing(batch)
                    self._budget.check(self._ledger.waited_for_hanging(batch))
                    self._changed.wait()
                    self._ledger.count_waiting(batch)
                self._ledger.raise_if_failing(batch)
                self._budget.end_step(self._ledger.waited_for_hanging(batch))
        except BaseException:
            self._forget(batch)
            raise
        finally:
            batch.is_open = False
            batch.waiting_since = None
            if plain:
                self.count(batch.tally)
        weights = dict(zip((reward.name for reward in self.rewards), self.weights, strict=True))
        for group in batch.groups:
            group.total_rewards_G = total_rewards(group, weights)
        return batch.groups

    def count(self, tally: Tally) -> None:
        """Have `metrics` tell of a batch that was waited for."""
        with self._changed:
            self._ledger.count(tally)

    def score(self, groups: Sequence[Group]) -> None:
        """Submit all groups and wait for them."""
        for group in groups:
            self.submit(group)
        self.wait()

    def metrics(self) -> dict[str, float]:
        """Return, since the last reset: for each reward, samples by outcome, seconds of its calls, and seconds that
        `wait` waited for them; workers replaced; what rewards gave to `log_metric`."""
        with self._changed:
            return self._ledger.metrics() | {"scoring/restarts": self._num_restarts() - self._restarts_before}

    def reset_metrics(self) -> None:
        """Start counting anew."""
        with self._changed:
            self._ledger.reset()
            self._restarts_before = self._num_restarts()

    def close(self) -> None:
        """End the workers; idempotent. What is still being scored is lost."""
        for dispatcher in self._dispatchers:
            dispatcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, job: Job) -> None:
        if job.reward not in self._places:
            job.batch.local_jobs.append(job)
            return
        dispatcher, index = self._places[job.reward]
        services = self._loggers(job)
        if CONFINED_PYTHON in self.rewards[job.reward].parameters:
            services += (CONFINED_PYTHON,)
        begin, finish = partial(self._call_begins, job), partial(self._finish, job)
        dispatcher.submit(Call(index, len(job.samples), self._arguments(job), services, begin, finish, job.batch))

    def _arguments(self, job: Job) -> dict[str, Any]:
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

    def _loggers(self, job: Job) -> tuple[str, ...]:
        reward = self.rewards[job.reward]
        return tuple(name for name in LOGGERS if reward.accepts_any_column or name in reward.parameters)

    def _call_here(self, job: Job) -> None:
        function = self.rewards[job.reward].function
        if isinstance(function, RewardModel):
            function.load(self._tokenizer)
        self._call_begins(job)
        result = call(
            function,
            partial(self._arguments, job),
            len(job.samples),
            loggers=self._loggers(job),
            let_through=(KeyboardInterrupt, SystemExit),
        )
        self._finish(job, result)

    def _call_begins(self, job: Job) -> None:
        with self._changed:
            self._ledger.add_call(job, 1)

    def _finish(self, job: Job, result: CallResult) -> None:
        """Record a result, or call sample by sample if a whole group failed, so that only the guilty ones lose."""
        retries: list[Job] = []
        with self._changed:
            self._ledger.add_call(job, -1)
            self._ledger.add_seconds(job, result.seconds)
            if "timeout" in result.outcomes:
                job.batch.hanging.add(job.reward)
            if not job.batch.is_open:
                return
            if not result.is_settled and len(job.samples) > 1:
                retries = [Job(job.batch, job.reward, job.group, (sample,)) for sample in job.samples]
            else:
                self._ledger.record(job, result)
            job.batch.num_open_jobs += len(retries) - 1
            self._changed.notify_all()
        for retry in retries:
            self._begin(retry)

    def _raise_dispatcher_error(self) -> None:
        for dispatcher in self._dispatchers:
            if dispatcher.error is not None:
                raise dispatcher.error

    def _num_restarts(self) -> int:
        return sum(dispatcher.num_restarts for dispatcher in self._dispatchers)

    def _default_batch(self) -> Batch:
        if self._batch is None:
            self._batch = self.open()
        return self._batch

    def _forget(self, batch: Batch) -> None:
        """What is queued of it need not be called any more."""
        with self._changed:
            for dispatcher in self._dispatchers:
                dispatcher.drop_queued(batch)


def _plain_state(state: Any) -> SimpleNamespace:
    """The numbers and strings of a trainer's state: workers need not import its class, nor receive its history."""
    public = {name: value for name, value in vars(state).items() if name[0] != "_"} if state is not None else {}
    plain = {name: value for name, value in public.items() if isinstance(value, int | float | str | None)}
    return SimpleNamespace(**{"global_step": 0, "max_steps": 0, "epoch": 0.0} | plain)
