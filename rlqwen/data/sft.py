"""What an SFT row becomes, and which of it is in the loss, by its columns and the config."""

from typing import TYPE_CHECKING, Any

from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat, Piece, load_chat_template
from rlqwen.data.formats import normalise_row
from rlqwen.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


class SFTWriter:
    """Decides by the row's columns and the config what is written and what is in the loss."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: SFTConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._chat: ChatFormat | None = None
        eos = config.eos_token or tokenizer.eos_token
        if eos is None:
            raise ModelError("the tokenizer has no EOS token, so the end of a text can't be learned; set eos_token")
        self._vocab: dict[str, int] = tokenizer.get_vocab()
        if eos not in self._vocab:
            raise ConfigError(f"eos_token: {eos!r} is not in the tokenizer's vocabulary")
        self._eos: str = eos

    @property
    def end_token(self) -> str:
        """What ends the text that the model writes: the template's end of turn, or EOS where no template is used."""
        return self._chat.end_of_turn if self._chat else self._eos

    @property
    def stop_ids(self) -> list[int]:
        return [self._vocab[token] for token in (self._eos, self.end_token)]

    def warnings(self) -> list[str]:
        return [] if self._config.eos_token else eos_warnings(self._tokenizer, self.end_token)

    def pieces(self, number: int, row: Row) -> list[Piece]:
        """Pieces of row `number`; DataError if there is nothing to learn in it."""
        where = f"row {number}"
        row = normalise_row(row, where)
        text_field = self._config.dataset_text_field
        if "messages" in row:
            return self._conversation(row, where)
        if "prompt" in row and "completion" in row:
            return self._prompt_and_completion(row, where)
        if text_field in row:
            self._refuse_masks("assistant_only_loss", "completion_only_loss", where, "plain text")
            return [Piece(self._with_eos(str(row[text_field])), True, in_loss=True)]
        hint = "map one with columns: {completion: ...}" if "prompt" in row else "map them with columns: {...}"
        raise DataError(
            f"{where}: nothing to learn; rows need 'messages', 'conversations', 'prompt' and 'completion', "
            f"'instruction' and 'output', or {text_field!r}. This one has {', '.join(map(str, row))}: {hint}"
        )

    def _conversation(self, row: Row, where: str) -> list[Piece]:
        self._refuse_masks("completion_only_loss", None, where, "a whole conversation")
        pieces = self._format.conversation(row["messages"], where, tools=row.get("tools"))
        return all_in_loss(pieces) if self._config.assistant_only_loss is False else pieces

    def _prompt_and_completion(self, row: Row, where: str) -> list[Piece]:
        prompt, completion = row["prompt"], row["completion"]
        completion_only = self._config.completion_only_loss is not False
        if isinstance(prompt, str) and isinstance(completion, str):
            self._refuse_masks("assistant_only_loss", None, where, "plain text")
            pieces = [Piece(prompt, True), Piece(self._with_eos(completion), True, in_loss=True)]
            return pieces if completion_only else all_in_loss(pieces)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        first_trained = len(before) if completion_only else 0
        pieces = self._format.conversation(
            [*before, *after], where, tools=row.get("tools"), first_trained=first_trained
        )
        return pieces if completion_only or self._config.assistant_only_loss else all_in_loss(pieces)

    @property
    def _format(self) -> ChatFormat:
        if self._chat is None:
            path = self._config.chat_template_path
            self._chat = ChatFormat(
                self._tokenizer,
                chat_template=load_chat_template(path) if path else None,
                chat_template_kwargs=self._config.chat_template_kwargs,
            )
        return self._chat

    def _with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _refuse_masks(self, first: str, second: str | None, where: str, what: str) -> None:
        for key in (first, second):
            if key and getattr(self._config, key):
                raise DataError(f"{where}: {key} is set, but the row is {what}, where it means nothing; leave it out")


def all_in_loss(pieces: list[Piece]) -> list[Piece]:
    """The same text, all of it learned."""
    return [Piece(piece.text, piece.is_control, in_loss=True) for piece in pieces]


def eos_warnings(tokenizer: "PreTrainedTokenizerBase", end_token: str | None) -> list[str]:
    """A template that ends turns with another token than the tokenizer's EOS makes generation run on."""
    if end_token == tokenizer.eos_token:
        return []
    return [
        (
            f"the chat template ends turns with {end_token!r}, but the tokenizer's EOS token is {tokenizer.eos_token!r}: "
            f"generation must stop at {end_token!r} too; set eos_token: {end_token!r}"
        )
    ]
