"""Extract the texts of a row that the steps of cleaning compare."""

import json
from typing import Any

from rlqwen.config.cleaning import Part

Row = dict[str, Any]

CONTENT = ("messages", "prompt", "completion", "text", "chosen", "rejected")
"""Columns with text that the model reads or writes."""
TRAINED = (*CONTENT, "tools", "solution", "label")
"""Columns that determine what is learned from a row."""


def part_texts(row: Row, part: Part) -> list[str]:
    """Return the texts of a part of the row: one per message, but one per answer; empty if the row lacks the part."""
    if part == "prompt":
        return _message_texts(_prompt(row))
    if part == "answer":
        return ["\n".join(_message_texts(answer)) for answer in _answers(row)]
    return [text for column in CONTENT for text in _message_texts(row.get(column))]


def question(row: Row) -> str | None:
    """Return the row's question without system messages; plain text is returned as a whole."""
    value = row["text"] if "text" in row else _without_system(_prompt(row))
    return "\n".join(_message_texts(value)) or None


def compared_text(row: Row) -> str:
    """Join all messages except system messages, because different rows may share those."""
    columns = (_without_system(row.get(column)) for column in CONTENT)
    return "\n".join(text for column in columns for text in _message_texts(column))


def identity(row: Row) -> str:
    """Return text that is equal for rows with the same trained columns."""
    return canonical_json({column: row[column] for column in TRAINED if column in row})


def verdict(row: Row) -> str:
    """Return the solution and label, which make rows with nearly the same text different."""
    return canonical_json([row.get("solution"), row.get("label")])


def canonical_json(value: Any) -> str:
    """Return the same text for equal values; values that JSON lacks (dates, bytes) are written as their repr."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr, separators=(",", ":"))


def _prompt(row: Row) -> Any:
    if "prompt" in row:
        return row["prompt"]
    messages: Any = row.get("messages")
    return messages[:-1] if _ends_in_answer(messages) else messages


def _answers(row: Row) -> list[Any]:
    answers = [row[column] for column in ("completion", "chosen", "rejected") if column in row]
    messages: Any = row.get("messages")
    if not answers and "prompt" not in row and _ends_in_answer(messages):
        return [messages[-1]]
    return answers


def _ends_in_answer(messages: Any) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


def _without_system(messages: Any) -> Any:
    if not isinstance(messages, list):
        return messages
    return [message for message in messages if message.get("role") != "system"]


def _message_texts(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for message in value for text in _message_texts(message)]
    calls = json.dumps(value["tool_calls"], ensure_ascii=False, default=repr) if value.get("tool_calls") else ""
    texts = (value.get("reasoning_content"), value.get("content"), calls)
    return ["\n".join(text for text in texts if text)]
