"""Keep text that someone wrote from acting as a chat template's control tokens.

Whoever can write `<|im_end|>` into a turn could end it and open another. So the text of control tokens inside turns is
replaced by marks while the template is rendered, and put back as segments that are split into ordinary tokens. Every other
special token, such as an `<answer>` that was added to the tokenizer, acts where it stands, as in serving.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for hidden text while a template is rendered; a private-use character that no text should have.
PLACEHOLDER = "\uf5ee"
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(slots=True, frozen=True)
class TemplateSegment:
    """A run of text that is tokenized on its own."""

    text: str
    is_control: bool
    """Special tokens in it act; otherwise their text is ordinary text."""
    in_loss: bool = False
    is_excluded: bool = False
    """Never in the loss, even where all of a conversation is: its row says so."""


@dataclass(slots=True)
class EscapedTexts:
    """The texts that were hidden in one row, by the number of their mark."""

    mark: str = PLACEHOLDER
    texts: list[str] = field(default_factory=list)

    def segments(self, text: str, *, in_loss: bool = False, is_excluded: bool = False) -> list[TemplateSegment]:
        """Return segments of a rendered text with the hidden texts put back as ordinary text; none is empty."""
        parts = re.split(f"{self.mark}(\\d+){self.mark}", text) if self.texts else [text]
        return [
            TemplateSegment(self.texts[int(part)] if place % 2 else part, place % 2 == 0, in_loss, is_excluded)
            for place, part in enumerate(parts)
            if part
        ]


class ControlTokenEscaper:
    """Hides the given texts inside the strings of nested values."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
        self._pattern = re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})+" if longest_first else r"(?!)")

    def first(self, text: str) -> int | None:
        """Return the position of the first guarded text, None if there is none."""
        match = self._pattern.search(text)
        return match.start() if match else None

    def hide(self, value: Any) -> tuple[Any, EscapedTexts]:
        """Replace each run of guarded texts by a numbered mark; return the value and the texts of the marks."""
        if not any(self._pattern.search(text) for text in strings(value)):
            return value, EscapedTexts()
        escaped = EscapedTexts(unused_placeholder(strings(value)))

        def put_mark(match: re.Match[str]) -> str:
            escaped.texts.append(match[0])
            return f"{escaped.mark}{len(escaped.texts) - 1}{escaped.mark}"

        return _map_strings(value, lambda text: self._pattern.sub(put_mark, text)), escaped


def control_tokens(tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> set[str]:
    """Return texts of special tokens that a chat template writes or that begin, end, pad or stand for nothing.

    `template`: the tokenizer's own by default; ChatML's tokens where there is none.
    """
    own = tokenizer.chat_template
    if template is None and own:
        template = str(own.get("default", "") if isinstance(own, dict) else own)
    named = {getattr(tokenizer, name) for name in _NAMED}
    return {
        text
        for text in special_tokens(tokenizer)
        if text in named or (text in template if template is not None else text in _CHATML)
    }


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return texts of all special tokens, without think and tool tags: Qwen has those as plain added tokens."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


class CompletionReader:
    """Turns sampled token ids into the text that rewards read: all but control tokens.

    A special token that was added for the model to write, such as `<answer>`, is a part of that text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._hidden = {tokenizer.convert_tokens_to_ids(token) for token in control_tokens(tokenizer)}

    def texts(self, token_ids: Collection[list[int]]) -> list[str]:
        """Return the text of each completion."""
        shown = [[token for token in row if token not in self._hidden] for row in token_ids]
        return list(self._tokenizer.batch_decode(shown, skip_special_tokens=False))


def strings(value: Any) -> Iterator[str]:
    """Yield every text inside lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)


def unused_placeholder(texts: Iterable[str]) -> str:
    """Return characters that occur in none of the texts, to stand for text while a template is rendered."""
    mark, texts = PLACEHOLDER, list(texts)
    while any(mark in text for text in texts):
        mark += PLACEHOLDER
    return mark


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(one, change) for one in value]
    return value
