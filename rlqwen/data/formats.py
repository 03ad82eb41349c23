"""Normalize rows of many formats: ShareGPT and Alpaca become `messages`; prompts, completions and text are kept.

A row after `normalize_row` has other columns and one of these groups:

    messages                     a list of {"role", "content"} objects (from `messages`, ShareGPT or Alpaca columns)
    prompt [, completion]        text or messages
    prompt, chosen, rejected     text or messages (from any format in rlqwen.data.preference_formats)
    text                         plain text

A column `system` or `system_prompt` becomes the first message. Unknown columns and message keys are kept;
rlqwen.data.unused_columns lists those that training does not read. `to_prompt_row` converts any of the first three
groups to what GRPO needs: a prompt, and a `solution` if the answer is known. rlqwen.data.preference_formats does the
same for pairs and for labelled answers.
"""

from typing import Any

from rlqwen.data.column_hints import format_column_map, prompt_map
from rlqwen.data.media import refuse_media
from rlqwen.data.messages import (
    ALPACA_COLUMNS,
    from_alpaca,
    normalize_messages,
    normalize_tools,
    to_messages,
    with_system,
    without_loss_marks,
)
from rlqwen.data.plain_values import parse_messages, plain_row
from rlqwen.data.preference_formats import SCORE_COLUMNS, is_pair, normalize_pair, rename_columns
from rlqwen.errors import DataError
from rlqwen.types import Message

Row = dict[str, Any]

FORM_COLUMNS = {
    *("messages", "conversations", "conversation", "prompt", "completion", "text", "system", "system_prompt", "tools"),
    *("solution", "label", "kto_tag", "margin", "query", "response", "chosen", "rejected", "rejected_response"),
    *("rejected_messages", "preferred_output", "non_preferred_output"),
    *ALPACA_COLUMNS,
    *SCORE_COLUMNS,
}
"""Columns that decide the format of a row: None in one of them means that the row does not have the column."""


def normalize_row(row: Row, where: str) -> Row:
    """Return the row in normalized form (see the module); a normalized row is returned unchanged.

    Missing values (rlqwen.data.plain_values) become None in unknown columns; known columns are removed. Raises
    DataError, which begins with `where`, for images, unknown roles and malformed messages.
    """
    refuse_media(row, where)
    row = plain_row(row, where)
    row = {column: value for column, value in row.items() if value is not None or column not in FORM_COLUMNS}
    row = rename_columns(row, where)
    if is_pair(row):
        row = normalize_pair(row, where)
    if "messages" in row:
        row["messages"] = normalize_messages(row["messages"], where, "messages")
    elif "conversations" in row:
        row["messages"] = normalize_messages(row.pop("conversations"), where, "conversations")
    elif "instruction" in row and "output" in row:
        row = {column: value for column, value in row.items() if column not in ALPACA_COLUMNS} | {
            "messages": from_alpaca(row, where)
        }
    for column in ("prompt", "completion"):
        if column in row:
            content = parse_messages(row[column], where, column)
            row[column] = content if isinstance(content, str) else normalize_messages(content, where, column)
    if "tools" in row:
        row["tools"] = normalize_tools(row["tools"], where)
    return _apply_system_column(row, where)


def _apply_system_column(row: Row, where: str) -> Row:
    """Prepend the system column to the messages; keep the column unused if it differs from their system message."""
    column = next((name for name in ("system", "system_prompt") if name in row), None)
    messages = row.get("prompt", row.get("messages"))
    if column is None or messages is None:
        return row
    system = row[column]
    if not isinstance(system, str):
        raise DataError(f"{where}: column {column!r} must be text, not {system!r:.80}")
    if not isinstance(messages, str) and messages[0]["role"] == "system":
        is_used = not system.strip() or system.strip() == messages[0]["content"].strip()
    else:
        row = add_system_prompt(row, system, where) if system.strip() else row
        is_used = True
    return {name: value for name, value in row.items() if name != column} if is_used else row


def add_system_prompt(row: Row, system_prompt: str, where: str) -> Row:
    """Prepend a system message unless the row has one; a text prompt becomes a user message.

    Raises DataError for rows without messages or prompt.
    """
    if "messages" not in row and "prompt" not in row:
        raise DataError(f"{where}: system_prompt needs rows with messages or a prompt; this one has {_columns(row)}")
    row = dict(row)
    if "messages" in row:
        row["messages"] = with_system(row["messages"], system_prompt)
    if "prompt" in row:
        row["prompt"] = with_system(to_messages(row["prompt"], "user"), system_prompt)
        for column in ("completion", "chosen", "rejected"):
            if isinstance(row.get(column), str):
                row[column] = to_messages(row[column], "assistant")
    return row


def to_prompt_row(row: Row, where: str) -> Row:
    """Return a normalized row as GRPO needs it: `prompt`, and every other column.

    Without a `prompt`, the prompt is `messages` without a final assistant message, or the question of Alpaca's columns.
    The answer found there, or in `completion`, becomes `solution` unless the row has one. Raises DataError if the row
    has no prompt.
    """
    row = dict(row)
    answer: Any = row.pop("completion", None)
    if "prompt" not in row and "messages" not in row and "instruction" in row:
        alpaca = {column: row.pop(column) for column in ALPACA_COLUMNS if column in row}
        row["messages"] = from_alpaca(alpaca, where)
        row = _apply_system_column(row, where)
    if "prompt" in row:
        row.pop("messages", None)
        row["prompt"] = without_loss_marks(row["prompt"])
    elif "messages" in row:
        messages = without_loss_marks(row.pop("messages"))
        if messages[-1]["role"] == "assistant":
            *messages, answer = messages
        if not messages:
            raise DataError(f"{where}: 'messages' holds only an answer, so there is no prompt")
        row["prompt"] = messages
    else:
        raise DataError(
            f"{where}: no prompt; rows need a column 'prompt', 'messages' or 'conversations', or 'instruction'. "
            f"This one has {_columns(row)}: map one with {format_column_map(prompt_map(row) or {'prompt': '...'})}"
        )
    if answer is not None and "solution" not in row:
        row["solution"] = _answer_text(answer)
    return row


def _answer_text(answer: str | Message | list[Message]) -> str:
    if isinstance(answer, str):
        return answer
    messages = answer if isinstance(answer, list) else [answer]
    return str(messages[-1]["content"])


def _columns(row: Row) -> str:
    return f"columns {', '.join(map(str, row))}" if row else "no columns"
