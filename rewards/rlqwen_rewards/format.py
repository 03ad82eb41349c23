"""Reward completions that have a required format."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen_rewards.answers import boxes, texts_of

_PARTS = ("think", "answer", "boxed")
_THINK = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)
_ANSWER = re.compile(r"\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


def think_format_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Score 1 if the completion begins with one `<think>...</think>`, else 0, as TRL's reward of this name does.

    Unlike TRL's, it handles prompts that end with `<think>`; see `Format`.
    """
    return Format()(completions, **columns)


def boxed_format(completions: list[Any], **columns: Any) -> list[float]:
    r"""Score 1 if the completion has exactly one non-empty \boxed{...} outside its reasoning, else 0."""
    return Format(require="boxed")(completions, **columns)


@dataclass(frozen=True)
class Format:
    r"""Score 1 if the completion has every part of `require` (think, answer, boxed), or matches `pattern`; 0 if not.

    - think: begins with one `<think>...</think>`
    - answer: the text after the reasoning is one `<answer>...</answer>` and nothing else
    - boxed: exactly one non-empty `\boxed{...}` outside the reasoning
    """

    require: str | Sequence[str] | None = None
    """One or more parts; `think` if neither this nor `pattern` is given."""
    pattern: str | None = None
    """Regular expression that the whole completion must match, instead of `require`; `.` matches line ends."""
    think_in_prompt: bool = False
    """Whether every prompt ends with `<think>`, so that completions begin inside the reasoning. Not needed if the reward
    gets the prompts, because it checks each of them."""

    def __post_init__(self) -> None:
        if self.require is not None and self.pattern is not None:
            raise ValueError("give require or pattern, not both")
        unknown = [part for part in self._required if part not in _PARTS]
        if unknown:
            raise ValueError(f"require: unknown part {unknown[0]!r}; known parts: {', '.join(_PARTS)}")
        if self.pattern is not None:
            re.compile(self.pattern, re.DOTALL)

    def __call__(
        self,
        completions: list[Any],
        prompts: Sequence[Any] | None = None,
        prompt_opens_reasoning: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        opened = [True] * len(completions) if self.think_in_prompt else prompt_opens_reasoning
        return [float(self._fits(text)) for text in texts_of(completions, prompts, opened)]

    @property
    def _required(self) -> tuple[str, ...]:
        if self.pattern is not None:
            return ()
        if self.require is None:
            return ("think",)
        return (self.require,) if isinstance(self.require, str) else tuple(self.require)

    def _fits(self, text: str) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, text, re.DOTALL) is not None
        if "think" in self._required and not _THINK.match(text):
            return False
        final = text.rsplit("</think>", 1)[-1]
        if "answer" in self._required:
            match = _ANSWER.fullmatch(final)
            if match is None or "<answer>" in match["answer"] or "</answer>" in match["answer"]:
                return False
        if "boxed" in self._required:
            found = boxes(final)
            return "<think>" not in final and len(found) == 1 and found[0][2] != ""
        return True
