"""Normalize preference rows to `prompt`, `chosen` and `rejected`, either all as text or all as messages.

Supported formats, by columns:

    prompt, chosen, rejected           text or messages; the answers may repeat the prompt, as in UltraFeedback
    chosen, rejected                   whole conversations or texts, whose common prefix is the prompt
    chosen, rejected                   Anthropic HH: "\\n\\nHuman: ...\\n\\nAssistant: ...", converted to messages
    conversations, chosen, rejected    ShareGPT; also `messages` in place of `conversations`
    instruction, ..., chosen, rejected    Alpaca
    messages, rejected_response        ms-swift: the last message is the chosen answer
    messages, rejected_messages        ms-swift: two whole conversations
    query, response, rejected_response    ms-swift, optionally with `history`
    input, preferred_output, non_preferred_output    OpenAI
    prompt, completion, label          answers with a label; also `kto_tag`, messages or ShareGPT

`margin` is a number, or the difference between scores of both answers. All formats may have `tools`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from rlqwen.data.column_hints import format_column_map, suggest_mapping, unmapped_question
from rlqwen.data.messages import ALPACA_COLUMNS, from_alpaca, normalize_messages, to_messages
from rlqwen.data.plain_values import parse_messages
from rlqwen.errors import DataError, PromptMismatch
from rlqwen.types import Message

Row = dict[str, Any]
Content = str | list[Message]

SIDES = ("chosen", "rejected")

_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
SCORE_COLUMNS = frozenset(name for pair in _SCORES for name in pair)
_KNOWN = {"messages", "conversations", "prompt", "chosen", "instruction"}
"""Columns whose presence means that columns of ms-swift's older formats are ordinary columns of the data."""
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_HH = re.compile(r"\s*Human:")
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_pair(row: Row) -> bool:
    """Return whether a row has both answers."""
    return all(side in row for side in SIDES)


def is_labelled(row: Row) -> bool:
    """Return whether a normalized row is an answer with a label; other kinds of `label` are ordinary columns."""
    has_answer = "messages" in row or ("prompt" in row and "completion" in row)
    return has_answer and str(row.get("label")).lower() in _LABELS


def read_columns(row: Row, *, has_messages: bool, margin: bool) -> set[str]:
    """Return the columns that training reads from a normalized pair or labelled row; `margin`: whether it reads those."""
    if is_pair(row):
        read = {"prompt", *SIDES}
        scores = next((names for names in _SCORES if all(name in row for name in names)), None)
        if margin or scores:  # a margin computed from scores is not a column of the data
            read.add("margin")
        read.update((scores or ()) if margin else ())
    else:
        read = {"label"} | ({"prompt", "completion"} if "prompt" in row and "completion" in row else {"messages"})
    return read | ({"tools"} if has_messages else set())


def rename_columns(row: Row, where: str) -> Row:
    """Rename the columns of OpenAI, ms-swift and LLaMA-Factory to our names."""
    if "preferred_output" in row and "non_preferred_output" in row:
        given = row.pop("input", None)
        if not isinstance(given, dict) or "messages" not in given:
            raise DataError(f"{where}: 'input' beside 'preferred_output' must have 'messages': {given!r:.80}")
        row |= {"prompt": given["messages"]} | {key: given[key] for key in ("tools",) if given.get(key)}
        row |= {f"input.{key}": value for key, value in given.items() if key not in ("messages", "tools")}
        row |= {"chosen": row.pop("preferred_output"), "rejected": row.pop("non_preferred_output")}
    if "messages" in row and "rejected_response" in row:
        *prompt, chosen = normalize_messages(row.pop("messages"), where, "messages")
        row |= {"prompt": prompt, "chosen": [chosen], "rejected": row.pop("rejected_response")}
    if "messages" in row and "rejected_messages" in row:
        row |= {"chosen": row.pop("messages"), "rejected": row.pop("rejected_messages")}
    if "conversation" in row and _KNOWN.isdisjoint(row) and not isinstance(row["conversation"], str):
        row["conversations"] = row.pop("conversation")
    if "query" in row and "response" in row and _KNOWN.isdisjoint(row):
        answer = "chosen" if "rejected_response" in row else "output"
        row |= {"instruction": row.pop("query"), answer: row.pop("response")}
        row |= {"rejected": row.pop("rejected_response")} if answer == "chosen" else {}
    if "kto_tag" in row and "label" not in row:
        row["label"] = row.pop("kto_tag")
    return row


def normalize_pair(row: Row, where: str) -> Row:
    """Normalize a row with `chosen` and `rejected`, and add `margin` if the row has one or has scores.

    Raises DataError for missing or malformed answers, and for answers to different prompts.
    """
    row = dict(row)
    chosen, rejected = (_read(row[side], where, side) for side in SIDES)
    prompt = _take_prompt(row, where, chosen)
    if isinstance(row.get("prompt"), str) and isinstance(prompt, list):  # HH: the answer follows "Assistant: "
        chosen, rejected = (side.strip() if isinstance(side, str) else side for side in (chosen, rejected))
    if prompt is not None and all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        parts: tuple[Content, Content, Content] = prompt, chosen, rejected
    elif prompt is not None:
        parts = _match(
            to_messages(prompt, "user"), to_messages(chosen, "assistant"), to_messages(rejected, "assistant"), where
        )
    elif isinstance(chosen, str) and isinstance(rejected, str):
        _refuse_lost_prompt(row, where, chosen)
        parts = _split_texts(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[0]["role"] == "assistant":
            _refuse_lost_prompt(row, where, "")
        parts = _split_conversations(chosen, rejected, where)
    else:
        raise DataError(f"{where}: one of 'chosen' and 'rejected' is text and the other messages, and no 'prompt'")
    row |= dict(zip(("prompt", *SIDES), parts, strict=True))
    margin = _margin(row, where)
    return row if margin is None else row | {"margin": margin}


def to_pair_rows(row: Row, where: str) -> list[Row]:
    """Return one row per answer of a normalized pair (see `to_labelled_rows`); raise DataError for other rows."""
    if is_pair(row):
        return to_labelled_rows(row, where)
    missing = next(side for side in SIDES if side not in row)
    raise DataError(
        f"{where}: no {missing!r} answer; a preference row needs 'chosen' and 'rejected'. "
        f"This one has {', '.join(map(str, row)) or 'no columns'}: {suggest_mapping(row, 'preference')}"
    )


def to_labelled_rows(row: Row, where: str) -> list[Row]:
    """Return one row per answer with `prompt`, `completion`, `label`, `tools` and `margin`; a pair gives two.

    Without a `prompt`, the prompt is `messages` up to the last message, which must be the assistant's.
    """
    shared: dict[str, Any] = {key: row[key] for key in ("prompt", "tools", "margin") if key in row}
    if is_pair(row):
        return [shared | {"completion": row[side], "label": side == "chosen"} for side in SIDES]
    shared["label"] = _label(row, where)
    if "prompt" in row and "completion" in row:
        return [shared | {"completion": row["completion"]}]
    messages = row.get("messages", [])
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: no answer to label; rows need 'prompt', 'completion' and 'label', or messages that end in an "
            f"assistant message and 'label'. This one has {', '.join(map(str, row))}"
        )
    return [shared | {"prompt": messages[:-1], "completion": messages[-1:]}]


def _refuse_lost_prompt(row: Row, where: str, chosen: str) -> None:
    """Raise DataError if a prompt or system prompt of the answers is in a column that would not be read."""
    question = unmapped_question(row)
    if question is not None and row[question].strip() not in chosen:
        raise DataError(
            f"{where}: 'chosen' and 'rejected' are answers, and their question seems to be in the column "
            f"{question!r}, which is not mapped: {format_column_map({'prompt': question})}"
        )
    if any(row.get(name) for name in ("system", "system_prompt")):
        raise DataError(
            f"{where}: a system prompt needs a 'prompt', but the row has only the texts 'chosen' and 'rejected'"
        )


def _read(value: Any, where: str, column: str) -> Content:
    """Normalize an answer or a prompt; dialogues of Anthropic HH become messages."""
    value = parse_messages(value, where, column)
    if isinstance(value, str):
        return _from_hh(value) if _HH.match(value) and "\n\nAssistant:" in value else value
    return normalize_messages(value, where, column)


def _from_hh(text: str) -> list[Message]:
    parts = _HH_TURN.split(text)[1:]
    return [
        {"role": _HH_ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _take_prompt(row: Row, where: str, chosen: Content) -> Content | None:
    """Return the row's explicit prompt, and remove the columns that held it; None if there is none."""
    if "prompt" in row:
        prompt = _read(row["prompt"], where, "prompt")
        if isinstance(prompt, list) and prompt[-1] == {"role": "assistant", "content": ""}:
            prompt = prompt[:-1]  # an HH prompt ends in "\n\nAssistant:"
        return prompt
    if "conversations" in row:
        return normalize_messages(row.pop("conversations"), where, "conversations")
    if "instruction" in row:
        prompt = from_alpaca({key: row[key] for key in ALPACA_COLUMNS if key in row and key != "output"}, where)
        for column in set(ALPACA_COLUMNS) - {"output"}:
            row.pop(column, None)
        return prompt
    if "messages" in row and (isinstance(chosen, str) or chosen[0]["role"] == "assistant"):
        return normalize_messages(row.pop("messages"), where, "messages")
    return None


def _match(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return an explicit prompt and both answers without a repetition of the prompt."""
    if prompt[-1]["role"] == "assistant" and prompt[-1:] == chosen:
        prompt = prompt[:-1]  # the prompt column holds the whole conversation with the chosen answer
    answers = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)]
    if all(answer and answer[0]["role"] != "assistant" for answer in answers):
        # Whole conversations whose prompt has one system message more, or less, than the column.
        common, *answers = _split_conversations(chosen, rejected, where)
        long, short = (prompt, common) if len(prompt) > len(common) else (common, prompt)
        if _stripped(long[-len(short) :]) != _stripped(short):
            raise PromptMismatch(
                f"{where}: 'chosen' and 'rejected' begin with another prompt than 'prompt': "
                f"{common[-1]['content']!r:.80} and {prompt[-1]['content']!r:.80}"
            )
        prompt = long
    for side, answer in zip(SIDES, answers, strict=True):
        if not answer:
            raise DataError(f"{where}: {side!r} holds the prompt and no answer")
        if answer[0]["role"] != "assistant":
            raise PromptMismatch(
                f"{where}: {side!r} must be an answer to 'prompt', but it begins with a message of role "
                f"{answer[0]['role']!r}: {answer[0]['content']!r:.80}; are the prompts the same?"
            )
    return prompt, answers[0], answers[1]


def _split_conversations(
    chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two whole conversations into their common prefix, up to an assistant message, and the rest of each."""
    length = _num_common(chosen, rejected)
    if length == min(len(chosen), len(rejected)):  # one contains the other, so its last message must be an answer
        length -= 1
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        first = messages[length]
        if first["role"] != "assistant":
            raise PromptMismatch(
                f"{where}: the prompts of 'chosen' and 'rejected' differ: message {length} of {side!r} is the first that "
                f"is not common, and its role is {first['role']!r}: {first['content']!r:.80}"
            )
    if length == 0:
        raise DataError(f"{where}: 'chosen' and 'rejected' have no common beginning, and there is no 'prompt'")
    return chosen[:length], chosen[length:], rejected[length:]


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split texts after their common prefix, which ends before a space, because tokens begin with the space."""
    end = _num_common(chosen, rejected)
    end = max((match.start() for match in re.finditer(r"\s", chosen[:end])), default=0)
    return chosen[:end], chosen[end:], rejected[end:]


def _num_common(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _stripped(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _margin(row: Row, where: str) -> float | None:
    columns = [("margin",), *_SCORES]
    found = next((names for names in columns if all(name in row for name in names)), ())
    values = []
    for name in found:
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}: column {name!r} must be a finite number, not {row[name]!r:.80}")
        values.append(value)
    return values[0] - sum(values[1:]) if values else None


def _label(row: Row, where: str) -> bool:
    if "label" not in row:
        raise DataError(
            f"{where}: no 'label'; an answer needs one that says whether it is good (true) or bad (false). "
            f"This one has {', '.join(map(str, row)) or 'no columns'}: map one with columns: {{label: ...}}"
        )
    label = _LABELS.get(str(row["label"]).lower())
    if label is None:
        raise DataError(f"{where}: 'label' must be true or false, not {row['label']!r:.80}")
    return label
