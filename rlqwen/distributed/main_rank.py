"""Work on the main rank alone, such as sampling, and let the other ranks help where it needs them.

A model with sharded weights can be forwarded or exported only by all ranks together. So the main rank works with a
policy that announces such a call before it makes it; the others wait for announcements, make the same calls, and
discard the results. Each method of the policy declares whether it is such a call; one that declares nothing is refused,
because the ranks would wait for each other for ever.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from rlqwen.distributed.ranks import Ranks
from rlqwen.errors import MainRankFailed, RlqwenError, RolloutError
from rlqwen.packing.batch import PackedBatch
from rlqwen.terminal import printable_lines

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])
Kind = Literal["forward", "stream", "context"]

_ANNOUNCE_ERROR_S = 10.0
"""Seconds to announce an error; the others may be in the middle of a common call, and not listen."""


def on_all_ranks(kind: Kind) -> Callable[[Method], Method]:
    """Declare that a method of a policy needs all ranks, and how the others take part when the main rank calls it.

    Args:
        kind: `forward`: it takes a batch, which the others forward without gradient. `stream`: it yields without arguments,
            and the others read it to its end. `context`: it is a context manager without arguments, which the others
            enter, and leave when the main rank does.
    """

    def mark(method: Method) -> Method:
        method.__dict__["called_on"] = kind
        return method

    return mark


def on_this_rank(method: Method) -> Method:
    """Declare that a method of a policy needs no other rank."""
    method.__dict__["called_on"] = "this rank"
    return method


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
            is_announced = self._announce_error(error)
            if isinstance(error, RolloutError):
                error.is_on_all_ranks = is_announced
            raise
        self._announce("done", result)
        return result

    def _announce(self, what: str, value: Any = None) -> None:
        self.policy.finish()
        self.ranks.from_main((what, value), patient=True)

    def _announce_error(self, error: BaseException) -> bool:
        """Return whether the other ranks have heard of it."""
        text = printable_lines(f"{type(error).__name__}: {error}")[0]
        code = error.exit_code if isinstance(error, RlqwenError) else 1
        thread = threading.Thread(
            target=self._announce, args=("failed", (text, code, isinstance(error, RolloutError))), daemon=True
        )
        thread.start()
        thread.join(_ANNOUNCE_ERROR_S)
        return not thread.is_alive()

    def _follow(self) -> Any:
        nothing: tuple[str, Any] = ("", None)
        while True:
            what, value = self.ranks.from_main(nothing, patient=True)
            if what == "done":
                return value
            if what == "failed":
                failure = MainRankFailed(f"rank {self.ranks.rank} stops, because the main rank failed: {value[0]}")
                failure.exit_code, failure.is_on_all_ranks = value[1:]
                raise failure
            self._take_part(what, value)

    def _take_part(self, what: str, value: Any) -> None:
        if what == "send":
            assert self.help_send is not None
            self.help_send(value, self._policy.export_weights())
            return
        name, batch = value
        method = getattr(self._policy, name)
        if what == "stream":
            for _ in method():
                pass
        elif what == "forward":
            with self._policy.inference():
                method(batch.to(self._policy.device))
        else:
            assert what == "context", what
            with method():
                self.ranks.from_main(None, patient=True)


class _AnnouncedPolicy:
    """Wrap a policy so that it announces calls in which all ranks take part, and refuses those that declare nothing."""

    def __init__(self, policy: Any, announce: Callable[..., None]) -> None:
        self._policy = policy
        self._announce = announce
        self._stream_in_progress: Iterator[Any] = iter(())

    def finish(self) -> None:
        """Read to its end a stream that its reader has left, because the other ranks are still reading it."""
        for _ in self._stream_in_progress:
            pass

    def __getattr__(self, name: str) -> Any:
        """Return a value as it is, and a method as it is declared; RuntimeError for a method or a module that is not.

        A property is a value: it may read the weights that this rank has, and not gather others.
        """
        called_on = getattr(getattr(type(self._policy), name, None), "called_on", None)
        if called_on in ("forward", "stream", "context"):
            return partial(getattr(self, f"_{called_on}"), name)
        value = getattr(self._policy, name)
        if callable(value) and called_on is None:
            raise RuntimeError(
                f"{type(self._policy).__name__}.{name} is used by the main rank alone, and does not declare whether it needs "
                "the other ranks, which would hang if it did: mark it with @on_all_ranks or @on_this_rank"
            )
        return value

    def send_by_all_ranks(self, task: Any, send: Callable[[Iterator[tuple[str, Any]]], None]) -> None:
        """Have each rank send its weights: this one by `send`, the others by `MainRank.help_send`, which get `task`."""
        self._announce("send", task)
        send(self._policy.export_weights())

    def _stream(self, name: str) -> Iterator[Any]:
        self._announce("stream", (name, None))
        self._stream_in_progress = getattr(self._policy, name)()
        for item in self._stream_in_progress:  # noqa: UP028  `yield from` would close it with this generator
            yield item

    def _forward(self, name: str, batch: PackedBatch, **options: Any) -> Any:
        self._announce("forward", (name, batch.to("cpu")))
        return getattr(self._policy, name)(batch, **options)

    @contextmanager
    def _context(self, name: str) -> Iterator[Any]:
        self._announce("context", (name, None))
        with getattr(self._policy, name)() as value:
            try:
                yield value
            finally:
                self._announce("left")
