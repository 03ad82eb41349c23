"""Render conversations with the chat template, and mark which of their text is in the loss.

The text of a conversation is the output of `apply_chat_template`, and the prompt of a row is the text that serving sends
(`add_generation_prompt=True`). In an assistant turn, everything after the generation prompt is in the loss, including
the end-of-turn token. The line break after that token is never generated, so it is not in the loss. It follows that:

- **A turn without thoughts:** Qwen3's template writes an empty think block into the last turn. The block is learned,
  because the prompt asks for thoughts. With `enable_thinking: false` the block is part of the generation prompt, so it
  is not learned. If the generation prompt opens `<think>` (Qwen3-Thinking, Qwen3.5), such a turn first closes it.
- **A completion** begins with a turn that is rendered as a last turn, because it was generated as one. Later turns of
  the same completion are rendered as the template renders them inside the whole conversation.
- **Earlier turns of `messages`** are learned as the template renders them. Qwen3's template drops the thoughts of turns
  before the last question, so these turns are learned as answers without thoughts, in the context that later turns see
  in serving. `preserve_thinking: true` renders and learns each turn as if it were the last. Each turn then has the same
  prompt as in serving, but later turns see thoughts that serving would not show. `preserve_thinking: false` removes
  thoughts from earlier turns for templates that would keep them.
- **Thoughts of learned turns** are moved to the place that the template reads: into the content for a template without
  `reasoning_content`, and out of the content for a template that reads only that key (Qwen3.8). Messages of a prompt
  are not changed.
- **Tokenization:** prompt and answer are tokenized separately, as in generation. The text of control tokens inside a
  message is ordinary text (rlqwen.data.control_tokens).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlqwen.data.chat_template import PROBE, ChatTemplate
from rlqwen.data.control_tokens import ControlTokenEscaper, EscapedTexts, TemplateSegment, control_tokens
from rlqwen.data.reasoning import (
    drop_earlier_thoughts,
    is_cut_thought,
    text_beside_thoughts,
    thoughts_in_content,
    thoughts_in_field,
    thoughts_of,
)
from rlqwen.errors import DataError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_BLOCK = re.compile(r"\A\s*<think>\s*</think>\s*")


@dataclass(slots=True)
class _RenderedTurn:
    """Hold the text of one assistant turn in a rendered conversation."""

    before: str
    """Text since the previous assistant turn, including this turn's header."""
    text: str
    """Text from the header to the end of the turn, including the end-of-turn token."""
    message: Message
    is_last: bool
    """Whether this is the last message of the conversation."""


class ChatFormat:
    """Render conversations into template segments with loss marks, and escape control tokens in their text.

    `chat_template` overrides the tokenizer's template; `chat_template_kwargs` are passed to every rendering;
    `preserve_thinking` applies to whole conversations (see the module). Raises ModelError if there is no template, if
    it writes no generation prompt, or if it does not end assistant turns with a special token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        preserve_thinking: bool | None = None,
    ) -> None:
        self.template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs)
        self.preserve_thinking = preserve_thinking
        self.drops_text = False
        """Whether the template has dropped text of an answer that stood before or between think blocks."""
        self.moves_thoughts = False
        """Whether the thoughts of an answer were moved out of its content, where the template does not read them."""
        tokens = control_tokens(tokenizer, self.template.text)
        self._escaper = ControlTokenEscaper([*tokens, self.template.header, self.template.end_of_turn])

    def conversation(self, messages: list[Message], where: str, *, tools: Any = None) -> list[TemplateSegment]:
        """Return segments of a whole conversation; assistant turns are in the loss unless the row excludes them."""
        (messages, tools), escaped = self._escaper.escape((self.place_thoughts(messages, 0), tools))
        if self.preserve_thinking is False:
            messages = drop_earlier_thoughts(messages)
        kwargs = {} if self.preserve_thinking is None else {"preserve_thinking": self.preserve_thinking}
        turns, rest = self._turns(messages, where, tools, kwargs)
        segments: list[TemplateSegment] = []
        for turn in turns:
            if self.preserve_thinking and not turn.is_last:
                turn.text = self._render_as_last(turn.message, where, kwargs)
            opening, learned = (self._split_last if self.preserve_thinking else self._split)(turn, where)
            segments += escaped.segments(turn.before + opening) + self._learned(escaped, learned, turn)
        return segments + escaped.segments(rest)

    def exchange(
        self, prompt: list[Message], completion: list[Message], where: str, *, tools: Any = None
    ) -> tuple[list[TemplateSegment], list[TemplateSegment]]:
        """Return segments of a prompt as serving sends it, and of a completion whose assistant turns are in the loss.

        If the completion begins with another role, it does not follow a generation prompt. The prompt is then all text
        before the completion's first assistant turn.
        """
        placed = self.place_thoughts([*prompt, *completion], len(prompt))
        (messages, tools), escaped = self._escaper.escape((placed, tools))
        turns, rest = self._turns(messages, where, tools)
        num_in_prompt = sum(message["role"] == "assistant" for message in prompt)
        if num_in_prompt == len(turns):
            return escaped.segments("".join(turn.before + turn.text for turn in turns) + rest), []
        first = turns[num_in_prompt]
        if completion[0]["role"] == "assistant":
            if not first.is_last:
                first.text = self._render_as_last(first.message, where)
            _, learned = self._split_last(first, where)
            before = self.template.render(messages[: len(prompt)], where, tools, add_generation_prompt=True)
        else:
            opening, learned = self._split(first, where)
            before = "".join(turn.before + turn.text for turn in turns[:num_in_prompt]) + first.before + opening
        segments = self._learned(escaped, learned, first)
        for turn in turns[num_in_prompt + 1 :]:
            opening, learned = self._split(turn, where)
            segments += escaped.segments(turn.before + opening) + self._learned(escaped, learned, turn)
        return escaped.segments(before), segments + escaped.segments(rest)

    def prompt(self, messages: list[Message], where: str, *, tools: Any = None) -> list[TemplateSegment]:
        """Return segments of a prompt that ends in the generation prompt, rendered as serving renders it."""
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the prompt ends in an assistant message, so there is nothing left to generate; "
                "end it with a user or tool message"
            )
        (messages, tools), escaped = self._escaper.escape((messages, tools))
        self.template.check_structure(messages, where, tools)
        return escaped.segments(self.template.render(messages, where, tools, add_generation_prompt=True))

    def empty_answer(self) -> list[TemplateSegment]:
        """Return segments of an empty answer, all of them in the loss."""
        return self.exchange([PROBE], [{"role": "assistant", "content": ""}], "chat template")[1]

    def place_thoughts(self, messages: list[Message], first: int = 0) -> list[Message]:
        """Move thoughts of the messages from index `first` on to the place that the template reads."""
        learned = messages[first:]
        if not self.template.writes_thoughts:
            if all("reasoning_content" not in message for message in learned):
                return messages
            return messages[:first] + [thoughts_in_content(message) for message in learned]
        if not any("</think>" in message["content"] for message in learned) or self.template.reads_think_tags:
            return messages
        placed = [thoughts_in_field(message) for message in learned]
        for message, moved in zip(learned, placed, strict=True):
            self.moves_thoughts |= message is not moved
            self.drops_text |= message is not moved and bool(text_beside_thoughts(message["content"]))
        return messages[:first] + placed

    @property
    def writes_think_blocks(self) -> bool:
        """Return whether the template writes thoughts, or opens a think block in the generation prompt."""
        return self.template.writes_thoughts or bool(self.template.opening)

    def _turns(
        self, messages: list[Message], where: str, tools: Any, kwargs: dict[str, Any] | None = None
    ) -> tuple[list[_RenderedTurn], str]:
        """Return the assistant turns of a rendered conversation, and the text after the last one."""
        self.template.check_structure(messages, where, tools)
        text = self.template.render(messages, where, tools, kwargs=kwargs)
        turns: list[_RenderedTurn] = []
        position = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self.template.find_turn(text, position, where)
            turn = _RenderedTurn(text[position:start], text[start:end], message, number == len(messages) - 1)
            self._check_turn(turn, where)
            turns.append(turn)
            position = end
        if self.template.header in text[position:]:
            raise DataError(f"{where}: the chat template reorders, repeats or drops messages")
        return turns, text[position:]

    def _check_turn(self, turn: _RenderedTurn, where: str) -> None:
        """Raise DataError if the template drops the answer or tool calls; it may drop thoughts (see `_split_last`)."""
        answer = turn.message["content"].rpartition("</think>")[2].strip()
        if answer not in turn.text:
            raise DataError(f"{where}: the chat template writes another answer than the row has: {answer!r:.200}")
        if text_beside_thoughts(turn.message["content"]) and turn.message["content"].strip() not in turn.text:
            self.drops_text = True
        calls = turn.message.get("tool_calls") or []
        if any(call["function"]["name"] not in turn.text for call in calls):
            raise DataError(
                f"{where}: a message has tool calls, but the chat template writes none; set chat_template_path"
            )

    def _render_as_last(self, message: Message, where: str, kwargs: dict[str, Any] | None = None) -> str:
        """Return the text that the template writes for an assistant message if no other message follows."""
        text = self.template.render([PROBE, message], where, kwargs=kwargs)
        return text[slice(*self.template.find_turn(text, 0, where))]

    def _split(self, turn: _RenderedTurn, where: str) -> tuple[str, str]:
        """Split a rendered turn into (end of its prompt, learned text)."""
        if turn.is_last:
            return self._split_last(turn, where)
        text = self._without_empty_block(turn)
        self._refuse_thoughts(turn, text, where)
        learned = text.removeprefix(self.template.opening)
        return text[: len(text) - len(learned)], learned

    def _split_last(self, turn: _RenderedTurn, where: str) -> tuple[str, str]:
        """Split a turn that follows the generation prompt into (opening of the prompt, generated text)."""
        opening = self.template.opening
        thoughts = thoughts_of(turn.message)
        if thoughts and thoughts not in turn.text:  # the template drops the thoughts of a last turn too
            turn.text = f"<think>\n{thoughts}\n</think>\n\n" + turn.text.lstrip("\n")
        text = self._without_empty_block(turn)
        if text.startswith(opening):
            return opening, text[len(opening) :]
        if "</think>" not in opening:
            opened = re.match(r"\s*<think>\s*", text)
            return opening, text[opened.end() :] if opened else f"\n</think>\n\n{text}"
        self._refuse_thoughts(turn, text, where)
        empty = _EMPTY_BLOCK.match(text)
        if empty is None and text.lstrip().startswith("<think>"):  # a turn that is not learned
            return "", text
        return opening, text[empty.end() :] if empty else text

    def _without_empty_block(self, turn: _RenderedTurn) -> str:
        """Return a turn's text without the empty think block that the template writes before a truncated thought."""
        return _EMPTY_BLOCK.sub("", turn.text) if is_cut_thought(turn.message["content"]) else turn.text

    def _refuse_thoughts(self, turn: _RenderedTurn, text: str, where: str) -> None:
        """Raise DataError if a learned turn has thoughts but its generation prompt ends in an empty think block."""
        is_learned = turn.message.get("in_loss") is not False
        thinks = text.lstrip().startswith("<think>") and not _EMPTY_BLOCK.match(text)
        if "</think>" in self.template.opening and is_learned and thinks:
            raise DataError(
                f"{where}: the answer has thoughts ({thoughts_of(turn.message)[:40]!r}), but the generation prompt turns "
                f"thinking off ({self.template.generation_prompt!r}); set enable_thinking: true in chat_template_kwargs, "
                "or remove the thoughts from the data"
            )

    def _learned(self, escaped: EscapedTexts, text: str, turn: _RenderedTurn) -> list[TemplateSegment]:
        """Return segments of an assistant's text, in the loss unless the row excludes the message (`in_loss: False`)."""
        is_excluded = turn.message.get("in_loss") is False
        return escaped.segments(text, in_loss=not is_excluded, is_excluded=is_excluded)
