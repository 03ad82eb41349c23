"""Draws that are sampled and scored ahead of their step, while the trainer trains: off-policy, by a bounded lag.

With `rollout.max_staleness` k, the groups of step t are drawn with the weights that step t - 1 - k left (the first k + 1
steps: with those that the run began with), whatever the timing. A draw is sampled to its end before workers get other
weights, so no group mixes two versions.
"""

import base64
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from rlqwen.data import find_prompts
from rlqwen.rewards import CallCounts, Scorer
from rlqwen.rollout import RolloutEngine
from rlqwen.types import Completion, Group, GroupRequest, Prompt

CANCEL_AGAIN = 1.0
"""Seconds after which a draw that was cancelled, and goes on, is cancelled once more."""


def _plain_experts(group: Group) -> dict[str, Any]:
    """What `RolloutBatch.progress` holds of recorded experts; nothing where there are none."""
    if group.prompt_experts is None:
        return {}
    own = [plain_array(completion.experts) for completion in group.completions]
    return {"experts": own, "prompt_experts": plain_array(group.prompt_experts)}


def plain_array(array: np.ndarray | None) -> list[Any] | None:
    """Return an array as JSON can hold it: dtype, shape, and its bytes in base64."""
    if array is None:
        return None
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode("ascii")]


def array_of(plain: list[Any] | None) -> np.ndarray | None:
    """Return the array that `plain_array` wrote."""
    if plain is None:
        return None
    dtype, shape, content = plain
    return np.frombuffer(base64.b64decode(content), dtype=dtype).reshape(shape)


class RolloutBatch:
    """One step's groups on their way: sampled, scored as they arrive, and waited for."""

    def __init__(self, name: str, requests: Sequence[GroupRequest], scorer: Scorer, version: int) -> None:
        self.name = name
        self.version = version
        """Of the weights that it is sampled from."""
        self.seconds = 0.0
        """That sampling took."""
        self._requests = requests
        self._scorer = scorer
        self._batch = scorer.open_batch()
        self._arrived: dict[int, list[Group]] = {}
        self._groups: list[Group] | None = None
        self._counts = CallCounts()

    def prompts_differ(self, prompts_P: Sequence[Prompt]) -> bool:
        """Whether these are not the rows that it was drawn for, as after the data went on without it."""
        return [group.prompt.index for group in self.score()] != [prompt.index for prompt in prompts_P]

    def sample(self, engine: RolloutEngine) -> None:
        """Sample to the end, and begin to score; in any thread."""
        started = time.monotonic()
        for group in engine.generate(self._requests):
            self._scorer.submit(group, self._batch)
            self._arrived.setdefault(id(group.prompt), []).append(group)
        self.seconds = time.monotonic() - started

    def score(self) -> list[Group]:
        """The scored groups, in the order of the requests; in the trainer's thread, where some rewards are called."""
        if self._groups is None:
            self._scorer.wait(self._batch)
            # Groups come as they finish; training must not depend on that order.
            self._groups = [self._arrived[id(request.prompt)].pop() for request in self._requests]
            self._counts = self._batch.counts
        return self._groups

    def count(self) -> None:
        """Have the scorer's metrics tell of this draw."""
        self._scorer.add_counts(self._counts)

    def progress(self) -> dict[str, Any]:
        """The scored draw as JSON can hold it."""
        groups = [
            {
                "prompt": group.prompt.index,
                "completions": [[c.token_ids, c.logprobs, c.finish_reason, c.text] for c in group.completions],
                **_plain_experts(group),
                "rewards": group.rewards,
                "call_statuses": group.call_statuses,
                "totals": group.total_rewards_G,
                "extras": group.extras,
            }
            for group in self.score()
        ]
        return {"name": self.name, "version": self.version, "groups": groups, "counts": self._counts.state_dict()}

    @classmethod
    def restored(
        cls, progress: dict[str, Any], prompts: Sequence[Prompt], scorer: Scorer, start: int = 0
    ) -> "RolloutBatch":
        """Rebuild a draw from its `progress`; `prompts`: the training rows, and `start` the place of its own
        where they are in the order of the draws."""
        draw = cls(progress["name"], (), scorer, progress["version"])
        found = find_prompts(prompts, [group["prompt"] for group in progress["groups"]], start)
        draw._groups = [
            Group(
                prompt,
                [
                    Completion(token_ids, logprobs, reason, text, array_of(experts))
                    for (token_ids, logprobs, reason, text), experts in zip(
                        group["completions"], group.get("experts") or [None] * len(group["completions"]), strict=True
                    )
                ],
                draw.version,
                prompt_experts=array_of(group.get("prompt_experts")),
                rewards=group["rewards"],
                call_statuses=group["call_statuses"],
                total_rewards_G=group["totals"],
                extras=group["extras"],
            )
            for group, prompt in zip(progress["groups"], found, strict=True)
        ]
        draw._counts.load_state_dict(progress["counts"])
        return draw


class Prefetcher:
    """The draws of the coming steps, sampled one after the other in a thread of their own."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._draws: deque[tuple[RolloutBatch, Future[None]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-ahead")

    def __contains__(self, name: str) -> bool:
        return any(draw.name == name for draw, _ in self._draws)

    def begin(self, draw: RolloutBatch) -> None:
        """Sample it as soon as those before it are."""
        self._draws.append((draw, self._thread.submit(draw.sample, self._engine)))

    def take(self, name: str) -> RolloutBatch | None:
        """The draw of that name, sampled; None if there is none. Those before it are given up."""
        while self._draws:
            draw, future = self._draws.popleft()
            future.result()
            if draw.name == name:
                return draw
        return None

    def settle(self) -> None:
        """Return when nothing is being sampled."""
        for _, future in self._draws:
            future.result()

    def forget(self) -> None:
        """Give up all draws; returns when none is being sampled any more, for another thread's would meet it in the
        engine."""
        begun = [future for _, future in self._draws if not future.cancel()]
        self._draws.clear()
        # Asked again, for it may come just before sampling begins.
        while wait(begun, timeout=0).not_done:
            self._engine.cancel()
            wait(begun, timeout=CANCEL_AGAIN)

    def progress(self) -> list[dict[str, Any]]:
        """Every draw, scored."""
        self.settle()
        return [draw.progress() for draw, _ in self._draws]

    def restore(self, draws: Sequence[RolloutBatch]) -> None:
        """Take up draws that are sampled already."""
        done: Future[None] = Future()
        done.set_result(None)
        self._draws = deque((draw, done) for draw in draws)

    def close(self) -> None:
        """Give up all draws and end the thread."""
        self.forget()
        self._thread.shutdown(wait=True, cancel_futures=True)
