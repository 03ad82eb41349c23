"""Reward short completions."""

from dataclasses import dataclass
from typing import Any

from rlqwen_rewards.answers import solutions_of


@dataclass(frozen=True)
class Length:
    """Score 1 up to `target` tokens, then less, falling linearly to 0 at `budget` tokens and beyond.

    Give it a small weight beside accuracy. With `only_correct`, a wrong completion gets 0 whatever its length. Without
    it, completions of a group that are all wrong differ only in length, so the model learns to be short, not correct.
    """

    budget: int
    """Number of tokens from which the reward is 0."""
    target: int = 0
    """Number of tokens up to which the reward is 1."""
    only_correct: bool = False
    """Whether to reward correct completions only; needs column `solution` or `answer`."""

    def __post_init__(self) -> None:
        if not 0 <= self.target < self.budget:
            raise ValueError(f"must hold: 0 <= target < budget (values given: {self.target} and {self.budget})")

    @property
    def required_columns(self) -> tuple[tuple[str, ...], ...]:
        return (("solution", "answer"),) if self.only_correct else ()

    def __call__(
        self,
        completions: list[Any],
        completion_ids: list[list[int]],
        solution: list[Any] | None = None,
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        rewards: list[float | None] = [self._reward(len(ids)) for ids in completion_ids]
        if not self.only_correct:
            return rewards
        from rlqwen_rewards.accuracy import Accuracy  # imported here, because it imports SymPy

        grades = Accuracy()(completions, solution=solutions_of("length", solution, answer), **columns)
        return [
            None if grade is None or reward is None else reward * grade
            for reward, grade in zip(rewards, grades, strict=True)
        ]

    def _reward(self, num_tokens: int) -> float:
        return min(1.0, max(0.0, (self.budget - num_tokens) / (self.budget - self.target)))
