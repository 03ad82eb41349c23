"""Which of two models gets the higher rewards on the same prompts. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rlqwen.types import Group

TOTAL = "total"
"""The weighted sum of all rewards, compared where there are several."""


@dataclass(frozen=True)
class WinRate:
    """Pairs of completions judged by one reward: the i-th of one model and the i-th of the other to one prompt."""

    wins: int
    ties: int
    losses: int
    missing: int
    """Pairs with no value on one side or both; they count nowhere else."""
    win_rate: float | None
    """(wins + ties / 2) / pairs; None where no pair has values."""
    interval: tuple[float, float] | None
    """Of 95%: Wilson's, over prompts."""
    mean: float | None
    """Mean reward of the first model over the pairs that count."""
    against_mean: float | None
    """The other's."""


def win_rates(groups: Sequence[Group], others: Sequence[Group]) -> dict[str, WinRate]:
    """Of each reward, and of their weighted total where they are several.

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
    """Of the values of both sides to P prompts.

    The interval is Wilson's for as many independent trials as prompts have a pair: pairs of one prompt are not
    independent. Ties and several samples make a prompt's mean score less than all or nothing, hence vary less than a
    trial's outcome, so that the interval is, if anything, too wide.
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
    """Wilson's score interval of a share (Wilson 1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
