"""What the main rank does alone, such as sampling, and how the others take part where it takes all of them.

A model whose weights lie in shards runs, and gives its weights away, only if all ranks do it together. So the main
rank works with a policy that announces such a call before it makes it; the others wait for announcements, make the
same calls, and throw the results away.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rlqwen.distributed.ranks import Ranks
from rlqwen.errors import MainRankFailed, RlqwenError
from rlqwen.packing.batch import PackedBatch

T = TypeVar("T")

_SECONDS_TO_TELL = 10.0
"""The others may wait for something else, where the main rank failed in the midst of a common call."""


class MainRank:
    """Work of the main rank, for all; with one process, just that work.

    Example:
        lead = MainRank(ranks, policy)
        engine = build_engine(..., policy=lead.policy) if ranks.is_main else None
        texts = lead.run(lambda: sample(engine))     # on every rank
    """

    def __init__(self, ranks: Ranks, policy: Any = None) -> None:
        self.ranks = ranks
        self._policy = policy
        self.policy: Any = policy if ranks.world_size == 1 else _Announced(policy, self._tell)
        """For what samples on the main rank."""

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main rank, on every rank; it must pickle.

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
            self._tell_of(error)
            raise
        self._tell("done", result)
        return result

    def _tell(self, what: str, value: Any = None) -> None:
        self.policy.finish()
        self.ranks.from_main((what, value), patient=True)

    def _tell_of(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        code = error.exit_code if isinstance(error, RlqwenError) else 1
        thread = threading.Thread(target=self._tell, args=("failed", (text, code)), daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_TELL)

    def _follow(self) -> Any:
        nothing: tuple[str, Any] = ("", None)
        while True:
            what, value = self.ranks.from_main(nothing, patient=True)
            if what == "done":
                return value
            if what == "failed":
                failure = MainRankFailed(f"rank {self.ranks.rank} stops, because the main rank did: {value[0]}")
                failure.exit_code = value[1]
                raise failure
            self._take_part(what, value)

    def _take_part(self, what: str, value: Any) -> None:
        if what in ("export_weights", "export_adapter"):
            for _ in getattr(self._policy, what)():
                pass
        elif what == "logprobs":
            with self._policy.inference():
                self._policy.logprobs(value.to(self._policy.device))
        else:
            assert what == "generation_model", what
            with self._policy.generation_model():
                self.ranks.from_main(None, patient=True)


class _Announced:
    """A policy whose common calls are announced to the other ranks first."""

    def __init__(self, policy: Any, tell: Callable[..., None]) -> None:
        self._policy = policy
        self._tell = tell
        self._walk: Iterator[Any] = iter(())

    def finish(self) -> None:
        """Walk on to the end of weights that whoever asked for them left off: the others are on their way through."""
        for _ in self._walk:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def export_weights(self) -> Iterator[tuple[str, Any]]:
        return self._export("export_weights")

    def export_adapter(self) -> Iterator[tuple[str, Any]]:
        return self._export("export_adapter")

    def _export(self, name: str) -> Iterator[tuple[str, Any]]:
        self._tell(name)
        self._walk = getattr(self._policy, name)()
        for item in self._walk:  # noqa: UP028  `yield from` would close it with this generator
            yield item

    def logprobs(self, batch: PackedBatch, **options: Any) -> Any:
        self._tell("logprobs", batch.to("cpu"))
        return self._policy.logprobs(batch, **options)

    @contextmanager
    def generation_model(self) -> Iterator[Any]:
        self._tell("generation_model")
        with self._policy.generation_model() as model:
            try:
                yield model
            finally:
                self._tell("generated")
