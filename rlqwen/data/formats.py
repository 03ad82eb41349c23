"""One form for the rows of many: ShareGPT and Alpaca become `messages`; prompts, completions and text stay.

A row after `normalise_row` has, beside its other columns, one of

    messages                     a list of {"role", "content"} turns (from `messages`, ShareGPT or Alpaca columns)
    prompt [, completion]        text, or messages
    prompt, chosen, rejected     text, or messages (from any form in rlqwen.data.preference_formats)
    text                         plain text

`to_prompt_row` turns any of the first three into what GRPO needs: a prompt, and a `solution` where an answer is known;
rlqwen.data.preference_formats has the same for pairs and for labelled answers.
"""

from typing import Any

from rlqwen.data.preference_formats import is_pair, normalise_pair, rename_columns
from rlqwen.data.turns import (
    ALPACA_COLUMNS,
    from_alpaca,
    from_sharegpt,
    normalise_messages,
    normalise_tools,
    to_turns,
    with_system,
)
from rlqwen.errors import DataError
from rlqwen.types import Message

Row = dict[str, Any]


def normalise_row(row: Row, where: str) -> Row:
    """The row in our form (see the module); a row that is in it already comes back equal.

    `where` begins the message of a DataError: unknown role, malformed turn, or no column that we know.
    """
    for column, value in row.items():
        _refuse_surrogates(value, where, column)
    row = rename_columns({column: value for column, value in row.items() if value is not None}, where)
    if is_pair(row):
        row = normalise_pair(row, where)
    if "messages" in row:
        row["messages"] = normalise_messages(row["messages"], where, "messages")
    elif "conversations" in row:
        turns = from_sharegpt(row.pop("conversations"), where, "conversations")
        row["messages"] = with_system(turns, row.pop("system", None))
    elif "instruction" in row and "output" in row:
        row = {column: value for column, value in row.items() if column not in ALPACA_COLUMNS} | {
            "messages": from_alpaca(row, where)
        }
    for column in ("prompt", "completion"):
        if column in row and not isinstance(row[column], str):
            row[column] = normalise_messages(row[column], where, column)
    if "tools" in row:
        row["tools"] = normalise_tools(row["tools"], where)
    return row


def _refuse_surrogates(value: Any, where: str, column: str) -> None:
    """Half a surrogate pair, as a JSON escape can make it, is no character: no tokenizer and no file takes it."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: column {column!r} holds half a surrogate pair ({value[error.start]!r} at character "
                    f"{error.start}), which is no text; cut text between characters, or drop the row"
                ) from None
    elif isinstance(value, dict):
        for one in value.values():
            _refuse_surrogates(one, where, column)
    elif isinstance(value, list | tuple):
        for one in value:
            _refuse_surrogates(one, where, column)


def add_system_prompt(row: Row, system_prompt: str, where: str) -> Row:
    """Begin the row's conversation with a system turn; text becomes a user turn. A row's own system turn stays."""
    if "messages" not in row and "prompt" not in row:
        raise DataError(f"{where}: system_prompt needs rows with messages or a prompt; this one has {_columns(row)}")
    row = dict(row)
    if "messages" in row:
        row["messages"] = with_system(row["messages"], system_prompt)
    if "prompt" in row:
        row["prompt"] = with_system(to_turns(row["prompt"], "user"), system_prompt)
        for column in ("completion", "chosen", "rejected"):
            if isinstance(row.get(column), str):
                row[column] = to_turns(row[column], "assistant")
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


def _answer_text(answer: str | Message | list[Message]) -> str:
    if isinstance(answer, str):
        return answer
    turns = answer if isinstance(answer, list) else [answer]
    return str(turns[-1]["content"])


def _columns(row: Row) -> str:
    return f"columns {', '.join(map(str, row))}" if row else "no columns"
