"""Is the final answer the solution, letter by letter?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlqwen_rewards.answers import final_text, marked_answer, solutions_of, text_of

_PUNCTUATION = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class ExactMatch:
    """1 if the final answer is exactly column `solution` (or `answer`), white space aside; 0 if not.

    On both sides the answer is what is boxed or stands behind `####`, or else all the text after `</think>`.
    """

    ignore_case: bool = False
    ignore_punctuation: bool = False

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("solution", "answer"),)

    def __call__(
        self,
        completions: list[Any],
        solution: Sequence[Any] | None = None,
        answer: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        golds = solutions_of("exact_match", solution, answer)
        return [
            float(self._matches(final_text(text_of(completion)), gold if isinstance(gold, list | tuple) else [gold]))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    def _matches(self, text: str | None, golds: Sequence[Any]) -> bool:
        return text is not None and self._normal(text) in [self._normal(str(gold)) for gold in golds]

    def _normal(self, text: str) -> str:
        text = marked_answer(text) or text
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = _PUNCTUATION.sub(" ", text)
        return " ".join(text.split())
