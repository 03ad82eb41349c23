"""Normalize messages: roles of the chat template, content as text, tool calls as objects.

A message after `normalize_messages` has `role` and `content`. It may have `tool_calls` (in OpenAI's format, with the
arguments as an object), `reasoning_content` (thoughts, also from `reasoning` and `thinking`) and `in_loss: False`, which
excludes it from the loss. Other keys are kept for the chat template; rlqwen.data.unused_columns lists those that the
template does not read.
"""

import json
from typing import Any

from rlqwen.data.media import refuse_message_media
from rlqwen.data.message_keys import LOSS_KEYS, ROLES, THOUGHT_KEYS
from rlqwen.data.plain_values import parse_messages, plain_value
from rlqwen.errors import DataError
from rlqwen.types import Message

ALPACA_COLUMNS = ("instruction", "input", "output", "history")

_CALL_ROLES = ("function_call", "tool_call")
_SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def normalize_messages(messages: Any, where: str, column: str) -> list[Message]:
    """Normalize messages (see the module) in the format of OpenAI or ShareGPT, given as objects or as JSON text.

    Raises DataError with the number of the malformed message.
    """
    messages = parse_messages(messages, where, column)
    if isinstance(messages, str) and messages.lstrip().startswith(("[", "{")):
        messages = _parse_json(messages, f"{where}: column {column!r}")
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: column {column!r} must be a list of messages, not {messages!r:.80}")
    normalized: list[Message] = []
    for number, given in enumerate(messages):
        message, is_call = _normalize_message(given, f"{where}: message {number} of {column!r}", column)
        before = normalized[-1] if normalized else {}
        if is_call and before.get("role") == "assistant" and before.get("in_loss") == message.get("in_loss"):
            before.setdefault("tool_calls", []).extend(message["tool_calls"])  # lists of its own, see _normalize_calls
        else:
            normalized.append(message)
    return normalized


def from_alpaca(row: dict[str, Any], where: str) -> list[Message]:
    """Convert Alpaca columns to messages: instruction and input are joined by a line break into the user's message.

    `history` holds earlier pairs of instruction and answer, or messages. `output`, if given, is the answer.
    """
    messages: list[Message] = []
    history = parse_messages(row.get("history") or [], where, "history")
    if isinstance(history, str):
        history = _parse_json(history, f"{where}: column 'history'")
    if not isinstance(history, list | tuple):
        raise DataError(f"{where}: 'history' must be a list of pairs of instruction and answer, not {history!r:.80}")
    if history and isinstance(history[0], dict):
        messages += normalize_messages(history, where, "history")
        history = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{where}: 'history' must hold pairs of instruction and answer, not {pair!r:.80}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(as_text(row, column, where) for column in ("instruction", "input") if row.get(column))
    messages.append({"role": "user", "content": question})
    if "output" in row:
        messages.append({"role": "assistant", "content": as_text(row, "output", where)})
    return messages


def to_messages(content: str | list[Message], role: str) -> list[Message]:
    """Return messages unchanged, and text as a single message of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Prepend a system message unless there is one already."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def without_loss_marks(messages: Any) -> Any:
    """Return messages without the key `in_loss`, which only training reads; return text unchanged."""
    if not isinstance(messages, list) or not any("in_loss" in message for message in messages):
        return messages
    return [{key: value for key, value in message.items() if key != "in_loss"} for message in messages]


def normalize_tools(tools: Any, where: str) -> list[Any]:
    """Convert tools to OpenAI's format, which serving gives to the template: {"type": "function", "function": {...}}."""
    if isinstance(tools, str):
        try:
            tools = plain_value(json.loads(tools), where, "tools") if tools.strip() else []
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: column 'tools' is not valid JSON ({error}): {tools[:80]!r}") from None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: column 'tools' must be a list of function descriptions, not {tools!r:.80}")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _normalize_message(given: Any, where: str, column: str) -> tuple[Message, bool]:
    """Return a normalized message, and whether it is a call that belongs to the assistant message before it."""
    message = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if "role" not in message and "from" in message:
        if column == "messages":
            raise DataError(
                f"{where} has no 'role': {given!r:.80}; messages with 'from' and 'value' belong in a column named "
                "'conversations'"
            )
        role = message.pop("from")
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{where} has the unknown role {role!r:.80}; known roles: {', '.join(ROLES)}")
        if "value" not in message and "content" not in message:
            raise DataError(f"{where} must have 'from' and 'value' (text): {given!r:.80}")
        message["role"] = role
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where} has no 'role': {given!r:.80}")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    refuse_message_media(message, where)
    message["content"] = _plain_content(message.get("content", ""), where)
    is_call = message["role"] in _CALL_ROLES
    if is_call:
        message["tool_calls"], message["content"] = message["content"], ""
    elif "function_call" in message:  # OpenAI's older name of `tool_calls`
        message["tool_calls"] = [message.pop("function_call")]
    if "tool_calls" in message:
        name = message["role"] if is_call else "tool_calls"
        calls = _normalize_calls(message.pop("tool_calls"), f"{where}, {name}")
        message |= {"tool_calls": calls} if calls else {}
    message["role"] = ROLES.get(message["role"], message["role"])
    _join_thoughts(message, where)
    _normalize_loss_key(message, where)
    return message, is_call


def _join_thoughts(message: Message, where: str) -> None:
    """Move thoughts to `reasoning_content`, in place."""
    found = {key: message[key] for key in THOUGHT_KEYS if isinstance(message.get(key), str)}
    texts = {text for text in found.values() if text}
    if len(texts) > 1:
        raise DataError(f"{where} has different thoughts under {' and '.join(map(repr, found))}; leave one of them out")
    for key in found:
        del message[key]
    if texts:
        message["reasoning_content"] = texts.pop()


def _normalize_loss_key(message: Message, where: str) -> None:
    """Replace any key that excludes a message from the loss by `in_loss: False`, in place.

    A key that includes a message of another role than the assistant's is kept, and reported as not used.
    """
    is_answer = message["role"] == "assistant"
    for key in LOSS_KEYS:
        if key not in message:
            continue
        learned = _SWITCHES.get(str(message[key]).lower())
        if learned is None and is_answer:
            raise DataError(
                f"{where}: {key!r} must be 0 or 1, false or true, not {message[key]!r:.80}: "
                "a message is in the loss with weight 1 or not at all"
            )
        if learned is False or is_answer:
            del message[key]
        if learned is False:
            message["in_loss"] = False


def as_text(row: dict[str, Any], column: str, where: str) -> str:
    """Return a column's text, or its number as text; raise DataError for a list or an object."""
    if isinstance(row[column], dict | list | tuple):
        raise DataError(f"{where}: column {column!r} must be text, not {row[column]!r:.80}")
    return str(row[column])


def _plain_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise DataError(f"{where}: content must be text, or parts of type 'text': {content!r:.80}")


def _normalize_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, because a template would quote JSON text a second time."""
    calls = _parse_json(calls, where)
    if not isinstance(calls, dict | list | tuple):
        raise DataError(f"{where}: calls must be a list of objects, not {calls!r:.80}")
    normalized = []
    for call in [calls] if isinstance(calls, dict) else calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise DataError(f"{where}: a call needs 'name' and 'arguments': {call!r:.80}")
        name = function["name"]
        arguments = _parse_json(function["arguments"], f"{where}, arguments of {name!r}")
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: arguments of {name!r} must be an object: {arguments!r:.80}")
        rest = {
            key: one for key, one in call.items() if key not in ("function", "name", "arguments") and one is not None
        }
        more = function if "function" in call else {}
        function = {key: one for key, one in more.items() if one is not None} | {"arguments": arguments}
        normalized.append(rest | {"type": "function", "function": {"name": name} | function})
    return normalized


def _parse_json(value: Any, where: str) -> Any:
    """Parse JSON text; return an empty object for None and for empty text, and other values unchanged."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return plain_value(json.loads(value), where, "") if value.strip() else {}
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: must be JSON ({error}): {value[:80]!r}") from None
