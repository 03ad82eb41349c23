"""Find the rows that are part of the package, with which every kind of recipe can be tried without the hub.

A set has the columns of a well-known hub dataset, which it can replace: `data.train.path=builtin:questions`.
"""

import difflib
from pathlib import Path

from rlqwen.errors import DataError

PREFIX = "builtin:"
_FOLDER = Path(__file__).parent / "bundled_rows"


def bundled_file(path: str) -> Path:
    """Return the file of `builtin:NAME`; raise a DataError that lists the names for an unknown one.

    `questions`: `question`, `answer`, as openai/gsm8k. `instructions_zh`: `instruction`, `input`, `output`, as
    llamafactory/alpaca_zh. `pairs`: `chosen`, `rejected`, as trl-lib/ultrafeedback_binarized. 24 rows each.
    """
    name = path.removeprefix(PREFIX)
    names = sorted(file.stem for file in _FOLDER.glob("*.jsonl"))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{PREFIX}{near[0]}'? " if near else ""
        raise DataError(f"{path[:200]!r} is not a set of built-in rows; {hint}there are: {', '.join(names)}")
    return _FOLDER / f"{name}.jsonl"
