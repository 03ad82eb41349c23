"""Hand out groups to the workers of a pool as they have room, and take back those of a worker that dies.

Groups that are to repeat to the bit are handed out in fixed shares instead, once all workers are idle.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError, WorkerDied
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import ActorHandle, InFlightRequest
from rlqwen.rollout.progress_reports import ProgressReports
from rlqwen.rollout.weight_sync import WeightBundle
from rlqwen.rollout.worker_protocol import GroupJob, Share
from rlqwen.types import GroupRequest, Prompt

GENERATE_KEY = "rollout.generate_timeout"
OVERCOMMIT = 1.5
"""Completions handed to a worker, as a multiple of what it decodes at a time: when a short completion ends, its place is
filled from the worker's own queue, without waiting for the pool."""
REPORTS = 4
"""Reports of a worker per `max_num_seqs` completions that end, because a long one keeps its group from coming back."""
MAX_SHARE = 512
"""Groups per share: each is a call that waits in its actor, and Ray allows 1000 of these."""


class GroupDispatch:
    """Hold the groups of a pool that no worker has, and those that workers are sampling."""

    def __init__(self, config: RolloutConfig, actors: Sequence[ActorHandle]) -> None:
        """Start without groups; `actors`: those of the pool, which replaces dead ones in place."""
        self._config, self._actors = config, actors
        self.in_flight: dict[Any, InFlightRequest] = {}
        """Ray's reference of the answer -> the group."""
        self.progress = ProgressReports()
        self._pending: deque[GroupRequest] = deque()
        """Groups that no worker has."""
        self._num_shares = 0

    def add(self, requests: Iterable[GroupRequest]) -> None:
        """Add groups to be handed out."""
        self._pending.extend(requests)

    def hand_out(self, bundle: WeightBundle | None) -> None:
        """Give the next groups to the workers that have the least to do, while they have room.

        `bundle`: the pool's weights; a worker that holds others gets nothing.
        """
        settled = [actor for actor in self._actors if actor.waiting is None and actor.bundle is bundle]
        if self._config.deterministic or self._config.worker_count == 1:
            if not self.in_flight and len(settled) == len(self._actors):
                self._hand_out_shares()
            return
        pending = self._pending
        room = OVERCOMMIT * self._config.max_num_seqs
        while pending and settled:
            actor = min(settled, key=lambda actor: actor.num_running)
            count = len(pending[0].seeds)
            if actor.num_running and actor.num_running + count > room:
                break
            self._hand(actor, pending.popleft())
        if pending:
            self.progress.ask(settled, max(1, self._config.max_num_seqs // REPORTS))

    def _hand_out_shares(self) -> None:
        """Give each worker its share of the next groups."""
        pending, count = self._pending, len(self._actors)
        block = [pending.popleft() for _ in range(min(len(pending), MAX_SHARE * count))]
        for actor in self._actors:
            own = block[actor.index :: count]
            self._num_shares += 1
            share = Share(self._num_shares, len(own))
            for place, request in enumerate(own):
                self._hand(actor, request, share, place)

    def _hand(self, actor: ActorHandle, request: GroupRequest, share: Share | None = None, place: int = 0) -> None:
        job = GroupJob(list(request.prompt.token_ids), request.seeds, request.sampling, share, place)
        deadline = time.monotonic() + self._config.generate_timeout
        self.in_flight[actor.handle.sample.remote(job)] = InFlightRequest(actor, request, deadline)
        actor.num_handed += len(request.seeds)

    def collect(self, reference: Any) -> tuple[Prompt, Any]:
        """Return the prompt and the worker's answer behind `reference`, which is there.

        Raises WorkerDied if the worker died, with the group still in flight, and any other error of the worker.
        """
        flight = self.in_flight[reference]
        answer = cluster.answer(reference)
        if isinstance(answer, WorkerDied):
            raise answer
        del self.in_flight[reference]
        flight.actor.num_returned += len(flight.request.seeds)
        for other in self.in_flight.values():
            if other.actor is flight.actor:
                other.deadline = time.monotonic() + self._config.generate_timeout
        if isinstance(answer, Exception):
            raise answer
        return flight.request.prompt, answer

    def take_back(self, actor: ActorHandle) -> None:
        """Make the groups of a worker pending again, before the others."""
        lost = [reference for reference, flight in self.in_flight.items() if flight.actor is actor]
        self._pending.extendleft([self.in_flight.pop(reference).request for reference in reversed(lost)])

    def late(self, now: float) -> list[ActorHandle]:
        """Return the workers with a group whose deadline has passed."""
        return [flight.actor for flight in self.in_flight.values() if flight.deadline <= now]

    def extend_deadlines(self, seconds: float) -> None:
        """Allow the groups in flight more time, such as that in which their workers took weights."""
        for flight in self.in_flight.values():
            flight.deadline += seconds

    def drop(self) -> None:
        """Drop every group, and tell the workers that have some."""
        for actor in {flight.actor for flight in self.in_flight.values()}:
            actor.handle.abort.remote()
            actor.progress = None  # the worker ends it
        for actor in self._actors:
            actor.forget_groups()
        self.forget()

    def forget(self) -> None:
        """Drop every group without telling the workers."""
        self.in_flight.clear()
        self._pending.clear()


def check_lengths(requests: Iterable[GroupRequest], limit: int) -> None:
    """Raise ConfigError if a prompt leaves no room for a completion in a context of `limit` tokens."""
    for request in requests:
        length = len(request.prompt.token_ids)
        if length >= limit:
            raise ConfigError(
                f"prompt {request.prompt.index} has {length} tokens, which leaves no room for a completion in the "
                f"engines' context of {limit}; raise rollout.max_model_length or set train.max_prompt_length"
            )
