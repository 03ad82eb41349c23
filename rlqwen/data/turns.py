"""Turns of a conversation in one form: roles of the chat template, content as text, tool calls as objects."""

import json
from typing import Any

from rlqwen.errors import DataError
from rlqwen.types import Message

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Roles of ShareGPT data -> the chat template's."""

ALPACA_COLUMNS = ("instruction", "input", "output", "history", "system")

_FILLED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")


def normalise_messages(messages: Any, where: str, column: str) -> list[Message]:
    """Check a list of turns, bring each content to plain text and each tool call to OpenAI's form.

    DataError says which turn is malformed.
    """
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: column {column!r} must be a list of turns, not {messages!r:.80}")
    turns = []
    for number, message in enumerate(messages):
        place = f"{where}: turn {number} of {column!r}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            hint = ""
            if isinstance(message, dict) and "from" in message:
                hint = "; turns with 'from' and 'value' belong in a column named 'conversations'"
            raise DataError(f"{place} has no 'role': {message!r:.80}{hint}")
        turn = {key: value for key, value in message.items() if value is not None}
        turn["content"] = _plain_content(turn.get("content", ""), place)
        if "function_call" in turn:  # what `tool_calls` was before OpenAI renamed it, as `function` was `tool`
            turn["tool_calls"] = [turn.pop("function_call")]
        if turn["role"] == "function":
            turn["role"] = "tool"
        if "tool_calls" in turn:
            calls = _normalise_calls(turn.pop("tool_calls"), f"{place}, tool_calls")
            turn |= {"tool_calls": calls} if calls else {}
        turns.append(turn)
    return turns


def from_sharegpt(conversations: Any, where: str, column: str) -> list[Message]:
    """Turns of {"from", "value"}; DataError names the turn that is malformed or of an unknown role."""
    if isinstance(conversations, dict):
        conversations = [conversations]
    if not isinstance(conversations, list | tuple) or not conversations:
        raise DataError(f"{where}: {column!r} must be a list of turns, not {conversations!r:.80}")
    turns: list[Message] = []
    for number, turn in enumerate(conversations):
        place = f"{where}: turn {number} of {column!r}"
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            turn = {"from": turn["role"], "value": turn.get("content")}
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{place} must have 'from' and 'value' (text): {turn!r:.80}")
        role = turn.get("from")
        if role not in SHAREGPT_ROLES:
            raise DataError(f"{place} has the unknown role {role!r}; known roles: {', '.join(SHAREGPT_ROLES)}")
        if role == "function_call":
            calls = _normalise_calls(turn["value"], f"{place}, function_call")
            turns.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            turns.append({"role": SHAREGPT_ROLES[role], "content": turn["value"]})
    return turns


def from_alpaca(row: dict[str, Any], where: str) -> list[Message]:
    """Instruction and input, a line break between them, are the user's turn; `history` holds earlier pairs.

    The answer is `output`, where there is one.
    """
    turns: list[Message] = []
    for pair in row.get("history") or []:
        if len(pair) != 2:
            raise DataError(f"{where}: 'history' must hold pairs of instruction and answer, not {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(str(row[column]) for column in ("instruction", "input") if row.get(column))
    turns.append({"role": "user", "content": question})
    if "output" in row:
        turns.append({"role": "assistant", "content": str(row["output"])})
    return with_system(turns, row.get("system"))


def to_turns(content: str | list[Message], role: str) -> list[Message]:
    """Turns as they are; text as the one turn of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Begin with a system turn; one that is there already stays."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def normalise_tools(tools: Any, where: str) -> list[Any]:
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


def without_filling(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls by which Arrow gives each object the fields of all of them.

    In turns and tools only: a tool call of one argument would otherwise show the arguments of every other tool.
    """
    return {column: _without_nones(value) if column in _FILLED else value for column, value in row.items()}


def _plain_content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise DataError(f"{place}: content must be text; images and other parts are not supported: {content!r:.80}")


def _normalise_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object: a template would write a JSON string as a string of JSON."""
    calls = _parse_json(calls, place)
    normalised = []
    for call in [calls] if isinstance(calls, dict) else calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise DataError(f"{place}: a call needs 'name' and 'arguments': {call!r:.80}")
        arguments = _parse_json(function["arguments"], f"{place}, arguments of {function['name']!r}")
        if not isinstance(arguments, dict):
            raise DataError(f"{place}: arguments of {function['name']!r} must be an object: {arguments!r:.80}")
        rest = {key: value for key, value in call.items() if key == "id" and value is not None}
        normalised.append(rest | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return normalised


def _parse_json(value: Any, place: str) -> Any:
    """Text as the JSON that it holds; nothing, and empty text, as no fields."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value) if value.strip() else {}
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: must be JSON ({error.msg}): {value[:80]!r}") from None


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_without_nones(one) for one in value]
    return value
