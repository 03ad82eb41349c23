"""The texts of a row, as the steps of cleaning look at them."""

import json
from typing import Any

from rlqwen.config.cleaning import Part

Row = dict[str, Any]

CONTENT = ("messages", "prompt", "completion", "text", "chosen", "rejected")
"""Columns with what the model reads or writes."""
TRAINED = (*CONTENT, "tools", "solution", "label")
"""All that decides what is learned from a row."""


def part_texts(row: Row, part: Part) -> list[str]:
    """Texts of a part of the row: a turn each, but an answer is one text; empty where the row has no such part."""
    if part == "prompt":
        return _turn_texts(_prompt(row))
    if part == "answer":
        return ["\n".join(_turn_texts(answer)) for answer in _answers(row)]
    return [text for column in CONTENT for text in _turn_texts(row.get(column))]


def question(row: Row) -> str | None:
    """What the row asks, without system turns; of plain text, all of it."""
    value = row["text"] if "text" in row else _without_system(_prompt(row))
    return "\n".join(_turn_texts(value)) or None


def compared_text(row: Row) -> str:
    """All turns but system turns, which rows share that are otherwise different."""
    columns = (_without_system(row.get(column)) for column in CONTENT)
    return "\n".join(text for column in columns for text in _turn_texts(column))


def identity(row: Row) -> str:
    """Equal for rows from which the same is learned; other columns don't count."""
    return canonical_json({column: row[column] for column in TRAINED if column in row})


def verdict(row: Row) -> str:
    """What makes rows of nearly the same text different after all: the solution of a sum, a label."""
    return canonical_json([row.get("solution"), row.get("label")])


def canonical_json(value: Any) -> str:
    """The same text for equal values; what JSON lacks (dates, bytes) is written as Python writes it."""
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


def _without_system(turns: Any) -> Any:
    if not isinstance(turns, list):
        return turns
    return [turn for turn in turns if turn.get("role") != "system"]


def _turn_texts(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for turn in value for text in _turn_texts(turn)]
    calls = json.dumps(value["tool_calls"], ensure_ascii=False, default=repr) if value.get("tool_calls") else ""
    pieces = (value.get("reasoning_content"), value.get("content"), calls)
    return ["\n".join(piece for piece in pieces if piece)]
