"""Conversations as the chat template writes them, and which of it is learned.

The text of a conversation is `apply_chat_template`'s own, and the prompt of a row is what serving sends for it
(`add_generation_prompt=True`). Of an assistant turn, everything after the generation prompt is in the loss, its
end-of-turn token included; the line break after that token is never generated, so it is not. This decides:

- **A turn without thoughts.** Qwen3's template writes an empty think block into the last turn, and it is learned, for
  the prompt asks for thoughts. With `enable_thinking: false` the block belongs to the generation prompt, hence is not
  learned. Where the generation prompt opens `<think>` (Qwen3-Thinking, Qwen3.5), such a turn first closes it.
- **A completion** begins with a turn written as the template writes a last turn, because that is how it was asked for.
  What follows in the same completion stands as the template writes it in the whole conversation.
- **Earlier turns of `messages`** are learned as the template writes them. Qwen3's leaves the thoughts of turns before
  the last question out, so these are learned as answers without thoughts, in the context in which serving shows them to
  the turns that follow. `preserve_thinking: true` writes and learns each turn as if it were the last: each is then
  prompted as in serving, but the later ones see thoughts that serving would not show. `false` takes the thoughts out of
  earlier turns for templates that would keep them.
- **Thoughts of learned turns** go where the template reads them: into the content for a template without
  `reasoning_content`, out of the content for one that has only that field (Qwen3.8). Turns of a prompt stay as they are.
- Prompt and answer are tokenized apart, as in generation; the text of control tokens in a turn is text (rlqwen.data.control_tokens).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlqwen.data.control_tokens import (
    PLACEHOLDER,
    ControlTokenEscaper,
    EscapedTexts,
    TemplateSegment,
    control_tokens,
    special_tokens,
)
from rlqwen.data.messages import without_loss_marks
from rlqwen.data.reasoning import (
    drop_earlier_thoughts,
    is_cut_thought,
    reads_think_tags,
    text_beside_thoughts,
    thoughts_in_content,
    thoughts_in_field,
    thoughts_of,
)
from rlqwen.data.template_source import default_template, refusals
from rlqwen.errors import DataError, ModelError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINK_AT_END = re.compile(r"<think>\s*(</think>\s*)?\Z")
_EMPTY_BLOCK = re.compile(r"\A\s*<think>\s*</think>\s*")
_PROBE: Message = {"role": "user", "content": "probe"}


@dataclass(slots=True)
class _RenderedTurn:
    """One assistant turn of a rendered conversation."""

    before: str
    """Everything since the assistant turn before it, its own header included."""
    text: str
    """What stands between the header and the end of the turn, end-of-turn token included."""
    message: Message
    is_last: bool
    """No turn of any role follows."""


class ChatFormat:
    """A tokenizer's chat template, with what is needed to mask its text and to escaper control tokens.

    Raises ModelError if there is no template, or one that writes no generation prompt or doesn't end assistant turns
    with a special token. `chat_template` overrides the tokenizer's; `chat_template_kwargs` go to every rendering;
    `preserve_thinking` concerns whole conversations (see the module).
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        preserve_thinking: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template or default_template(tokenizer)
        self.kwargs = chat_template_kwargs or {}
        self.preserve_thinking = preserve_thinking
        self.drops_text = False
        """Whether the template has left out what some answer says outside its think block, beside the end of it."""
        self.moves_thoughts = False
        """Whether some answer's thoughts were taken out of its content, where the template does not look for them."""
        self._known_structures: set[tuple[str, ...]] = set()
        prompt = self._find_generation_prompt()
        opening = _THINK_AT_END.search(prompt)
        self.generation_prompt = prompt
        """What the template appends for the model to go on from, such as `<|im_start|>assistant\\n`."""
        self.opening = opening.group() if opening else ""
        """The part of the generation prompt that opens a think block, or opens and closes it; may be empty."""
        self._header = prompt[: opening.start()] if opening else prompt
        self.end_of_turn = self._find_end_of_turn()
        """The special token that ends an assistant turn: generation must stop at it."""
        self._escaper = ControlTokenEscaper([*control_tokens(tokenizer, self.template), self._header, self.end_of_turn])

    def conversation(self, messages: list[Message], where: str, *, tools: Any = None) -> list[TemplateSegment]:
        """Return segments of a whole conversation; each assistant turn is in the loss unless its row says otherwise."""
        (messages, tools), escaped = self._escaper.hide((self.place_thoughts(messages, 0), tools))
        if self.preserve_thinking is False:
            messages = drop_earlier_thoughts(messages)
        kwargs = {} if self.preserve_thinking is None else {"preserve_thinking": self.preserve_thinking}
        turns, rest = self._turns(messages, where, tools, kwargs)
        segments: list[TemplateSegment] = []
        for turn in turns:
            if self.preserve_thinking and not turn.is_last:
                turn.text = self._as_last(turn.message, where, kwargs)
            opening, learned = (self._continue if self.preserve_thinking else self._split)(turn, where)
            segments += escaped.segments(turn.before + opening) + self._learned(escaped, learned, turn)
        return segments + escaped.segments(rest)

    def exchange(
        self, prompt: list[Message], completion: list[Message], where: str, *, tools: Any = None
    ) -> tuple[list[TemplateSegment], list[TemplateSegment]]:
        """Return segments of a prompt as serving sends it, and of a completion whose assistant turns are in the loss.

        A completion that begins with another role goes on from no generation prompt: then the prompt is what stands
        before its first assistant turn.
        """
        placed = self.place_thoughts([*prompt, *completion], len(prompt))
        (messages, tools), escaped = self._escaper.hide((placed, tools))
        turns, rest = self._turns(messages, where, tools)
        num_asked = sum(message["role"] == "assistant" for message in prompt)
        if num_asked == len(turns):
            return escaped.segments("".join(turn.before + turn.text for turn in turns) + rest), []
        first = turns[num_asked]
        if completion[0]["role"] == "assistant":
            if not first.is_last:
                first.text = self._as_last(first.message, where)
            _, learned = self._continue(first, where)
            before = self._render(messages[: len(prompt)], where, tools, add_generation_prompt=True)
        else:
            opening, learned = self._split(first, where)
            before = "".join(turn.before + turn.text for turn in turns[:num_asked]) + first.before + opening
        segments = self._learned(escaped, learned, first)
        for turn in turns[num_asked + 1 :]:
            opening, learned = self._split(turn, where)
            segments += escaped.segments(turn.before + opening) + self._learned(escaped, learned, turn)
        return escaped.segments(before), segments + escaped.segments(rest)

    def prompt(self, messages: list[Message], where: str, *, tools: Any = None) -> list[TemplateSegment]:
        """Pieces of a prompt that ends in the generation prompt, rendered as serving renders it."""
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the prompt ends in an assistant turn, so there is nothing left to generate; "
                "end it with a user or tool turn"
            )
        (messages, tools), escaped = self._escaper.hide((messages, tools))
        self._check_structure(messages, where, tools)
        return escaped.segments(self._render(messages, where, tools, add_generation_prompt=True))

    def empty_answer(self) -> list[TemplateSegment]:
        """Return segments of an empty answer, all in the loss."""
        return self.exchange([_PROBE], [{"role": "assistant", "content": ""}], "chat template")[1]

    def place_thoughts(self, messages: list[Message], first: int = 0) -> list[Message]:
        """Move thoughts of the turns from `first` on to where the template reads them."""
        learned = messages[first:]
        if not self._writes_thoughts:
            if all("reasoning_content" not in message for message in learned):
                return messages
            return messages[:first] + [thoughts_in_content(message) for message in learned]
        if not any("</think>" in message["content"] for message in learned) or self._reads_think_tags:
            return messages
        placed = [thoughts_in_field(message) for message in learned]
        for message, moved in zip(learned, placed, strict=True):
            self.moves_thoughts |= message is not moved
            self.drops_text |= message is not moved and bool(text_beside_thoughts(message["content"]))
        return messages[:first] + placed

    def render(self, messages: list[Message]) -> str:
        """Return the text that the template writes for a conversation; raise jinja2.TemplateError if it refuses."""
        return str(
            self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, **self.kwargs)
        )

    def _turns(
        self, messages: list[Message], where: str, tools: Any, kwargs: dict[str, Any] | None = None
    ) -> tuple[list[_RenderedTurn], str]:
        """Return the assistant turns of a rendered conversation, and the text after the last."""
        self._check_structure(messages, where, tools)
        text = self._render(messages, where, tools, kwargs=kwargs)
        turns: list[_RenderedTurn] = []
        place = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._find_turn(text, place, where)
            turn = _RenderedTurn(text[place:start], text[start:end], message, number == len(messages) - 1)
            self._check_turn(turn, where)
            turns.append(turn)
            place = end
        if self._header in text[place:]:
            raise DataError(f"{where}: the chat template reorders, repeats or drops turns")
        return turns, text[place:]

    def _find_turn(self, text: str, place: int, where: str) -> tuple[int, int]:
        """Return begin and end of the first assistant turn after `place`, without its header."""
        header = text.find(self._header, place)
        end = text.find(self.end_of_turn, header + len(self._header)) if header >= 0 else -1
        if end < 0:
            self._require_header()
            raise DataError(f"{where}: the chat template reorders, repeats or drops turns")
        return header + len(self._header), end + len(self.end_of_turn)

    def _check_turn(self, turn: _RenderedTurn, where: str) -> None:
        """Raise DataError if the template drops a part of a turn; it may drop thoughts (see `_continue`)."""
        answer = turn.message["content"].rpartition("</think>")[2].strip()
        if answer not in turn.text:
            raise DataError(f"{where}: the chat template writes another answer than the row has: {answer!r:.200}")
        if text_beside_thoughts(turn.message["content"]) and turn.message["content"].strip() not in turn.text:
            self.drops_text = True
        calls = turn.message.get("tool_calls") or []
        if any(call["function"]["name"] not in turn.text for call in calls):
            raise DataError(
                f"{where}: a turn has tool calls, but the chat template writes none; set chat_template_path"
            )

    def _as_last(self, message: Message, where: str, kwargs: dict[str, Any] | None = None) -> str:
        """Return the text that the template writes for a turn when no other follows."""
        text = self._render([_PROBE, message], where, kwargs=kwargs)
        return text[slice(*self._find_turn(text, 0, where))]

    def _split(self, turn: _RenderedTurn, where: str) -> tuple[str, str]:
        """Split a turn as the template writes it into what its prompt ends in and what is learned."""
        if turn.is_last:
            return self._continue(turn, where)
        text = self._without_empty_block(turn)
        self._refuse_thoughts(turn, text, where)
        learned = text.removeprefix(self.opening)
        return text[: len(text) - len(learned)], learned

    def _continue(self, turn: _RenderedTurn, where: str) -> tuple[str, str]:
        """Split a turn into the text in the generation prompt and the text that the model then writes."""
        thoughts = thoughts_of(turn.message)
        if thoughts and thoughts not in turn.text:  # the template drops the thoughts of a last turn too
            turn.text = f"<think>\n{thoughts}\n</think>\n\n" + turn.text.lstrip("\n")
        text = self._without_empty_block(turn)
        if text.startswith(self.opening):
            return self.opening, text[len(self.opening) :]
        if "</think>" not in self.opening:
            opened = re.match(r"\s*<think>\s*", text)
            return self.opening, text[opened.end() :] if opened else f"\n</think>\n\n{text}"
        self._refuse_thoughts(turn, text, where)
        empty = _EMPTY_BLOCK.match(text)
        if empty is None and text.lstrip().startswith("<think>"):  # a turn that is not learned
            return "", text
        return self.opening, text[empty.end() :] if empty else text

    def _without_empty_block(self, turn: _RenderedTurn) -> str:
        """Return a turn's text without the empty block that the template writes before a thought that never ends."""
        return _EMPTY_BLOCK.sub("", turn.text) if is_cut_thought(turn.message["content"]) else turn.text

    def _refuse_thoughts(self, turn: _RenderedTurn, text: str, where: str) -> None:
        """Raise DataError if a learned turn thinks although its generation prompt ends in an empty think block."""
        is_learned = turn.message.get("in_loss") is not False
        thinks = text.lstrip().startswith("<think>") and not _EMPTY_BLOCK.match(text)
        if "</think>" in self.opening and is_learned and thinks:
            raise DataError(
                f"{where}: the answer thinks ({thoughts_of(turn.message)[:40]!r}), but the generation prompt says that it "
                f"doesn't ({self.generation_prompt!r}); set enable_thinking: true in chat_template_kwargs, or take the "
                "thoughts out of the data"
            )

    def _learned(self, escaped: EscapedTexts, text: str, turn: _RenderedTurn) -> list[TemplateSegment]:
        """Return segments of an assistant's text, in the loss unless the row marks the turn (`in_loss: False`)."""
        is_excluded = turn.message.get("in_loss") is False
        return escaped.segments(text, in_loss=not is_excluded, is_excluded=is_excluded)

    def _check_structure(self, messages: list[Message], where: str, tools: Any) -> None:
        """Each sequence of roles is tried once: a template that silently leaves a turn out is an error."""
        if tools and not self._writes_tools:
            raise DataError(f"{where}: the row has tools, but the chat template writes none; set chat_template_path")
        roles = tuple(message["role"] for message in messages)
        if roles in self._known_structures:
            return
        probe = [{"role": role, "content": f"{PLACEHOLDER}{i}{PLACEHOLDER}"} for i, role in enumerate(roles)]
        rendered = self._render(probe, where)
        for i, role in enumerate(roles):
            if f"{PLACEHOLDER}{i}{PLACEHOLDER}" not in rendered:
                raise DataError(
                    f"{where}: the chat template drops turn {i}, of role {role!r}; rename the role or mend it"
                )
        places = [
            rendered.index(f"{PLACEHOLDER}{i}{PLACEHOLDER}") for i, role in enumerate(roles) if role == "assistant"
        ]
        if places != sorted(places):
            raise DataError(f"{where}: the chat template reorders turns (roles {', '.join(roles)})")
        self._known_structures.add(roles)

    def _render(
        self,
        messages: list[Message],
        where: str,
        tools: Any = None,
        add_generation_prompt: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        with refusals(messages, where):
            text = self.tokenizer.apply_chat_template(
                without_loss_marks(messages),
                tools=tools or None,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(self.kwargs | (kwargs or {})),
            )
        return str(text)

    @cached_property
    def _writes_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {}}}
        return "probe_tool" in self._render([_PROBE], "chat template", [tool])

    @cached_property
    def _writes_thoughts(self) -> bool:
        answer = {"role": "assistant", "content": "answer", "reasoning_content": PLACEHOLDER}
        return PLACEHOLDER in self._render([_PROBE, answer], "chat template")

    @cached_property
    def _reads_think_tags(self) -> bool:
        return reads_think_tags(lambda messages: self._render(messages, "chat template"))

    @property
    def unread_kwargs(self) -> list[str]:
        """Return names in `chat_template_kwargs` that the template does not mention, so that they change nothing."""
        return [name for name in self.kwargs if not re.search(rf"\b{re.escape(name)}\b", self.template)]

    @cached_property
    def writes_think_blocks(self) -> bool:
        """Return whether the template writes thoughts, or opens a think block in the generation prompt."""
        return self._writes_thoughts or bool(self.opening)

    def _find_generation_prompt(self) -> str:
        plain, prompted = (self._render([_PROBE], "chat template", None, flag) for flag in (False, True))
        if not prompted.startswith(plain) or prompted == plain:
            raise ModelError(
                "the chat template writes no generation prompt (add_generation_prompt changes nothing), so the model "
                "would not know that it is its turn; set chat_template_path to another template"
            )
        return prompted[len(plain) :]

    def _render_answer(self) -> tuple[str, str]:
        """Return the text that the template writes before and after the content of an assistant turn."""
        rendered = self._render([_PROBE, {"role": "assistant", "content": PLACEHOLDER}], "chat template")
        before, _, after = rendered.rpartition(PLACEHOLDER)
        return before, after

    def _find_end_of_turn(self) -> str:
        tail = self._render_answer()[1]
        special = sorted(special_tokens(self.tokenizer), key=len, reverse=True)
        end = next((token for token in special if tail.startswith(token)), None)
        if end is None:
            raise ModelError(
                f"the chat template ends an assistant turn with {tail!r} and not with a special token, so generation "
                "would never stop; set chat_template_path to another template"
            )
        return end

    def _require_header(self) -> None:
        """Raise ModelError if assistant turns begin differently from the generation prompt."""
        before = self._render_answer()[0]
        head = before[: match.start()] if (match := _THINK_AT_END.search(before)) else before
        if not head.endswith(self._header):
            raise ModelError(
                f"the chat template opens an assistant turn with {head[-40:]!r}, but prompts generation with "
                f"{self.generation_prompt!r}: what is trained would not be what is asked for"
            )
