"""What the writers of training rows share: the chat template, the token that ends a text, what to warn of."""

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
    """Turns rows into segments of text; the chat template is looked at only when a row needs it."""

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
        return ChatFormat(
            self._tokenizer,
            chat_template=load_chat_template(self._template_path) if self._template_path else None,
            chat_template_kwargs=self._template_kwargs,
            preserve_thinking=self._preserve_thinking,
        )

    @property
    def end_token(self) -> str:
        """What ends the text that the model writes: the template's end of turn, or EOS where no template is used."""
        return self.format.end_of_turn if "format" in vars(self) else self._eos

    @property
    def stop_ids(self) -> list[int]:
        return [self._vocab[token] for token in (self._eos, self.end_token)]

    def note_unused(self, row: Row, read: Collection[str], conversations: Iterable[list[Message]]) -> None:
        """Count what a written row holds besides the columns `read` and the keys that the template reads."""
        self.unused.note(row, read, conversations, self.format.render if "format" in vars(self) else None)

    @property
    def empty_answers(self) -> set[tuple[int, ...]]:
        """Return token ids of empty answers: the end token alone, or as the template writes it, without thoughts.

        The latter only once a row has used the template.
        """
        empty = [[TemplateSegment(self._eos, True)]]
        if "format" in vars(self):
            empty.append([segment for segment in self.format.empty_answer() if segment.in_loss])
        return {tuple(row.token_ids) for row in encode(self._tokenizer, empty)}

    def warnings(self) -> list[str]:
        """Return what to warn of in the rows that have been written so far."""
        found = [] if self._is_eos_given else eos_warnings(self._tokenizer, self.end_token)
        return found + self.template_warnings()

    def template_warnings(self) -> list[str]:
        """Return what to warn of in how the template wrote the answers so far."""
        if "format" not in vars(self):
            return []
        found = kwarg_warnings(self.format)
        if self.format.drops_text:
            found.append(
                "some answers have text before <think>, or several think blocks, of which the chat template writes only "
                "the last and what follows it; `rlqwen data show` shows what is learned"
            )
        if self.format.moves_thoughts:
            found.append(
                "some answers have their thoughts in think tags, which the chat template reads only as "
                "reasoning_content: they are learned as if they were given there; prompts stay as they are"
            )
        return found

    def with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos


def kwarg_warnings(chat: ChatFormat) -> list[str]:
    """Return a line on keys of `chat_template_kwargs` that the template does not read."""
    if not chat.unread_kwargs:
        return []
    return [f"chat_template_kwargs that the chat template does not read: {', '.join(chat.unread_kwargs)}"]


def eos_warnings(tokenizer: "PreTrainedTokenizerBase", end_token: str | None) -> list[str]:
    """A template that ends turns with another token than the tokenizer's EOS makes generation run on."""
    if end_token == tokenizer.eos_token:
        return []
    return [
        (
            f"the chat template ends turns with {end_token!r}, but the tokenizer's EOS token is {tokenizer.eos_token!r}: "
            f"rollouts and generation_config.json of final/ stop at both; set eos_token: {end_token!r} for the tokenizer "
            "to name it too"
        )
    ]
