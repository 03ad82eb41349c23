"""Reward each expected tag, for a smoother signal than an all-or-nothing format reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen_rewards.answers import texts_of


@dataclass(frozen=True)
class TagCount:
    """Score the share of `tags` that occur exactly once in the completion. A `<think>` at the end of the prompt counts."""

    tags: Sequence[str] = ("<think>", "</think>", "<answer>", "</answer>")

    def __post_init__(self) -> None:
        if isinstance(self.tags, str) or not self.tags:
            raise ValueError(f"tags: must be a list of at least one tag (value given: {self.tags!r})")

    def __call__(
        self,
        completions: list[Any],
        prompts: Sequence[Any] | None = None,
        prompt_opens_reasoning: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        texts = texts_of(completions, prompts, prompt_opens_reasoning)
        return [sum(text.count(tag) == 1 for tag in self.tags) / len(self.tags) for text in texts]
