"""Turns of a conversation in one form: roles of the chat template, content as text, tool calls as objects.

A turn after `normalize_messages` has `role`, `content`, and where it has them `tool_calls` (OpenAI's form, arguments as
an object), `reasoning_content` (thoughts, also from `reasoning` and `thinking`) and `in_loss: False`, which says that it
must not be learned. Other keys stay, for the chat template to read; rlqwen.data.unused_columns names those that it does not.
"""

import json
from typing import Any

from rlqwen.data.media import refuse_message_media
from rlqwen.data.message_keys import LOSS_KEYS, ROLES, THOUGHT_KEYS
from rlqwen.data.plain_values import parse_messages
from rlqwen.errors import DataError
from rlqwen.types import Message

ALPACA_COLUMNS = ("instruction", "input", "output", "history")

_CALL_ROLES = ("function_call", "tool_call")
_SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def normalize_messages(messages: Any, where: str, column: str) -> list[Message]:
    """Bring turns, OpenAI's or ShareGPT's, as objects or as JSON text, to our form (see the module).

    DataError says which turn is malformed.
    """
    messages = parse_messages(messages, where, column)
    if isinstance(messages, str) and messages.lstrip().startswith(("[", "{")):
        messages = _parse_json(messages, f"{where}: column {column!r}")  # says of which turn what is wrong
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: column {column!r} must be a list of turns, not {messages!r:.80}")
    turns: list[Message] = []
    for number, message in enumerate(messages):
        turn, is_call = _normalize_turn(message, f"{where}: turn {number} of {column!r}", column)
        before = turns[-1] if turns else {}
        if is_call and before.get("role") == "assistant" and before.get("in_loss") == turn.get("in_loss"):
            before["tool_calls"] = [*before.get("tool_calls", ()), *turn["tool_calls"]]
        else:
            turns.append(turn)
    return turns


def from_alpaca(row: dict[str, Any], where: str) -> list[Message]:
    """Join instruction and input by a line break into the user's turn; `history` holds earlier pairs, or turns.

    The answer is `output`, where there is one.
    """
    turns: list[Message] = []
    history = parse_messages(row.get("history") or [], where, "history")
    if isinstance(history, str):
        history = _parse_json(history, f"{where}: column 'history'")
    if history and isinstance(history[0], dict):
        turns += normalize_messages(history, where, "history")
        history = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{where}: 'history' must hold pairs of instruction and answer, not {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(as_text(row, column, where) for column in ("instruction", "input") if row.get(column))
    turns.append({"role": "user", "content": question})
    if "output" in row:
        turns.append({"role": "assistant", "content": as_text(row, "output", where)})
    return turns


def to_messages(content: str | list[Message], role: str) -> list[Message]:
    """Turns as they are; text as the one turn of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Begin with a system turn; one that is there already stays."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def without_loss_marks(messages: Any) -> Any:
    """Return turns without `in_loss`, which only training reads; text is returned unchanged."""
    if not isinstance(messages, list) or not any("in_loss" in turn for turn in messages):
        return messages
    return [{key: value for key, value in turn.items() if key != "in_loss"} for turn in messages]


def normalize_tools(tools: Any, where: str) -> list[Any]:
    """Tools as OpenAI has them and as serving hands them to the template: {"type": "function", "function": {...}}."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: column 'tools' is not valid JSON ({error.msg}): {tools[:80]!r}") from None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: column 'tools' must be a list of function descriptions, not {tools!r:.80}")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _normalize_turn(message: Any, place: str, column: str) -> tuple[Message, bool]:
    """Return the turn in our form, and whether it is a call that belongs to the assistant's turn before it."""
    turn = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "role" not in turn and "from" in turn:
        if column == "messages":
            raise DataError(
                f"{place} has no 'role': {message!r:.80}; turns with 'from' and 'value' belong in a column named "
                "'conversations'"
            )
        role = turn.pop("from")
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place} has the unknown role {role!r:.80}; known roles: {', '.join(ROLES)}")
        if "value" not in turn and "content" not in turn:
            raise DataError(f"{place} must have 'from' and 'value' (text): {message!r:.80}")
        turn["role"] = role
    if not isinstance(turn.get("role"), str):
        raise DataError(f"{place} has no 'role': {message!r:.80}")
    if "content" not in turn and "value" in turn:
        turn["content"] = turn.pop("value")
    refuse_message_media(turn, place)
    turn["content"] = _plain_content(turn.get("content", ""), place)
    is_call = turn["role"] in _CALL_ROLES
    if is_call:
        turn["tool_calls"], turn["content"] = turn["content"], ""
    elif "function_call" in turn:  # what `tool_calls` was before OpenAI renamed it
        turn["tool_calls"] = [turn.pop("function_call")]
    if "tool_calls" in turn:
        name = turn["role"] if is_call else "tool_calls"
        calls = _normalize_calls(turn.pop("tool_calls"), f"{place}, {name}")
        turn |= {"tool_calls": calls} if calls else {}
    turn["role"] = ROLES.get(turn["role"], turn["role"])
    _join_thoughts(turn, place)
    _mark_loss(turn, place)
    return turn, is_call


def _join_thoughts(turn: Message, place: str) -> None:
    """Move thoughts to `reasoning_content`, in place."""
    found = {key: turn[key] for key in THOUGHT_KEYS if isinstance(turn.get(key), str)}
    texts = {text for text in found.values() if text}
    if len(texts) > 1:
        raise DataError(f"{place} has different thoughts under {' and '.join(map(repr, found))}; leave one of them out")
    for key in found:
        del turn[key]
    if texts:
        turn["reasoning_content"] = texts.pop()


def _mark_loss(turn: Message, place: str) -> None:
    """Replace any mark that a turn must not be learned by `in_loss: False`, in place.

    A mark that a turn of another role is to be learned stays as it stands, and is named as not used.
    """
    is_answer = turn["role"] == "assistant"
    for key in LOSS_KEYS:
        if key not in turn:
            continue
        learned = _SWITCHES.get(str(turn[key]).lower())
        if learned is None and is_answer:
            raise DataError(
                f"{place}: {key!r} must be 0 or 1, false or true, not {turn[key]!r:.80}: a turn is learned or it is not"
            )
        if learned is False or is_answer:
            del turn[key]
        if learned is False:
            turn["in_loss"] = False


def as_text(row: dict[str, Any], column: str, where: str) -> str:
    """Return a column's text, or number as text; raise DataError for a list or an object, which is not text."""
    if isinstance(row[column], dict | list | tuple):
        raise DataError(f"{where}: column {column!r} must be text, not {row[column]!r:.80}")
    return str(row[column])


def _plain_content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise DataError(f"{place}: content must be text, or parts of type 'text': {content!r:.80}")


def _normalize_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object: a template would write a JSON string as a string of JSON."""
    calls = _parse_json(calls, place)
    normalized = []
    for call in [calls] if isinstance(calls, dict) else calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise DataError(f"{place}: a call needs 'name' and 'arguments': {call!r:.80}")
        name = function["name"]
        arguments = _parse_json(function["arguments"], f"{place}, arguments of {name!r}")
        if not isinstance(arguments, dict):
            raise DataError(f"{place}: arguments of {name!r} must be an object: {arguments!r:.80}")
        rest = {
            key: one for key, one in call.items() if key not in ("function", "name", "arguments") and one is not None
        }
        more = function if "function" in call else {}
        function = {key: one for key, one in more.items() if one is not None} | {"arguments": arguments}
        normalized.append(rest | {"type": "function", "function": {"name": name} | function})
    return normalized


def _parse_json(value: Any, place: str) -> Any:
    """Text as the JSON that it holds; nothing, and empty text, as no fields."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value) if value.strip() else {}
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: must be JSON ({error.msg}): {value[:80]!r}") from None
