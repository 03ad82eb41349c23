"""Compute metrics of k sampled answers per prompt: mean, pass@k, majority@k. Pure functions.

Shapes: K samples of one prompt.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

from rlqwen.evaluation.metrics.answer_extraction import final_answer
from rlqwen.types import Completion, Group


@dataclass(frozen=True)
class RewardMetrics:
    """Metrics of one reward over all completions."""

    mean: float | None
    """Mean over the completions that have a value; None if none has."""
    missing: int
    """Completions without a value: timeout, error, or not applicable."""
    pass_at: dict[int, float] | None
    """j -> share of prompts with a right answer among j samples, unbiased; None unless every value is 0 or 1."""
    majority: float | None
    """Share of prompts whose most frequent answer is right; None unless every value is 0 or 1."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the chance that k samples drawn without replacement from `num_samples` hold a right one.

    1 - C(n - c, k) / C(n, k): unbiased (Chen et al. 2021, arXiv 2107.03374).
    """
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def majority_right(answers_K: Sequence[str], values_K: Sequence[float]) -> float:
    """Return the reward of the most frequent answer; of equally frequent ones, the first counts.

    Samples with equal answers may have different rewards, for their format, say: their mean is taken.
    """
    counts = Counter(answers_K)
    winner = max(counts, key=lambda answer: counts[answer])
    votes = [value for answer, value in zip(answers_K, values_K, strict=True) if answer == winner]
    return sum(votes) / len(votes)


def reward_metrics(groups: Sequence[Group], name: str) -> RewardMetrics:
    """Compute the metrics of one reward over scored groups.

    A completion without a value is left out of the mean; a prompt is left out of pass@j if it has fewer than j values,
    and of majority@k if it has none.
    """
    values = [value for group in groups for value in group.rewards[name] if value is not None]
    total = sum(len(group) for group in groups)
    mean = sum(values) / len(values) if values else None
    if not values or not {0.0, 1.0}.issuperset(values):
        return RewardMetrics(mean, total - len(values), None, None)
    scored = [list(_with_values(group, name)) for group in groups]
    num_samples = max(len(samples) for samples in scored)
    passes = {}
    for k in sample_counts(num_samples):
        counted = [samples for samples in scored if len(samples) >= k]
        chances = [pass_at_k(len(samples), int(sum(value for _, value in samples)), k) for samples in counted]
        passes[k] = sum(chances) / len(chances)
    votes = [
        majority_right([final_answer(completion.text) for completion, _ in samples], [value for _, value in samples])
        for samples in scored
        if samples
    ]
    return RewardMetrics(mean, total - len(values), passes, sum(votes) / len(votes))


def sample_counts(num_samples: int) -> list[int]:
    """Return the powers of two up to `num_samples`, and `num_samples` itself."""
    powers = [1 << exponent for exponent in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})


def _with_values(group: Group, name: str) -> Iterable[tuple[Completion, float]]:
    for completion, value in zip(group.completions, group.rewards[name], strict=True):
        if value is not None:
            yield completion, value
