"""Find columns and message keys that nothing reads, and report them, so that no data is dropped silently.

To find out whether a chat template reads a key of a message, a message with this key is rendered, and key accesses are
recorded.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

from rlqwen.data.message_keys import LOSS_KEYS
from rlqwen.types import Message

Row = dict[str, Any]
Render = Callable[[list[Message]], object]
"""Function that renders a conversation with the chat template; its result and its template errors are ignored."""

_READ_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls", "in_loss"})
_READ_CALL_KEYS = frozenset({"id", "type", "function"})
_READ_FUNCTION_KEYS = frozenset({"name", "arguments"})
_CALL = "tool_calls."
_FUNCTION = "tool_calls.function."


class UnusedColumns:
    """Count rows by their unused columns and message keys that hold a value."""

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
        """Count columns of a normalized row outside `read`, and message keys that the template does not read."""
        self.columns.update(name for name, value in row.items() if name not in read and value is not None)
        unread: set[str] = set()
        for messages in conversations:
            found = {(message["role"], key) for message in messages for key in _keys(message)}
            if not self._is_read.keys() >= found:
                read_keys = _keys_read(messages, render) if render else set()
                self._is_read |= {one: one in read_keys for one in found - self._is_read.keys()}
            unread.update(key for role, key in found if not self._is_read[role, key])
        self.keys.update(unread)

    def record_prompt(self, given: Row, row: Row, render: Render | None = None) -> None:
        """Count unused parts of a normalized row (`given`) and of its prompt row, whose columns rewards may read."""
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

    def pop_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return rows per unused column and per unused message key since the last call."""
        counts = dict(self.columns), dict(self.keys)
        self.columns, self.keys = Counter(), Counter()
        return counts


def unused_line(columns: Collection[str], keys: Collection[str]) -> str | None:
    """Describe unused columns and message keys in one line; return None if everything is used."""
    parts = [
        f"{what} not used: {', '.join(map(str, names))}"
        for what, names in (("columns", columns), ("message keys", sorted(keys)))
        if names
    ]
    return "; ".join(parts) or None


def _keys(message: Message) -> set[str]:
    """Return the keys of a message and of its tool calls that this package does not read itself."""
    keys = set(message) - _READ_KEYS
    for call in message.get("tool_calls") or ():
        keys.update(_CALL + key for key in call if key not in _READ_CALL_KEYS)
        keys.update(_FUNCTION + key for key in call["function"] if key not in _READ_FUNCTION_KEYS)
    return keys


def _keys_read(messages: list[Message], render: Render) -> set[tuple[str, str]]:
    """Return (role, key) for every message key that a rendering reads; keys of LOSS_KEYS are left out."""
    from jinja2 import TemplateError

    read_keys: set[tuple[str, str]] = set()
    recorded: list[Row] = []
    for message in messages:
        turn = {key: value for key, value in message.items() if key not in LOSS_KEYS}
        if turn.get("tool_calls"):
            role = message["role"]
            turn["tool_calls"] = [
                _RecordingDict(
                    call | {"function": _RecordingDict(call["function"], role, _FUNCTION, read_keys)},
                    role,
                    _CALL,
                    read_keys,
                )
                for call in turn["tool_calls"]
            ]
        recorded.append(_RecordingDict(turn, message["role"], "", read_keys))
    with suppress(TemplateError, TypeError, ValueError):  # errors of the row are raised when it is rendered itself
        render(recorded)
    return read_keys


class _RecordingDict(dict[str, Any]):
    """Record which keys of a dict are read."""

    def __init__(self, values: Row, role: str, prefix: str, read_keys: set[tuple[str, str]]) -> None:
        super().__init__(values)
        self._record: Callable[[object], None] = lambda key: read_keys.add((role, prefix + str(key)))

    def __getitem__(self, key: str) -> Any:
        self._record(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._record(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self._record(key)
            yield key

    def get(self, key: str, default: Any = None) -> Any:
        self._record(key)
        return super().get(key, default)

    def items(self) -> Any:
        for key in super().__iter__():
            self._record(key)
        return super().items()
