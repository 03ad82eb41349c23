"""What rows hold that nothing reads: columns, and keys of turns. It is named, so that nothing is dropped in silence.

Whether a chat template reads a key of a turn is found by rendering a turn that has it and noting what is asked for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

from rlqwen.data.message_keys import LOSS_KEYS
from rlqwen.types import Message

Row = dict[str, Any]
Render = Callable[[list[Message]], object]
"""Writes a conversation by the chat template; what it gives back, or raises, is of no account."""

_READ_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls", "in_loss"})
_READ_CALL_KEYS = frozenset({"id", "type", "function"})
_READ_FUNCTION_KEYS = frozenset({"name", "arguments"})
_CALL = "tool_calls."
_FUNCTION = "tool_calls.function."


class UnusedColumns:
    """Counts rows by the columns, and by the keys of turns, that are filled in them and that nothing reads."""

    def __init__(self) -> None:
        self.columns: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        self._is_read: dict[tuple[str, str], bool] = {}
        """(role, key) -> whether the template reads it."""

    def record(
        self,
        row: Row,
        read: Collection[str],
        conversations: Iterable[list[Message]] = (),
        render: Render | None = None,
    ) -> None:
        """Count columns of a normalized row outside `read`, and keys of turns that the template does not read."""
        self.columns.update(name for name, value in row.items() if name not in read and value is not None)
        unread: set[str] = set()
        for messages in conversations:
            found = {(message["role"], key) for message in messages for key in _keys(message)}
            if not self._is_read.keys() >= found:
                asked = _keys_read(messages, render) if render else set()
                self._is_read |= {one: one in asked for one in found - self._is_read.keys()}
            unread.update(key for role, key in found if not self._is_read[role, key])
        self.keys.update(unread)

    def record_prompt(self, given: Row, row: Row, render: Render | None = None) -> None:
        """Count a normalized row and the `row` that `to_prompt_row` made of it, whose columns rewards may read."""
        has_solution = given.get("solution") is not None
        left: Row = {"completion": True} if has_solution and "completion" in given else {}
        if "prompt" in given:
            left |= {"messages": True} if "messages" in given else {}
        elif has_solution and given.get("messages", [{}])[-1].get("role") == "assistant":
            left["the last answer of messages"] = True
        prompt = row["prompt"]
        if isinstance(prompt, str):
            self.record(row | left, ("prompt",))
        else:
            self.record(row | left, ("prompt", "tools"), [prompt], render)

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return (columns, keys of turns) since the last call, each with its number of rows."""
        taken = dict(self.columns), dict(self.keys)
        self.columns, self.keys = Counter(), Counter()
        return taken


def unused_line(columns: Collection[str], keys: Collection[str]) -> str | None:
    """Return one line for users; None if everything is used."""
    parts = [
        f"{what} not used: {', '.join(map(str, names))}"
        for what, names in (("columns", columns), ("keys of turns", sorted(keys)))
        if names
    ]
    return "; ".join(parts) or None


def _keys(message: Message) -> set[str]:
    """Return the keys of a turn and of its calls that have no meaning of their own here."""
    keys = set(message) - _READ_KEYS
    for call in message.get("tool_calls") or ():
        keys.update(_CALL + key for key in call if key not in _READ_CALL_KEYS)
        keys.update(_FUNCTION + key for key in call["function"] if key not in _READ_FUNCTION_KEYS)
    return keys


def _keys_read(messages: list[Message], render: Render) -> set[tuple[str, str]]:
    """Return (role, key) of everything that a rendering of the turns reads, without marks of learned turns."""
    from jinja2 import TemplateError

    asked: set[tuple[str, str]] = set()
    watched: list[Row] = []
    for message in messages:
        turn = {key: value for key, value in message.items() if key not in LOSS_KEYS}
        if turn.get("tool_calls"):
            role = message["role"]
            turn["tool_calls"] = [
                _RecordingDict(
                    call | {"function": _RecordingDict(call["function"], role, _FUNCTION, asked)}, role, _CALL, asked
                )
                for call in turn["tool_calls"]
            ]
        watched.append(_RecordingDict(turn, message["role"], "", asked))
    with suppress(TemplateError, TypeError, ValueError):  # the row itself is written, or refused, elsewhere
        render(watched)
    return asked


class _RecordingDict(dict[str, Any]):
    """Dict that notes which of its keys are read."""

    def __init__(self, values: Row, role: str, prefix: str, asked: set[tuple[str, str]]) -> None:
        super().__init__(values)
        self._note: Callable[[object], None] = lambda key: asked.add((role, prefix + str(key)))

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self._note(key)
            yield key

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def items(self) -> Any:
        for key in super().__iter__():
            self._note(key)
        return super().items()
