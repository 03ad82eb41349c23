"""Ask workers how many of their completions have ended, because a long one keeps its group from coming back."""

from collections.abc import Iterable
from typing import Any

from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import ActorHandle


class ProgressReports(dict[Any, ActorHandle]):
    """Hold the reports that workers were asked for: Ray's reference -> the worker."""

    def ask(self, actors: Iterable[ActorHandle], count: int) -> None:
        """Ask every worker that owes no report to report once `count` more completions have ended."""
        for actor in actors:
            if actor.progress is None:
                actor.progress = actor.handle.progress.remote(count)
                self[actor.progress] = actor

    def receive(self, reference: Any) -> bool:
        """Count what a worker has ended; return whether `reference` is a report."""
        actor = self.pop(reference, None)
        if actor is None:
            return False
        answer = cluster.answer(reference)
        if actor.progress is reference:
            actor.progress = None
            # A worker that died is noticed by its groups.
            actor.num_reported += answer if isinstance(answer, int) else 0
        return True
