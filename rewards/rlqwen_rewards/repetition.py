"""Penalize repeated n-grams of tokens (arXiv 2502.03373, appendix C.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Repetition:
    """Score `max_penalty` times the share of the completion's n-grams that are repeats; 0 without repeats.

    $R(y) = p (1 - unique / all)$ over the n-grams of token ids; 0 for completions of fewer than n tokens.
    """

    ngram_size: int = 3
    max_penalty: float = -1.0
    """p, at most 0."""

    __name__ = "repetition_penalty_reward"

    def __post_init__(self) -> None:
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size: must be at least 1 (value given: {self.ngram_size})")
        if self.max_penalty > 0:
            raise ValueError(f"max_penalty: must not be positive (value given: {self.max_penalty})")

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: list[int]) -> float:
        num_ngrams = len(ids) - self.ngram_size + 1
        if num_ngrams <= 0:
            return 0.0
        unique = {tuple(ids[start : start + self.ngram_size]) for start in range(num_ngrams)}
        return (1 - len(unique) / num_ngrams) * self.max_penalty if len(unique) < num_ngrams else 0.0


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """Construct the reward as TRL's function of this name does."""
    return Repetition(ngram_size, max_penalty)
