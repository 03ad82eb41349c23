"""Keep text of a dataset or a model from acting as a chat template's control tokens.

If `<|im_end|>` inside a message acted as a token, its author could end the turn and open another. Therefore the text of
control tokens inside messages is replaced by placeholders before the template is rendered. It is put back as segments
that are tokenized as ordinary text. Every other special token, such as an `<answer>` that was added to the tokenizer,
acts as a token, as in serving.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "\uf5ee"
"""Private-use character that stands for escaped text while a template is rendered."""
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(slots=True, frozen=True)
class TemplateSegment:
    """Hold a run of text that is tokenized by itself, such as one that the chat template wrote."""

    text: str
    is_control: bool
    """Whether special tokens in the text act as tokens; if not, they are ordinary text."""
    in_loss: bool = False
    is_excluded: bool = False
    """Whether the row excludes the text from the loss, even if the whole conversation is learned."""


@dataclass(slots=True)
class EscapedTexts:
    """Hold the texts that were escaped in one row, by the number of their placeholder."""

    placeholder: str = PLACEHOLDER
    texts: list[str] = field(default_factory=list)

    def segments(self, text: str, *, in_loss: bool = False, is_excluded: bool = False) -> list[TemplateSegment]:
        """Return nonempty segments of a rendered text, with the escaped texts put back as ordinary text."""
        parts = re.split(f"{self.placeholder}(\\d+){self.placeholder}", text) if self.texts else [text]
        return [
            TemplateSegment(self.texts[int(part)] if index % 2 else part, index % 2 == 0, in_loss, is_excluded)
            for index, part in enumerate(parts)
            if part
        ]


class ControlTokenEscaper:
    """Escape the given texts inside the strings of nested values."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
        self._pattern = re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})+" if longest_first else r"(?!)")

    def first(self, text: str) -> int | None:
        """Return the position of the first text to escape; None if there is none."""
        match = self._pattern.search(text)
        return match.start() if match else None

    def escape(self, value: Any) -> tuple[Any, EscapedTexts]:
        """Replace each run of these texts by a numbered placeholder; return the value and the replaced texts."""
        if not any(self._pattern.search(text) for text in strings(value)):
            return value, EscapedTexts()
        escaped = EscapedTexts(unused_placeholder(strings(value)))

        def put_placeholder(match: re.Match[str]) -> str:
            escaped.texts.append(match[0])
            return f"{escaped.placeholder}{len(escaped.texts) - 1}{escaped.placeholder}"

        return _map_strings(value, lambda text: self._pattern.sub(put_placeholder, text)), escaped


def control_tokens(tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> set[str]:
    """Return the texts of special tokens that a chat template writes, and of BOS, EOS, padding and unknown tokens.

    `template`: the tokenizer's own by default. Without a template, ChatML's tokens are returned.
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
    """Return the texts of all special tokens, without think and tool tags, which Qwen adds as ordinary tokens."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


class CompletionReader:
    """Decode sampled token ids to the text that rewards read, without control tokens.

    Special tokens that were added for the model to write, such as `<answer>`, are part of that text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._control_ids = {tokenizer.convert_tokens_to_ids(token) for token in control_tokens(tokenizer)}

    def texts(self, token_ids: Collection[list[int]]) -> list[str]:
        """Return the text of each completion."""
        kept = [[token for token in row if token not in self._control_ids] for row in token_ids]
        return list(self._tokenizer.batch_decode(kept, skip_special_tokens=False))


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
    """Return a placeholder that occurs in none of the texts."""
    placeholder, texts = PLACEHOLDER, list(texts)
    while any(placeholder in text for text in texts):
        placeholder += PLACEHOLDER
    return placeholder


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(one, change) for one in value]
    return value
