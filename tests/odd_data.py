"""Make data files that nobody would write: rows of odd values, and files with bytes changed at random, by seed."""

import io
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet

_USER = {"role": "user", "content": "1 + 1 = ?"}
_ANSWER = {"role": "assistant", "content": "2"}
ROWS: list[dict[str, Any]] = [
    {"messages": [_USER, _ANSWER]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [_USER], "chosen": [_ANSWER], "rejected": [{"role": "assistant", "content": "3"}]},
    {"prompt": "a", "completion": "b", "label": True},
    {"text": "a b c"},
    {"messages": [_USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]},
    {"messages": json.dumps([_USER, _ANSWER])},
]  # fmt: skip
"""Rows of every format."""
ODD: list[Any] = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\x1b[2J", "a" * 10_000, "[", "{", "[{",
    "[{'role': 'user'", '[{"role": "user", "content": 5}]', "[" * 5000, "{\"a\":" * 5000, "null", [], {}, [[]], [None], [{}], [1],
    ["a"], [["a", "b"]], {"role": "user"}, {"role": "x", "content": "y"}, {"content": ["a"]}, [{"role": "user", "content": None}],
    [{"role": None, "content": "a"}], [{"from": "gpt"}], [{"role": "assistant", "tool_calls": 5}], {"type": "image"},
    [{"role": "assistant", "content": [{"type": "text", "text": 1}]}], [{"role": "tool", "content": "a", "in_loss": "maybe"}],
]  # fmt: skip
"""Values to put in the place of any value."""
_JUNK = [
    b"",
    b"\xff",
    b"\x00",
    b"\xed\xa0\x80",
    b"\n",
    b'"',
    b",",
    b"[",
    b"{",
    b"}",
    b"[" * 3000,
    b"9" * 5000,
    b"\\ud800",
    b"\r",
    b"\xef\xbb\xbf",
]


def odd_row(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a row with up to three of its values, at any depth, replaced, added or left out."""
    row = json.loads(json.dumps(row))
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        holder, key = rng.choice(list(_places(row)) or [(row, "prompt")])
        if rng.random() < 0.75:
            holder[key] = json.loads(json.dumps(rng.choice(ODD)))
        elif isinstance(holder, dict) and rng.random() < 0.5:
            holder[rng.choice(["", "system", "tools", "label", "prompt", "chosen", "x"])] = json.loads(
                json.dumps(rng.choice(ODD))
            )
        else:
            holder.pop(key, None) if isinstance(holder, dict) else holder.pop(key)
    return row


def odd_file(rng: random.Random) -> tuple[str, bytes]:
    """Return the suffix and the content of a data file."""
    kind = rng.choice(ROWS)
    rows = [odd_row(rng, kind) for _ in range(rng.choice([1, 1, 2, 5]))]
    suffix = rng.choice([".jsonl", ".json", ".csv", ".parquet"])
    if suffix == ".parquet":
        content = _as_parquet(rows)
    elif suffix == ".csv":
        content = ("prompt,completion\n" + "\n".join(json.dumps(str(row)) + ",b" for row in rows)).encode(
            "utf-8", "surrogatepass"
        )
    else:
        texts = [json.dumps(row) for row in rows]
        content = ("\n".join(texts) if suffix == ".jsonl" else f"[{','.join(texts)}]").encode()
    for _ in range(rng.choice([0, 0, 1, 3])):
        start = rng.randrange(len(content) + 1)
        content = content[:start] + rng.choice(_JUNK) + content[start + rng.choice([0, 1, 1, 8]) :]
    return suffix, content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content


def _as_parquet(rows: list[dict[str, Any]]) -> bytes:
    """Write rows as a table, or as text if their types do not fit one."""
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError):
        out = io.BytesIO()
        pyarrow.parquet.write_table(
            pa.table({"prompt": [ascii(row) for row in rows], "completion": ["b"] * len(rows)}), out
        )
    return out.getvalue()


def _places(values: Any) -> Any:
    """Yield (container, key) of every value."""
    for key, inner in list(values.items() if isinstance(values, dict) else enumerate(values)):
        yield values, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
