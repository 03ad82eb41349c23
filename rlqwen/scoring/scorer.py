"""Scores groups while others are still being generated."""

import logging
import threading
import warnings
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlqwen.config import ScoringConfig
from rlqwen.errors import ConfigError, RewardFailure, RewardSpecError
from rlqwen.registry import Reward, call_arguments, check_columns
from rlqwen.scoring.dispatch import Call, Dispatcher
from rlqwen.scoring.failures import FailureLog
from rlqwen.scoring.outcomes import CallResult, call
from rlqwen.scoring.reward_model import RewardModel
from rlqwen.scoring.travel import pack, state_of
from rlqwen.types import Group

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class _Job:
    """One reward on some samples of a group; `batch` tells results of a batch that was given up from today's."""

    batch: "_Batch"
    reward: int
    group: Group
    samples: Sequence[int]


@dataclass(slots=True)
class _Batch:
    """What was submitted since the last wait."""

    groups: list[Group] = field(default_factory=list)
    num_samples: int = 0
    num_open_jobs: int = 0
    failures: dict[int, Counter[str]] = field(default_factory=dict)
    """Failed samples by reward and outcome."""
    traces: dict[int, str] = field(default_factory=dict)
    """The first traceback of each failing reward."""


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
        self._config = config
        _check_arguments(self.rewards, self.weights, config)
        self._failures = FailureLog(failures_dir)
        self._tokenizer = tokenizer
        self._changed = threading.Condition()
        self._batch = _Batch()
        self._local_jobs: deque[_Job] = deque()
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._restarts_before = 0
        packed = _pack_travellers(self.rewards, config)
        self._worker_index = {reward: index for index, reward in enumerate(packed)}
        self._dispatcher: Dispatcher | None = None
        if packed:
            labels = [f"{self.rewards[index].name!r} ({self.rewards[index].origin})" for index in packed]
            self._dispatcher = Dispatcher(list(packed.values()), labels, config, self._changed)
            # Ends the workers when the scorer is garbage, or the interpreter exits, without a close.
            self._finalizer = weakref.finalize(self, self._dispatcher.close)

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
            while self._dispatcher is not None and self._dispatcher.num_ready < self._config.num_workers:
                self._raise_dispatcher_error()
                self._changed.wait()

    def submit(self, group: Group) -> None:
        """Begin to score a group and return at once."""
        self._raise_dispatcher_error()
        group.rewards = {reward.name: [None] * len(group) for reward in self.rewards}
        group.outcomes = {reward.name: ["ok"] * len(group) for reward in self.rewards}
        samples = range(len(group))
        jobs = [_Job(self._batch, reward, group, samples) for reward in range(len(self.rewards))] if samples else []
        with self._changed:
            self._batch.groups.append(group)
            self._batch.num_samples += len(group)
            self._batch.num_open_jobs += len(jobs)
        for job in jobs:
            self._begin(job)

    def wait(self) -> list[Group]:
        """All groups submitted since the last wait, scored, in the order of submission.

        Raises RewardFailure as soon as it is certain that a reward fails on too large a share of them, and then
        forgets the batch. Rewards of this process are called here, in the caller's thread.
        """
        try:
            while self._local_jobs:
                self._raise_if_failing()
                self._call_here(self._local_jobs.popleft())
            with self._changed:
                while self._batch.num_open_jobs:
                    self._raise_dispatcher_error()
                    self._raise_if_failing()
                    self._changed.wait()
                self._raise_if_failing()
                groups = self._batch.groups
        finally:
            self._forget_batch()
        for group in groups:
            group.total_rewards_G = self._total(group)
        return groups

    def score(self, groups: Sequence[Group]) -> None:
        """Submit all groups and wait for them."""
        for group in groups:
            self.submit(group)
        self.wait()

    def metrics(self) -> dict[str, float]:
        """Samples by outcome and seconds of each reward, and workers replaced, since the last reset."""
        with self._changed:
            metrics: dict[str, float] = {}
            for reward in self.rewards:
                for outcome in ("ok", "timeout", "error", "invalid"):
                    key = f"reward/{reward.name}/{outcome}"
                    metrics[key] = self._counts[key]
                metrics[f"reward/{reward.name}/seconds"] = self._seconds[reward.name]
            metrics["scoring/restarts"] = self._num_restarts() - self._restarts_before
            return metrics

    def reset_metrics(self) -> None:
        """Start counting anew."""
        with self._changed:
            self._counts.clear()
            self._seconds.clear()

    def _begin(self, job: _Job) -> None:
        index = self._worker_index.get(job.reward)
        if index is None or self._dispatcher is None:
            self._local_jobs.append(job)
            return
        finish = partial(self._finish, job)
        self._dispatcher.submit(Call(index, len(job.samples), self._arguments(job), finish))

    def _arguments(self, job: _Job) -> dict[str, Any]:
        prompt = job.group.prompt
        chosen = [job.group.completions[sample] for sample in job.samples]
        completions: list[Any] = [completion.text for completion in chosen]
        if prompt.is_conversational:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        return call_arguments(
            self.rewards[job.reward],
            [prompt.content] * len(chosen),
            completions,
            [completion.token_ids for completion in chosen],
            {name: [value] * len(chosen) for name, value in prompt.columns.items()},
        )

    def _call_here(self, job: _Job) -> None:
        function = self.rewards[job.reward].function
        if isinstance(function, RewardModel):
            function.load(self._tokenizer)
        arguments = self._arguments(job)
        stop_signs = (KeyboardInterrupt, SystemExit)
        self._finish(job, call(lambda: function(**arguments), len(job.samples), stop_signs, frames_to_hide=2))

    def _finish(self, job: _Job, result: CallResult) -> None:
        """Record a result, or call sample by sample if a whole group failed, so that only the guilty ones lose."""
        name = self.rewards[job.reward].name
        with self._changed:
            self._seconds[name] += result.seconds
            if job.batch is not self._batch:
                return
            retries = []
            if not result.is_settled and len(job.samples) > 1:
                retries = [_Job(job.batch, job.reward, job.group, (sample,)) for sample in job.samples]
                job.batch.num_open_jobs += len(retries)
            else:
                self._record(job, result)
            job.batch.num_open_jobs -= 1
            self._changed.notify_all()
        for retry in retries:
            self._begin(retry)

    def _record(self, job: _Job, result: CallResult) -> None:
        name, group = self.rewards[job.reward].name, job.group
        for position, sample in enumerate(job.samples):
            outcome, trace = result.outcomes[position], result.traces[position]
            group.rewards[name][sample] = result.rewards[position]
            group.outcomes[name][sample] = outcome
            key = f"reward/{name}/{outcome}"
            self._counts[key] += 1
            if outcome == "ok":
                continue
            job.batch.failures.setdefault(job.reward, Counter())[outcome] += 1
            job.batch.traces.setdefault(job.reward, trace or "")
            self._failures.write(name, outcome, group, sample, trace)
            if self._counts[key] == 1:
                logger.warning("reward %r: %s; the sample counts as missing, not as 0. %s", name, outcome, trace)

    def _total(self, group: Group) -> list[float | None]:
        totals: list[float | None] = []
        for sample in range(len(group)):
            given = [
                weight * value
                for reward, weight in zip(self.rewards, self.weights, strict=True)
                if (value := group.rewards[reward.name][sample]) is not None
            ]
            totals.append(sum(given) if given else None)
        return totals

    def _raise_if_failing(self) -> None:
        """More failures may come, so a share that is too large now stays too large."""
        for index, outcomes in self._batch.failures.items():
            failed, num_samples = outcomes.total(), self._batch.num_samples
            if failed <= self._config.max_failure_share * num_samples:
                continue
            reward = self.rewards[index]
            counts = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
            saved = f" Inputs are in {self._failures.path}." if self._failures.path else ""
            raise RewardFailure(
                f"reward {reward.name!r} ({reward.origin}) failed on {failed} of {num_samples} completions ({counts}), "
                f"more than scoring.max_failure_share={self._config.max_failure_share:g} allows.{saved} "
                f"Its first failure:\n{self._batch.traces[index]}"
            )

    def _raise_dispatcher_error(self) -> None:
        if self._dispatcher is not None and self._dispatcher.error is not None:
            raise self._dispatcher.error

    def _num_restarts(self) -> int:
        return self._dispatcher.num_restarts if self._dispatcher is not None else 0

    def _forget_batch(self) -> None:
        with self._changed:
            self._batch = _Batch()
            self._local_jobs.clear()
            if self._dispatcher is not None:
                self._dispatcher.drop_queued()

    def close(self) -> None:
        """End the workers; idempotent. What is still being scored is lost."""
        if self._dispatcher is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_arguments(rewards: Sequence[Reward], weights: Sequence[float], config: ScoringConfig) -> None:
    names = [reward.name for reward in rewards]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise RewardSpecError(f"two rewards of this run are called {repeated[0]!r}; give each a name of its own")
    if len(weights) != len(rewards):
        raise ConfigError(f"reward_weights has {len(weights)} values for {len(rewards)} rewards: {', '.join(names)}")
    for name in config.in_process:
        if name not in names:
            raise ConfigError(f"scoring.in_process names {name!r}, which is no reward here: {', '.join(names)}")


def _pack_travellers(rewards: Sequence[Reward], config: ScoringConfig) -> dict[int, bytes]:
    """Number of each reward that goes to workers -> the pickled function; warns of those that unexpectedly stay."""
    packed = {}
    for index, reward in enumerate(rewards):
        if reward.name in config.in_process or isinstance(reward.function, RewardModel):
            continue
        reason = state_of(reward.function)
        if reason is None:
            try:
                packed[index] = pack(reward.function)
                continue
            except Exception as error:  # noqa: BLE001  picklers raise anything
                reason = f"it cannot be pickled: {type(error).__name__}: {error}"
        warnings.warn(
            f"reward {reward.name!r} is called in the trainer's process, without a deadline, because {reason}; "
            f"make it a plain function, or accept this by scoring.in_process=[{reward.name!r}]",
            stacklevel=3,
        )
    return packed
