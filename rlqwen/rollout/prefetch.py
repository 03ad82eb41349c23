"""Sample and score the rollout batches of coming steps while the trainer trains: off-policy, by a bounded lag.

With `rollout.max_staleness` k, the groups of step t are sampled with the weights that step t - 1 - k left (the first k + 1
steps: with the weights at the start of the run), whatever the timing. A batch is sampled to its end before workers get
other weights, so no group mixes two versions.
"""

import base64
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count as count_from
from itertools import takewhile
from typing import Any

import numpy as np

from rlqwen.data import find_prompts
from rlqwen.rewards import CallCounts, Scorer
from rlqwen.rollout import RolloutEngine
from rlqwen.types import Completion, Group, GroupRequest, Prompt

CANCEL_AGAIN = 1.0
"""Seconds after which a batch that was cancelled and is still being sampled is cancelled again."""


class RolloutBatch:
    """The groups of one step: sampled, scored as they arrive, and waited for."""

    def __init__(self, name: str, requests: Sequence[GroupRequest], scorer: Scorer, version: int) -> None:
        self.name = name
        self.version = version
        """Version of the weights that it is sampled from."""
        self.seconds = 0.0
        """Seconds that sampling took."""
        self.sampled_at: float | None = None
        """When sampling ended, perhaps with an error, on the monotonic clock; None: not yet."""
        self._requests = requests
        self._places = {id(request.prompt): place for place, request in enumerate(requests)}
        self._scorer = scorer
        self._batch = scorer.open_batch()
        self._arrived: dict[int, Group] = {}
        """Place of a request -> its group."""
        self._scored: dict[int, Group] = {}
        """Place of a request -> its group, scored and not taken yet."""
        self._num_taken = 0
        self._groups: list[Group] | None = None
        self._counts = CallCounts()

    def prompts_differ(self, prompts_P: Sequence[Prompt]) -> bool:
        """Return whether it was sampled for other rows, as happens when a rollback skips rows."""
        own = [request.prompt for request in self._requests] or [group.prompt for group in self.score()]
        return [prompt.index for prompt in own] != [prompt.index for prompt in prompts_P]

    def sample(self, engine: RolloutEngine) -> None:
        """Sample all groups, and submit each for scoring as it arrives; may run in any thread."""
        started = time.monotonic()
        try:
            for group in engine.generate(self._requests):
                self._arrived[self._places[id(group.prompt)]] = group
                self._scorer.submit(group, self._batch)
        finally:
            self.sampled_at = time.monotonic()
            self.seconds = self.sampled_at - started
            self._scorer.notify()

    def take(self, *, in_order: bool) -> list[Group]:
        """Return scored groups that were not taken yet, at least one; none once all are taken, or if sampling failed.

        `in_order`: in the order of the requests, so that a group waits for those before it; otherwise as they come. Runs
        in the trainer's thread, as some rewards must.
        """
        if self._groups is not None:
            left = self._groups[self._num_taken :]
            self._num_taken = len(self._groups)
            return left
        while self._num_taken + len(self._scored) < len(self._requests) or self._scored:
            places = list(self._scored)
            if in_order:
                places = list(takewhile(self._scored.__contains__, count_from(self._num_taken)))
            if places:
                self._num_taken += len(places)
                return [self._scored.pop(place) for place in places]
            arrived = self._scorer.take_scored(self._batch, is_complete=lambda: self.sampled_at is not None)
            if not arrived:
                break
            self._scored |= {self._places[id(group.prompt)]: group for group in arrived}
        return []

    def score(self) -> list[Group]:
        """Return the scored groups in the order of the requests; runs in the trainer's thread, as some rewards must."""
        if self._groups is None:
            self._scorer.wait(self._batch)
            # Groups arrive as they finish; training must not depend on that order.
            self._groups = [self._arrived[place] for place in range(len(self._requests))]
            self._counts = self._batch.counts
        return self._groups

    def count(self) -> None:
        """Add what became of the reward calls to the scorer's metrics."""
        self._scorer.add_counts(self._counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the scored batch as JSON values."""
        groups = [
            {
                "prompt": group.prompt.index,
                "completions": [[c.token_ids, c.logprobs, c.finish_reason, c.text] for c in group.completions],
                "version": group.policy_version,
                **_versions_state(group),
                **_experts_state(group),
                "rewards": group.rewards,
                "call_statuses": group.call_statuses,
                "totals": group.total_rewards_G,
                "extras": group.extras,
            }
            for group in self.score()
        ]
        return {"name": self.name, "version": self.version, "groups": groups, "counts": self._counts.state_dict()}

    @classmethod
    def from_state(
        cls, state: dict[str, Any], prompts: Sequence[Prompt], scorer: Scorer, start: int = 0
    ) -> "RolloutBatch":
        """Rebuild a batch from its `state_dict`.

        `prompts`: the training rows; `start`: the place of the batch's first row, if they are in the order of the batches.
        """
        batch = cls(state["name"], (), scorer, state["version"])
        batch.sampled_at = time.monotonic()
        found = find_prompts(prompts, [group["prompt"] for group in state["groups"]], start)
        batch._groups = [
            Group(
                prompt,
                _completions_from_state(group),
                group["version"],
                prompt_experts=array_from_state(group.get("prompt_experts")),
                rewards=group["rewards"],
                call_statuses=group["call_statuses"],
                total_rewards_G=group["totals"],
                extras=group["extras"],
            )
            for group, prompt in zip(state["groups"], found, strict=True)
        ]
        batch._counts.load_state_dict(state["counts"])
        return batch


class Prefetcher:
    """Sample the batches of coming steps, one after the other, in a thread of its own."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._batches: deque[tuple[RolloutBatch, Future[None]]] = deque()
        self._opened: list[Future[None]] = []
        """The batch that is being read while it is sampled."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-prefetch")

    def __contains__(self, name: str) -> bool:
        return any(batch.name == name for batch, _ in self._batches)

    def begin(self, batch: RolloutBatch) -> None:
        """Sample a batch as soon as those before it are sampled."""
        self._batches.append((batch, self._thread.submit(batch.sample, self._engine)))

    def collect(self, name: str) -> RolloutBatch | None:
        """Return the batch of that name once it is sampled; None if there is none. Batches before it are discarded."""
        while self._batches:
            batch, future = self._batches.popleft()
            future.result()
            if batch.name == name:
                return batch
        return None

    def open(self, batch: RolloutBatch) -> None:
        """Sample a batch that the trainer reads at the same time; `close_opened` ends that."""
        self._opened = [self._thread.submit(batch.sample, self._engine)]

    def open_begun(self, name: str) -> RolloutBatch | None:
        """Return the batch of that name, perhaps while it is being sampled; None if there is none. Those before it are
        discarded."""
        while self._batches:
            batch, future = self._batches.popleft()
            if batch.name == name:
                self._opened = [future]
                return batch
            future.result()
        return None

    def close_opened(self) -> None:
        """Wait until the opened batch is sampled; raise the error that ended its sampling, if one did."""
        while self._opened:
            self._opened.pop().result()

    def drain(self) -> None:
        """Wait until nothing is being sampled."""
        self.close_opened()
        for _, future in self._batches:
            future.result()

    def discard(self) -> None:
        """Discard all batches, and wait until none is being sampled, because two threads must not share the engine."""
        begun = [future for future in (*self._opened, *(one for _, one in self._batches)) if not future.cancel()]
        self._batches.clear()
        self._opened.clear()
        # Cancel again, because the first may come just before sampling begins.
        while wait(begun, timeout=0).not_done:
            self._engine.cancel()
            wait(begun, timeout=CANCEL_AGAIN)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of every batch, scored."""
        self.drain()
        return [batch.state_dict() for batch, _ in self._batches]

    def restore(self, batches: Sequence[RolloutBatch]) -> None:
        """Hold batches that are sampled already."""
        done: Future[None] = Future()
        done.set_result(None)
        self._batches = deque((batch, done) for batch in batches)

    def close(self) -> None:
        """Discard all batches and end the thread."""
        self.discard()
        self._thread.shutdown(wait=True, cancel_futures=True)


def _completions_from_state(state: dict[str, Any]) -> list[Completion]:
    """Return the completions of a group from its state."""
    missing = [None] * len(state["completions"])
    parts = zip(state["completions"], state.get("experts") or missing, state.get("versions") or missing, strict=True)
    return [
        Completion(
            ids, logprobs, reason, text, array_from_state(experts), versions and [tuple(span) for span in versions]
        )
        for (ids, logprobs, reason, text), experts, versions in parts
    ]


def _versions_state(group: Group) -> dict[str, Any]:
    """Return the versions that sampled each completion of a group as JSON values; nothing if they are all the group's."""
    versions = [completion.weight_versions for completion in group.completions]
    return {"versions": versions} if any(versions) else {}


def _experts_state(group: Group) -> dict[str, Any]:
    """Return the recorded experts of a group as JSON values; nothing if there are none."""
    if group.prompt_experts is None:
        return {}
    own = [array_state(completion.experts) for completion in group.completions]
    return {"experts": own, "prompt_experts": array_state(group.prompt_experts)}


def array_state(array: np.ndarray | None) -> list[Any] | None:
    """Return an array as JSON values: dtype, shape, and its bytes in base64."""
    if array is None:
        return None
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode("ascii")]


def array_from_state(state: list[Any] | None) -> np.ndarray | None:
    """Return the array that `array_state` encoded."""
    if state is None:
        return None
    dtype, shape, content = state
    return np.frombuffer(base64.b64decode(content), dtype=dtype).reshape(shape)
