"""Reward sums that are nearly right with partial credit, from a package of its own."""

import re
from typing import Any

_NUMBER = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")


def digits(completions: list[Any], solution: list[Any], scale: float = 1.0, **columns: Any) -> list[float]:
    """Score the share of the solution's digits that the boxed number has in their places, times `scale`; 0 if none is
    boxed."""
    return [scale * _share(_text(one), str(gold)) for one, gold in zip(completions, solution, strict=True)]


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _share(text: str, gold: str) -> float:
    found = _NUMBER.findall(text)
    if not found or not gold:
        return 0.0
    width = max(len(found[-1]), len(gold))
    number, gold = found[-1].rjust(width), gold.rjust(width)
    matches = sum(mine == theirs for mine, theirs in zip(number, gold, strict=True))
    return float(matches / width)
