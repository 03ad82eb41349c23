"""Work on the main rank alone, such as sampling, and let the other ranks help where it needs them.

A model with sharded weights can be forwarded or exported only by all ranks together. So the main rank works with a
policy that announces such a call before it makes it; the others wait for announcements, make the same calls, and
discard the results.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rlqwen.distributed.ranks import Ranks
from rlqwen.errors import MainRankFailed, RlqwenError
from rlqwen.packing.batch import PackedBatch

T = TypeVar("T")

_ANNOUNCE_ERROR_S = 10.0
"""Seconds to announce an error; the others may be in the middle of a common call, and not listen."""


class MainRank:
    """Run work on the main rank, and return its result on every rank; with one process, just run it.

    Example:
        main_rank = MainRank(ranks, policy)
        engine = build_engine(..., policy=main_rank.policy) if ranks.is_main else None
        texts = main_rank.run(lambda: sample(engine))     # on every rank
    """

    def __init__(self, ranks: Ranks, policy: Any = None) -> None:
        self.ranks = ranks
        self._policy = policy
        self.policy: Any = policy if ranks.world_size == 1 else _AnnouncedPolicy(policy, self._announce)
        """The policy for work on the main rank."""
        self.help_send: Callable[[Any, Iterator[tuple[str, Any]]], None] | None = None
        """What the other ranks do with their weights in `send_by_all_ranks`, given its task."""

    def run(self, work: Callable[[], T]) -> T:
        """Return on every rank what `work` returns on the main rank, which must pickle.

        An error of the main rank is raised there, and as MainRankFailed on the others.
        """
        if self.ranks.world_size == 1:
            return work()
        if not self.ranks.is_main:
            return self._follow()  # type: ignore[no-any-return]
        try:
            result = work()
        except BaseException as error:
            self.policy.finish()  # in this thread
            self._announce_error(error)
            raise
        self._announce("done", result)
        return result

    def _announce(self, what: str, value: Any = None) -> None:
        self.policy.finish()
        self.ranks.from_main((what, value), patient=True)

    def _announce_error(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        code = error.exit_code if isinstance(error, RlqwenError) else 1
        thread = threading.Thread(target=self._announce, args=("failed", (text, code)), daemon=True)
        thread.start()
        thread.join(_ANNOUNCE_ERROR_S)

    def _follow(self) -> Any:
        nothing: tuple[str, Any] = ("", None)
        while True:
            what, value = self.ranks.from_main(nothing, patient=True)
            if what == "done":
                return value
            if what == "failed":
                failure = MainRankFailed(f"rank {self.ranks.rank} stops, because the main rank failed: {value[0]}")
                failure.exit_code = value[1]
                raise failure
            self._take_part(what, value)

    def _take_part(self, what: str, value: Any) -> None:
        if what in ("export_weights", "export_adapter"):
            for _ in getattr(self._policy, what)():
                pass
        elif what == "send":
            assert self.help_send is not None
            self.help_send(value, self._policy.export_weights())
        elif what == "logprobs":
            with self._policy.inference():
                self._policy.logprobs(value.to(self._policy.device))
        else:
            assert what == "generation_model", what
            with self._policy.generation_model():
                self.ranks.from_main(None, patient=True)


class _AnnouncedPolicy:
    """Wrap a policy so that it announces calls in which all ranks take part."""

    def __init__(self, policy: Any, announce: Callable[..., None]) -> None:
        self._policy = policy
        self._announce = announce
        self._export_in_progress: Iterator[Any] = iter(())

    def finish(self) -> None:
        """Finish an export that its reader has left, because the other ranks are still making it."""
        for _ in self._export_in_progress:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def export_weights(self) -> Iterator[tuple[str, Any]]:
        return self._export("export_weights")

    def export_adapter(self) -> Iterator[tuple[str, Any]]:
        return self._export("export_adapter")

    def send_by_all_ranks(self, task: Any, send: Callable[[Iterator[tuple[str, Any]]], None]) -> None:
        """Have each rank send its weights: this one by `send`, the others by `MainRank.help_send`, which get `task`."""
        self._announce("send", task)
        send(self._policy.export_weights())

    def _export(self, name: str) -> Iterator[tuple[str, Any]]:
        self._announce(name)
        self._export_in_progress = getattr(self._policy, name)()
        for item in self._export_in_progress:  # noqa: UP028  `yield from` would close it with this generator
            yield item

    def logprobs(self, batch: PackedBatch, **options: Any) -> Any:
        self._announce("logprobs", batch.to("cpu"))
        return self._policy.logprobs(batch, **options)

    @contextmanager
    def generation_model(self) -> Iterator[Any]:
        self._announce("generation_model")
        with self._policy.generation_model() as model:
            try:
                yield model
            finally:
                self._announce("generated")
