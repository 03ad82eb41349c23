"""One form for the rows of many: ShareGPT and Alpaca become `messages`; prompts, completions and text stay.

A row after `normalise_row` has, beside its other columns, one of

    messages                 a list of {"role", "content"} turns (from `messages`, ShareGPT or Alpaca columns)
    prompt [, completion]    text, or messages
    text                     plain text

`to_prompt_row` turns any of the first two into what GRPO needs: a prompt, and a `solution` where an answer is known.
"""

import json
from typing import Any

from rlqwen.errors import DataError
from rlqwen.types import Message

Row = dict[str, Any]

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

_ALPACA = ("instruction", "input", "output", "history", "system")


def normalise_row(row: Row, where: str) -> Row:
    """The row in our form (see the module); a row that is in it already comes back equal.

    `where` begins the message of a DataError: unknown role, malformed turn, or no column that we know.
    """
    row = {column: value for column, value in row.items() if value is not None}
    if "messages" in row:
        row["messages"] = normalise_messages(row["messages"], where, "messages")
    elif "conversations" in row:
        turns = _from_sharegpt(row.pop("conversations"), where)
        row["messages"] = _with_system(turns, row.pop("system", None))
    elif "instruction" in row and "output" in row:
        row = {column: value for column, value in row.items() if column not in _ALPACA} | {
            "messages": _from_alpaca(row, where)
        }
    for column in ("prompt", "completion"):
        if column in row and not isinstance(row[column], str):
            row[column] = normalise_messages(row[column], where, column)
    if "tools" in row:
        row["tools"] = _parse_tools(row["tools"], where)
    return row


def normalise_messages(messages: Any, where: str, column: str) -> list[Message]:
    """Check a list of turns and bring each content to plain text; DataError says which turn is malformed."""
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: column {column!r} must be a list of turns, not {messages!r:.80}")
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            hint = ""
            if isinstance(message, dict) and "from" in message:
                hint = "; turns with 'from' and 'value' belong in a column named 'conversations'"
            raise DataError(f"{where}: turn {number} of {column!r} has no 'role': {message!r:.80}{hint}")
        turn = {key: value for key, value in message.items() if value is not None}
        turn["content"] = _plain_content(turn.get("content", ""), f"{where}: turn {number} of {column!r}")
        turns.append(turn)
    return turns


def add_system_prompt(row: Row, system_prompt: str, where: str) -> Row:
    """Begin the row's conversation with a system turn; text becomes a user turn. A row's own system turn stays."""
    if "messages" not in row and "prompt" not in row:
        raise DataError(f"{where}: system_prompt needs rows with messages or a prompt; this one has {_columns(row)}")
    row = dict(row)
    if "messages" in row:
        row["messages"] = _with_system(row["messages"], system_prompt)
    if "prompt" in row:
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["prompt"] = _with_system(row["prompt"], system_prompt)
        if isinstance(row.get("completion"), str):
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    return row


def to_prompt_row(row: Row, where: str) -> Row:
    """A normalised row as GRPO needs it: `prompt`, and every other column.

    Without a `prompt`, the prompt is `messages` up to its last assistant turn (all of them if it ends otherwise).
    The answer found there, or in `completion`, becomes `solution` unless the row has one. Raises DataError if there
    is no prompt to be found.
    """
    row = dict(row)
    answer: Any = row.pop("completion", None)
    if "prompt" in row:
        row.pop("messages", None)
    elif "messages" in row:
        messages = row.pop("messages")
        if messages[-1]["role"] == "assistant":
            *messages, answer = messages
        if not messages:
            raise DataError(f"{where}: 'messages' holds nothing but an answer, so there is no prompt")
        row["prompt"] = messages
    else:
        raise DataError(
            f"{where}: no prompt; rows need a column 'prompt', 'messages' or 'conversations', or 'instruction' and "
            f"'output'. This one has {_columns(row)}: map one with columns: {{prompt: ...}}"
        )
    if answer is not None and "solution" not in row:
        row["solution"] = _answer_text(answer)
    return row


def _from_sharegpt(conversations: Any, where: str) -> list[Message]:
    if not isinstance(conversations, list | tuple) or not conversations:
        raise DataError(f"{where}: 'conversations' must be a list of turns, not {conversations!r:.80}")
    turns: list[Message] = []
    for number, turn in enumerate(conversations):
        place = f"{where}: turn {number} of 'conversations'"
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            turn = {"from": turn["role"], "value": turn.get("content")}
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{place} must have 'from' and 'value' (text): {turn!r:.80}")
        role = turn.get("from")
        if role not in SHAREGPT_ROLES:
            raise DataError(f"{place} has the unknown role {role!r}; known roles: {', '.join(SHAREGPT_ROLES)}")
        if role == "function_call":
            turns.append({"role": "assistant", "content": "", "tool_calls": _parse_calls(turn["value"], place)})
        else:
            turns.append({"role": SHAREGPT_ROLES[role], "content": turn["value"]})
    return turns


def _from_alpaca(row: Row, where: str) -> list[Message]:
    """Instruction and input, a line break between them, are the user's turn; `history` holds earlier pairs."""
    turns: list[Message] = []
    for pair in row.get("history") or []:
        if len(pair) != 2:
            raise DataError(f"{where}: 'history' must hold pairs of instruction and answer, not {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(str(row[column]) for column in ("instruction", "input") if row.get(column))
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": str(row["output"])}]
    return _with_system(turns, row.get("system"))


def _with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


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


def _parse_calls(value: str, place: str) -> list[Row]:
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: a function_call must be JSON ({error.msg}): {value[:80]!r}") from None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise DataError(f"{place}: a function_call needs 'name' and 'arguments': {value[:80]!r}")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


def _parse_tools(tools: Any, where: str) -> Any:
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) if tools.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: column 'tools' is not valid JSON ({error.msg}): {tools[:80]!r}") from None


def _answer_text(answer: str | Message | list[Message]) -> str:
    if isinstance(answer, str):
        return answer
    turns = answer if isinstance(answer, list) else [answer]
    return str(turns[-1]["content"])


def _columns(row: Row) -> str:
    return f"columns {', '.join(map(str, row))}" if row else "no columns"
