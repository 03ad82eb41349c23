"""Reward answers that equal the solution character by character."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlqwen_rewards.answers import final_text, given_solutions, marked_answer, solutions_of, texts_of

_PUNCTUATION = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class ExactMatch:
    """Score 1 if the final answer equals column `solution` (or `answer`) except for white space; 0 if not, None without one.

    On both sides the answer is the text in a box or after `####`, else all text after `</think>`.
    """

    ignore_case: bool = False
    ignore_punctuation: bool = False

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("solution", "answer"),)

    def __call__(
        self,
        completions: list[Any],
        solution: Sequence[Any] | None = None,
        answer: Sequence[Any] | None = None,
        prompts: Sequence[Any] | None = None,
        prompt_opens_reasoning: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        golds = solutions_of("exact_match", solution, answer)
        texts = texts_of(completions, prompts, prompt_opens_reasoning)
        return [
            float(self._matches(final_text(text), given)) if (given := given_solutions(gold)) else None
            for text, gold in zip(texts, golds, strict=True)
        ]

    def _matches(self, text: str | None, golds: Sequence[Any]) -> bool:
        return text is not None and self._normalize(text) in [self._normalize(str(gold)) for gold in golds]

    def _normalize(self, text: str) -> str:
        text = marked_answer(text) or text
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = _PUNCTUATION.sub(" ", text)
        return " ".join(text.split())
