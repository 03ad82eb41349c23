"""Find the right answers of rows, for metrics that compare texts."""

from typing import Any

from rlqwen.data.formats import to_prompt_row
from rlqwen.errors import DataError

Row = dict[str, Any]


def own_answer(row: Row, where: str) -> str | None:
    """Return the text of a normalized row's `completion`, or of a final assistant message; None if there is none."""
    answer = to_prompt_row({column: value for column, value in row.items() if column != "solution"}, where)
    return answer.get("solution")


def references_of(row: Row, column: str | None, where: str) -> list[str]:
    """Return the equally right answers of a normalized row, at least one.

    `column`: the column that holds them, or `completion` for the row's own answer. None: the first that exists of
    `solution`, the row's own answer, and `answer`. Raises DataError if there is none.
    """
    if column is None:
        prompt_row = to_prompt_row(row, where)
        value = prompt_row.get("solution", prompt_row.get("answer"))
    elif column == "completion":
        value = own_answer(row, where)
    else:
        value = row.get(column)
    texts = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
    if value is None or not any(text.strip() for text in texts):
        columns = "'solution', 'completion' or 'answer'" if column is None else repr(column)
        raise DataError(
            f"{where}: there is no right answer to compare with in column {columns}; the row has "
            f"{', '.join(map(str, row))}: name the column as the reference"
        )
    return texts
