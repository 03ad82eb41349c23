"""Reward completions that stay in one language, reasoning included (as in DeepSeek-R1, arXiv 2501.12948)."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlqwen_rewards.answers import text_of

_SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "id", "sv", "cs", "ro"), ("LATIN",)),
    **dict.fromkeys(("da", "no", "fi", "hu", "hr", "sk", "ca", "ms", "tl", "sw"), ("LATIN",)),
    **dict.fromkeys(("ru", "uk", "bg", "sr"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("ARABIC",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("DEVANAGARI",)),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
    "te": ("TELUGU",),
    "ka": ("GEORGIAN",),
    "hy": ("ARMENIAN",),
}
"""ISO 639-1 code -> scripts, named by the first word of the Unicode names of their letters."""

_NOT_LANGUAGE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]"  # code and formulas
    r"|\\(?:boxed|fbox)\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\[A-Za-z]+|</?[A-Za-z_]+>",  # boxes, commands, tags
    re.DOTALL,
)
_ENOUGH_LETTERS = 50
_ENOUGH_CHARACTERS = 15
"""Shorter texts are too short to identify the language, so only the script counts. Chinese characters carry more
information than letters."""


@dataclass(frozen=True)
class Language:
    """Score the share of letters in the language's script; 0 if a longer text is in another language of that script.

    The language is column `language` if the data has it, else argument `language`; an ISO 639-1 code. Formulas, code and
    tags are ignored. None (missing) if no letters remain.
    """

    language: str | None = None

    def __post_init__(self) -> None:
        if self.language is not None:
            _scripts(self.language)

    @property
    def required_columns(self) -> tuple[tuple[str, ...], ...]:
        return (("language",),) if self.language is None else ()

    def __call__(
        self, completions: list[Any], language: Sequence[str] | None = None, **columns: Any
    ) -> list[float | None]:
        languages = language if language is not None else [self.language] * len(completions)
        return [_consistency(text_of(text), target) for text, target in zip(completions, languages, strict=True)]


def _scripts(language: str | None) -> tuple[str, ...]:
    if language not in _SCRIPTS:
        raise ValueError(f"language: unknown code {language!r}; known codes: {', '.join(sorted(_SCRIPTS))}")
    return _SCRIPTS[language]


def _consistency(text: str, language: str | None) -> float | None:
    scripts = _scripts(language)
    text = _NOT_LANGUAGE.sub(" ", text)
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return None
    share = sum(_script(letter) in scripts for letter in letters) / len(letters)
    rivals = {other for other, theirs in _SCRIPTS.items() if set(theirs) & set(scripts)}
    enough = _ENOUGH_CHARACTERS if "CJK" in scripts else _ENOUGH_LETTERS
    if len(rivals) > 1 and len(letters) >= enough and _identify(text, rivals) != language:
        return 0.0
    return share


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ", 1)[0]


def _identify(text: str, candidates: set[str]) -> str:
    ranked: list[tuple[str, float]] = _identifier().rank(text)
    return next(language for language, _ in ranked if language in candidates)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """Load the language identifier on first use, because that takes about a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
