"""From conversations to pieces of text that say what is control, what is in the loss, and where a turn ends.

What is trained must equal what generation will prompt for. So an assistant turn is written as

    generation prompt | content, exactly as given | end-of-turn token

where the generation prompt is the chat template's own (with the same `chat_template_kwargs`) and stays outside the
loss, while content and end-of-turn token are in it. Everything else is rendered by the template. Differences to
tokenising what `apply_chat_template` returns for the whole conversation:

- Qwen3's template cuts `<think>...</think>` out of all turns but the last, and puts an empty think block before a last
  turn that has none; the training templates that TRL ships put one into every turn. Here each turn keeps what it has.
  With `enable_thinking: false` the empty block is part of the generation prompt, hence masked; with templates whose
  generation prompt opens `<think>` (Qwen3-Thinking, Qwen3.5), an answer without thoughts first closes it.
- The line break after the end-of-turn token is never generated, so it is not in the loss.
- A special token's text inside a turn ('<|im_end|>' typed by a user) is text: it is split into ordinary tokens and
  can't end the turn or open another.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.errors import DataError, ModelError
from rlqwen.model_sources import split_revision
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINK_AT_END = re.compile(r"<think>\s*(</think>\s*)?\Z")
# Stands for a turn's content while the template is rendered; a private-use character that no text should have.
_MARK = "\uf5ee"


@dataclass(slots=True, frozen=True)
class Piece:
    """A run of text that is tokenised on its own."""

    text: str
    is_control: bool
    """Special tokens in it act; otherwise their text is ordinary text."""
    in_loss: bool = False


class ChatFormat:
    """A tokenizer's chat template, understood well enough to mask and to guard it.

    Raises ModelError if there is no template, or one that writes no generation prompt or doesn't end assistant turns
    with a special token. `chat_template` overrides the tokenizer's; `chat_template_kwargs` go to every rendering.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template or _default_template(tokenizer)
        self.kwargs = chat_template_kwargs or {}
        self._special = special_texts(tokenizer)
        self._known_structures: set[tuple[str, ...]] = set()
        prompt = self._find_generation_prompt()
        opening = _THINK_AT_END.search(prompt)
        self.generation_prompt = prompt
        """What the template appends for the model to go on from, such as `<|im_start|>assistant\\n`."""
        self._opening = opening.group() if opening else ""
        self._header = prompt[: opening.start()] if opening else prompt
        self.end_of_turn = self._find_end_of_turn()
        """The special token that ends an assistant turn: generation must stop at it."""

    def conversation(
        self, messages: list[Message], where: str, *, tools: Any = None, first_trained: int = 0
    ) -> list[Piece]:
        """Pieces of a whole conversation; assistant turns from index `first_trained` on are in the loss."""
        marked = [i for i, m in enumerate(messages) if m["role"] == "assistant" or self._is_unsafe(m["content"])]
        texts = self._render_around(messages, marked, where, tools)
        pieces: list[Piece] = []
        before = texts[0]
        for i, after in zip(marked, texts[1:], strict=True):
            message = messages[i]
            if message["role"] != "assistant":
                pieces += [Piece(before, True), Piece(message["content"], False)]
                before = after
                continue
            in_loss = i >= first_trained
            head, content = self._open_turn(before, _verbatim(message), where)
            calls, before = self._close_turn(after, bool(message.get("tool_calls")), where)
            content += calls if content else calls.lstrip("\n")
            pieces += [Piece(head, True), Piece(content, False, in_loss), Piece(self.end_of_turn, True, in_loss)]
        pieces.append(Piece(before, True))
        return [piece for piece in pieces if piece.text]

    def prompt(self, messages: list[Message], where: str, *, tools: Any = None) -> list[Piece]:
        """Pieces of a prompt that ends in the generation prompt, rendered as serving renders it."""
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the prompt ends in an assistant turn, so there is nothing left to generate; "
                "end it with a user or tool turn"
            )
        marked = [i for i, m in enumerate(messages) if self._is_unsafe(m["content"])]
        texts = self._render_around(messages, marked, where, tools, add_generation_prompt=True)
        pieces = [Piece(texts[0], True)]
        for i, after in zip(marked, texts[1:], strict=True):
            pieces += [Piece(messages[i]["content"], False), Piece(after, True)]
        return [piece for piece in pieces if piece.text]

    def _render_around(
        self, messages: list[Message], marked: list[int], where: str, tools: Any, add_generation_prompt: bool = False
    ) -> list[str]:
        """Render with the contents of `marked` turns left out; the texts before, between and after them."""
        for extra in (tools, *(message.get("tool_calls") for message in messages)):
            if extra and self._is_unsafe(json.dumps(extra, ensure_ascii=False)):
                raise DataError(f"{where}: the text of a special token inside a tool or tool call: {extra!r:.200}")
        if tools and not self._writes_tools:
            raise DataError(f"{where}: the row has tools, but the chat template writes none; set chat_template_path")
        self._check_structure(messages, where)
        mark = unused_mark(message["content"] for message in messages)
        rendered = self._render(
            [
                _without_thoughts(m) | {"content": f"{mark}{i}{mark}"} if i in marked else m
                for i, m in enumerate(messages)
            ],
            where,
            tools,
            add_generation_prompt,
        )
        parts = re.split(f"{mark}(\\d+){mark}", rendered)
        if parts[1::2] != [str(i) for i in marked]:
            raise DataError(f"{where}: the chat template reorders, repeats or drops turns")
        return parts[::2]

    def render(self, messages: list[Message]) -> str:
        """Text of a conversation as the template writes it; jinja2.TemplateError where it refuses."""
        return str(
            self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, **self.kwargs)
        )

    def _check_structure(self, messages: list[Message], where: str) -> None:
        """Each sequence of roles is tried once: a template that silently leaves a turn out is an error."""
        roles = tuple(message["role"] for message in messages)
        if roles in self._known_structures:
            return
        probe = [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]
        rendered = self._render(probe, where)
        for i, role in enumerate(roles):
            if f"{_MARK}{i}{_MARK}" not in rendered:
                raise DataError(
                    f"{where}: the chat template drops turn {i}, of role {role!r}; rename the role or mend it"
                )
        self._known_structures.add(roles)

    def _render(
        self, messages: list[Message], where: str, tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.kwargs,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"{where}: the chat template refuses this conversation (roles {roles}): {error}") from None
        return str(text)

    @cached_property
    def _writes_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {}}}
        return "probe_tool" in self._render([{"role": "user", "content": "probe"}], "chat template", [tool])

    def _find_generation_prompt(self) -> str:
        probe = [{"role": "user", "content": "probe"}]
        plain, prompted = (self._render(probe, "chat template", None, flag) for flag in (False, True))
        if not prompted.startswith(plain) or prompted == plain:
            raise ModelError(
                "the chat template writes no generation prompt (add_generation_prompt changes nothing), so the model "
                "would not know that it is its turn; set chat_template_path to another template"
            )
        return prompted[len(plain) :]

    def _find_end_of_turn(self) -> str:
        probe = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": _MARK}]
        tail = self._render(probe, "chat template").rpartition(_MARK)[2]
        match = self._special.match(tail)
        if match is None:
            raise ModelError(
                f"the chat template ends an assistant turn with {tail!r} and not with a special token, so generation "
                "would never stop; set chat_template_path to another template"
            )
        return match.group()

    def _open_turn(self, before: str, content: str, where: str) -> tuple[str, str]:
        """What stands before an assistant's content, made equal to the generation prompt; and the content after it."""
        head = before[: match.start()] if (match := _THINK_AT_END.search(before)) else before
        if not head.endswith(self._header):
            raise ModelError(
                f"the chat template opens an assistant turn with {head[-40:]!r}, but prompts generation with "
                f"{self.generation_prompt!r}: what is trained would not be what is asked for"
            )
        head += self._opening
        if not self._opening or content.startswith(self._opening):
            return head, content[len(self._opening) :]
        if "</think>" not in self._opening:
            thoughts = re.match(r"<think>\s*", content)
            return head, content[thoughts.end() :] if thoughts else f"\n</think>\n\n{content}"
        empty = re.match(r"\s*<think>\s*</think>\s*", content)
        if empty is None and content.lstrip().startswith("<think>"):
            raise DataError(
                f"{where}: the answer thinks ({content[:40]!r}), but the generation prompt says that it doesn't "
                f"({self.generation_prompt!r}); set enable_thinking: true in chat_template_kwargs, or take the thoughts "
                "out of the data"
            )
        return head, content[empty.end() :] if empty else content

    def _close_turn(self, after: str, has_calls: bool, where: str) -> tuple[str, str]:
        """Split what follows an assistant's content into tool calls and what follows the end-of-turn token."""
        calls, end, rest = after.partition(self.end_of_turn)
        if not end or (calls and not has_calls):
            raise DataError(f"{where}: the chat template follows an assistant's content with {after[:40]!r}")
        if has_calls and not calls.strip():
            raise DataError(
                f"{where}: a turn has tool calls, but the chat template writes none; set chat_template_path"
            )
        return calls, rest

    def _is_unsafe(self, text: str) -> bool:
        return self._special.search(text) is not None


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the text of every special token. Think and tool tags are none: in Qwen they are plain added tokens."""
    special = sorted((str(t) for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special)) or r"(?!)")


def unused_mark(texts: Iterable[str]) -> str:
    """A run of characters that none of the texts holds, to stand for text while a template is rendered."""
    mark, texts = _MARK, list(texts)
    while any(mark in text for text in texts):
        mark += _MARK
    return mark


def load_chat_template(path: str) -> str:
    """Text of a chat template: `path` is a Jinja file, or a model folder or hub id whose tokenizer has one."""
    if Path(path).is_file():
        return Path(path).read_text("utf-8")
    if path.endswith((".jinja", ".jinja2")):
        raise ModelError(f"chat_template_path: there is no file {path}")
    from transformers import AutoTokenizer

    name, revision = split_revision(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"chat_template_path: {path} is neither a file nor a model with a tokenizer: {error}"
        ) from None
    return _default_template(tokenizer)


def _default_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, and the rows are "
            "conversations; set chat_template_path to a Jinja file or to a model whose template to use, "
            "or give prompts and completions as plain text"
        )
    return str(template)


def _verbatim(message: Message) -> str:
    """An assistant's content as given; thoughts in a field of their own go in front of it, in think tags."""
    content: str = message["content"]
    thoughts = message.get("reasoning_content")
    if isinstance(thoughts, str) and thoughts:
        return "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    return content


def _without_thoughts(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
