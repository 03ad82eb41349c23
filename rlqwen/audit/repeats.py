"""What is in the data twice, and what of the evaluation is in the training data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen.data.duplicates import find_exact_duplicates, find_near_duplicates, find_near_matches
from rlqwen.data.sources import Row
from rlqwen.data.turns import to_turns

_TRAINED = ("messages", "prompt", "completion", "chosen", "rejected", "label", "tools")


@dataclass(frozen=True)
class Repeats:
    """Groups of rows, by their indices, that say the same; each group in order."""

    exact: list[list[int]]
    near: list[list[int]]
    """Nearly the same: of rows that are equal, only the first is compared."""


def find_repeats(rows: Sequence[Row], text_field: str, threshold: float | None) -> Repeats:
    """Rows that are equal in all that is trained on, and rows whose text, system turns aside, is near.

    `threshold`: see rlqwen.data.duplicates; None looks for equal rows only.
    """
    columns = (*_TRAINED, text_field)
    exact = find_exact_duplicates(
        [json.dumps({name: row[name] for name in columns if name in row}, sort_keys=True, default=str) for row in rows]
    )
    if threshold is None:
        return Repeats(exact, [])
    repeated = {number for group in exact for number in group[1:]}
    single = [number for number in range(len(rows)) if number not in repeated]
    near = find_near_duplicates([whole_text(rows[number], text_field) for number in single], threshold)
    return Repeats(exact, [[single[place] for place in group] for group in near])


def find_overlap(
    rows: Sequence[Row], others: Sequence[Row], text_field: str, threshold: float | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(exact, near): pairs (index in `rows`, index in `others`) of rows whose prompts are the same, or nearly.

    A plain text is its own prompt. A row that has an equal is not among the near.
    """
    prompts, known = ([prompt_text(row, text_field) for row in one] for one in (rows, others))
    first = {text: number for number, text in reversed(list(enumerate(known)))}
    exact = [(number, first[text]) for number, text in enumerate(prompts) if text in first]
    if threshold is None:
        return exact, []
    rest = [number for number, text in enumerate(prompts) if text not in first]
    near = find_near_matches([prompts[number] for number in rest], known, threshold)
    return exact, [(rest[place], other) for place, other in near]


def prompt_text(row: Row, text_field: str) -> str:
    """What is asked: the turns up to the last answer, without system turns."""
    if "prompt" in row:
        return _said(row["prompt"])
    if "messages" in row:
        messages = row["messages"]
        return _said(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    return str(row.get(text_field, ""))


def whole_text(row: Row, text_field: str) -> str:
    """All that is asked and answered, without system turns."""
    if "messages" in row and "prompt" not in row:
        return _said(row["messages"])
    answers = [_said(row[name]) for name in ("completion", "chosen", "rejected") if name in row]
    return "\n".join([prompt_text(row, text_field), *answers])


def _said(content: Any) -> str:
    """The texts of the turns, with what is called."""
    lines = []
    for turn in to_turns(content, "user"):
        if turn["role"] != "system":
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", [])]
            lines += [turn["content"], *calls]
    return "\n".join(lines)
