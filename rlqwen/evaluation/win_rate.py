"""Compare the rewards of two models on the same prompts. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rlqwen.types import Group

TOTAL = "total"
"""The weighted sum of all rewards, compared if there are several."""


@dataclass(frozen=True)
class WinRate:
    """The outcome of pairs under one reward: a pair is the i-th completions of both models for one prompt."""

    wins: int
    ties: int
    losses: int
    missing: int
    """Pairs without a value on one side or both; they are not counted elsewhere."""
    win_rate: float | None
    """(wins + ties / 2) / pairs; None if no pair has values."""
    interval: tuple[float, float] | None
    """Wilson's 95% interval, over prompts."""
    mean: float | None
    """Mean reward of the first model over the pairs that count."""
    against_mean: float | None
    """Mean reward of the second model over the same pairs."""


def win_rates(groups: Sequence[Group], others: Sequence[Group]) -> dict[str, WinRate]:
    """Return the win rate under each reward, and under their weighted total if there are several.

    `groups` and `others` are scored by the same rewards; prompts are paired by their index, and one that only one side
    has (because it is too long for the other's context, say) is left out.
    """
    theirs = {group.prompt.index: group for group in others}
    pairs = [(group, theirs[group.prompt.index]) for group in groups if group.prompt.index in theirs]
    names = list(groups[0].rewards)
    rates = {name: win_rate([(ours.rewards[name], other.rewards[name]) for ours, other in pairs]) for name in names}
    if len(names) > 1:
        rates[TOTAL] = win_rate([(ours.total_rewards_G, other.total_rewards_G) for ours, other in pairs])
    return rates


def win_rate(values_P: Sequence[tuple[Sequence[float | None], Sequence[float | None]]]) -> WinRate:
    """Return the win rate of the values of both sides for P prompts.

    The interval is Wilson's for as many independent trials as prompts have a pair, because pairs of one prompt are not
    independent. With ties or several samples the mean outcome of a prompt varies less than a single trial, so the
    interval is, if anything, too wide.
    """
    judged_P = [
        [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
        for ours, theirs in values_P
    ]
    judged = [pair for pairs in judged_P for pair in pairs]
    wins = sum(ours > theirs for ours, theirs in judged)
    ties = sum(ours == theirs for ours, theirs in judged)
    missing = sum(len(ours) for ours, _ in values_P) - len(judged)
    if not judged:
        return WinRate(0, 0, 0, missing, None, None, None, None)
    rate = (wins + ties / 2) / len(judged)
    return WinRate(
        wins=wins,
        ties=ties,
        losses=len(judged) - wins - ties,
        missing=missing,
        win_rate=rate,
        interval=wilson_interval(rate, sum(map(bool, judged_P))),
        mean=sum(ours for ours, _ in judged) / len(judged),
        against_mean=sum(theirs for _, theirs in judged) / len(judged),
    )


def wilson_interval(share: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z**2 / trials
    center = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(center - half, 0.0), min(center + half, 1.0)
