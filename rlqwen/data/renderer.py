"""Render training rows to template segments: the base class, and warnings about the chat template."""

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.encoding import encode
from rlqwen.data.template_source import load_chat_template
from rlqwen.data.unused_columns import UnusedColumns
from rlqwen.errors import ConfigError, ModelError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


class Renderer:
    """Render rows into template segments; the chat template is loaded only when a row needs it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: SFTConfig | PreferenceConfig) -> None:
        self._tokenizer, self._template_path = tokenizer, config.chat_template_path
        self._template_kwargs, self._is_eos_given = config.chat_template_kwargs, config.eos_token is not None
        self._preserve_thinking = config.preserve_thinking if isinstance(config, SFTConfig) else None
        eos = config.eos_token or tokenizer.eos_token
        if eos is None:
            raise ModelError("the tokenizer has no EOS token, so the end of a text can't be learned; set eos_token")
        self._vocab: dict[str, int] = tokenizer.get_vocab()
        if eos not in self._vocab:
            raise ConfigError(f"eos_token: {eos!r} is not in the tokenizer's vocabulary")
        self._eos: str = eos
        self.unused = UnusedColumns()

    @cached_property
    def format(self) -> ChatFormat:
        """Return the chat format, which is created at first use."""
        return ChatFormat(
            self._tokenizer,
            chat_template=load_chat_template(self._template_path) if self._template_path else None,
            chat_template_kwargs=self._template_kwargs,
            preserve_thinking=self._preserve_thinking,
        )

    @property
    def end_token(self) -> str:
        """Return the token that ends an answer: the template's end of turn, or EOS if no row used the template."""
        return self.format.template.end_of_turn if "format" in vars(self) else self._eos

    @property
    def stop_ids(self) -> list[int]:
        """Return the ids of EOS and of the end token."""
        return [self._vocab[token] for token in (self._eos, self.end_token)]

    def record_unused(self, row: Row, read: Collection[str], conversations: Iterable[list[Message]]) -> None:
        """Count columns of a rendered row outside `read`, and message keys that the template does not read."""
        self.unused.record(
            row, read, conversations, self.format.template.render_raw if "format" in vars(self) else None
        )

    @property
    def empty_answers(self) -> set[tuple[int, ...]]:
        """Return the token ids of empty answers: EOS alone, and the template's empty answer once a row has used it."""
        empty = [[TemplateSegment(self._eos, True)]]
        if "format" in vars(self):
            empty.append([segment for segment in self.format.empty_answer() if segment.in_loss])
        return {tuple(row.token_ids) for row in encode(self._tokenizer, empty)}

    def warnings(self) -> list[str]:
        """Return warnings about the rows rendered so far."""
        found = [] if self._is_eos_given else eos_warnings(self._tokenizer, self.end_token)
        return found + self.template_warnings()

    def template_warnings(self) -> list[str]:
        """Return warnings about how the template has rendered the answers so far."""
        if "format" not in vars(self):
            return []
        found = kwarg_warnings(self.format)
        if self.format.drops_text:
            found.append(
                "some answers have text before <think>, or several think blocks; the chat template writes only the last "
                "block and the text after it; `rlqwen data show` shows what is learned"
            )
        if self.format.moves_thoughts:
            found.append(
                "some answers have their thoughts in think tags, but the chat template reads thoughts only from "
                "reasoning_content: they are moved there before rendering; prompts are not changed"
            )
        return found

    def with_eos(self, text: str) -> str:
        """Append EOS unless the text ends in it."""
        return text if text.endswith(self._eos) else text + self._eos


def kwarg_warnings(chat: ChatFormat) -> list[str]:
    """Return a warning about keys of `chat_template_kwargs` that the template does not read, if there are any."""
    if not chat.template.unread_kwargs:
        return []
    return [f"chat_template_kwargs that the chat template does not read: {', '.join(chat.template.unread_kwargs)}"]


def eos_warnings(tokenizer: "PreTrainedTokenizerBase", end_token: str | None) -> list[str]:
    """Return a warning if the template ends turns with another token than EOS, because generation might not stop."""
    if end_token == tokenizer.eos_token:
        return []
    return [
        (
            f"the chat template ends turns with {end_token!r}, but the tokenizer's EOS token is {tokenizer.eos_token!r}: "
            f"rollouts and generation_config.json of final/ stop at both; set eos_token: {end_token!r} to make it the EOS "
            "token of the saved tokenizer too"
        )
    ]
