"""Make messages that resemble what a reward worker sends. Imports nothing that a worker lacks."""

import json
import random
from typing import Any

from rlqwen.rewards.worker_messages import HEADER

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 7, 10**30, "", "ok", "invalid", "error", "timeout", "x" * 700, "\ud800\x1b", [], [[]], {}, [None, None],
    ["ok", "ok"], [1.0, None], [[["m", 1.0]]], {"c": [1, 2]}, {"c": {"d": []}}, [["m", "n"]],
)  # fmt: skip
KINDS = ("started", "ready", "unsafe", "unloadable", "result", "failed", "", None, 3)


def odd_content(source: random.Random, number: int) -> bytes:
    content: list[Any] = [
        "result",
        number,
        [1.0, None],
        ["ok", "invalid"],
        [None, "why"],
        [["m", 1.0]],
        {"c": ["a", 1]},
    ]
    if source.random() < 0.3:
        content = ["failed", number, "error", "trace"]
    for _ in range(source.randint(0, 2)):
        place = source.randrange(len(content))
        content[place] = source.choice(KINDS if place == 0 else VALUES)
    if source.random() < 0.2:
        content = content[: source.randrange(len(content) + 1)] + source.choices(VALUES, k=source.randint(0, 2))
    text = json.dumps(content).encode()
    if source.random() < 0.3:
        start = source.randrange(len(text))
        text = text[:start] + source.randbytes(source.randint(0, 4)) + text[start + source.randint(0, 4) :]
    return source.choice([*[text] * 12, source.randbytes(20), b"[" * 5000, b"1e999", b"[" + b"9" * 5000 + b"]"])


def odd_message(source: random.Random, number: int) -> bytes:
    """Return bytes that resemble a reply to call `number`: a right one, one with odd values, or noise."""
    text = odd_content(source, number)
    size = source.choice([len(text)] * 20 + [0, 3, -1, 1 << 30, len(text) + 1])
    return HEADER.pack(size) + text
