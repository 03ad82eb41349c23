"""Penalize overlong completions gradually (DAPO, arXiv 2503.14476, equation 13)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SoftOverlong:
    """Score 0 up to `max_completion_len - soft_punish_cache` tokens, then less, linearly, to -1 at `max_completion_len`."""

    max_completion_len: int
    """L_max, in tokens, from which the score is -1."""
    soft_punish_cache: int
    """L_cache: number of tokens over which the score falls from 0 to -1."""

    __name__ = "soft_overlong_punishment_reward"

    def __post_init__(self) -> None:
        if not 0 <= self.soft_punish_cache <= self.max_completion_len:
            raise ValueError(
                f"must hold: 0 <= soft_punish_cache <= max_completion_len "
                f"(values given: {self.soft_punish_cache} and {self.max_completion_len})"
            )

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [self._punish(len(ids)) for ids in completion_ids]

    def _punish(self, num_tokens: int) -> float:
        excess = num_tokens - (self.max_completion_len - self.soft_punish_cache)
        if excess <= 0:
            return 0.0
        return -1.0 if excess >= self.soft_punish_cache else -excess / self.soft_punish_cache


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """Construct the reward as TRL's function of this name does."""
    return SoftOverlong(max_completion_len, soft_punish_cache)
