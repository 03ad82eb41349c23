"""Render a tokenizer's chat template, and probe what the template writes and reads."""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlqwen.data.control_tokens import PLACEHOLDER, special_tokens
from rlqwen.data.messages import without_loss_marks
from rlqwen.data.reasoning import reads_think_tags
from rlqwen.data.template_source import default_template, refusals
from rlqwen.errors import DataError, ModelError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE: Message = {"role": "user", "content": "probe"}
"""User message for renderings that only show how the template behaves."""
_THINK_AT_END = re.compile(r"<think>\s*(</think>\s*)?\Z")


class ChatTemplate:
    """Render conversations, and know how the template opens and ends an assistant turn.

    `text` overrides the tokenizer's template; `kwargs` are passed to every rendering. Raises ModelError if there is no
    template, if it writes no generation prompt, or if it does not end assistant turns with a special token.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", text: str | None = None, kwargs: dict[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.text = text or default_template(tokenizer)
        self.kwargs = kwargs or {}
        self._known_structures: set[tuple[str, ...]] = set()
        prompt = self._find_generation_prompt()
        opening = _THINK_AT_END.search(prompt)
        self.generation_prompt = prompt
        """Text appended to a prompt for the model to continue, such as `<|im_start|>assistant\\n`."""
        self.opening = opening.group() if opening else ""
        """Part of the generation prompt that opens a think block, or opens and closes it; may be empty."""
        self.header = prompt[: opening.start()] if opening else prompt
        """Generation prompt without `opening`: every assistant turn begins with it."""
        self.end_of_turn = self._find_end_of_turn()
        """Special token that ends an assistant turn: generation must stop at it."""

    def render_raw(self, messages: list[Message]) -> str:
        """Return the rendered conversation; raise jinja2.TemplateError if the template refuses it."""
        return str(
            self._tokenizer.apply_chat_template(messages, chat_template=self.text, tokenize=False, **self.kwargs)
        )

    def render(
        self,
        messages: list[Message],
        where: str,
        tools: Any = None,
        *,
        add_generation_prompt: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Return the rendered conversation without its `in_loss` keys; raise DataError if the template refuses it."""
        with refusals(messages, where):
            text = self._tokenizer.apply_chat_template(
                without_loss_marks(messages),
                tools=tools or None,
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(self.kwargs | (kwargs or {})),
            )
        return str(text)

    def check_structure(self, messages: list[Message], where: str, tools: Any) -> None:
        """Raise DataError if the template silently drops or reorders messages, or drops the tools.

        Each sequence of roles is rendered once and remembered.
        """
        if tools and not self._writes_tools:
            raise DataError(f"{where}: the row has tools, but the chat template writes none; set chat_template_path")
        roles = tuple(message["role"] for message in messages)
        if roles in self._known_structures:
            return
        probe = [{"role": role, "content": f"{PLACEHOLDER}{i}{PLACEHOLDER}"} for i, role in enumerate(roles)]
        rendered = self.render(probe, where)
        places: dict[int, int] = {}  # found in one pass: a row may have 100,000 messages
        for found in re.finditer(rf"{PLACEHOLDER}(\d+){PLACEHOLDER}", rendered):
            places.setdefault(int(found[1]), found.start())
        for i, role in enumerate(roles):
            if i not in places:
                raise DataError(
                    f"{where}: the chat template drops message {i}, of role {role!r}; rename the role or change the template"
                )
        starts = [places[i] for i, role in enumerate(roles) if role == "assistant"]
        if starts != sorted(starts):
            raise DataError(f"{where}: the chat template reorders messages (roles {', '.join(roles)})")
        self._known_structures.add(roles)

    def find_turn(self, text: str, start: int, where: str) -> tuple[int, int]:
        """Return (start, end) of the first assistant turn at or after `start` in a rendered text, without its header."""
        header = text.find(self.header, start)
        end = text.find(self.end_of_turn, header + len(self.header)) if header >= 0 else -1
        if end < 0:
            self._require_header()
            raise DataError(f"{where}: the chat template reorders, repeats or drops messages")
        return header + len(self.header), end + len(self.end_of_turn)

    @property
    def unread_kwargs(self) -> list[str]:
        """Return names in `kwargs` that the template does not mention, so that they have no effect."""
        return [name for name in self.kwargs if not re.search(rf"\b{re.escape(name)}\b", self.text)]

    @cached_property
    def writes_thoughts(self) -> bool:
        """Return whether the template writes the key `reasoning_content`."""
        answer = {"role": "assistant", "content": "answer", "reasoning_content": PLACEHOLDER}
        return PLACEHOLDER in self.render([PROBE, answer], "chat template")

    @cached_property
    def reads_think_tags(self) -> bool:
        """Return whether the template finds thoughts in think tags inside the content."""
        return reads_think_tags(lambda messages: self.render(messages, "chat template"))

    @cached_property
    def _writes_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {}}}
        return "probe_tool" in self.render([PROBE], "chat template", [tool])

    def _find_generation_prompt(self) -> str:
        plain, prompted = (self.render([PROBE], "chat template", add_generation_prompt=flag) for flag in (False, True))
        if not prompted.startswith(plain) or prompted == plain:
            raise ModelError(
                "the chat template writes no generation prompt (add_generation_prompt changes nothing), so the model "
                "would not know that it is its turn; set chat_template_path to another template"
            )
        return prompted[len(plain) :]

    def _render_answer(self) -> tuple[str, str]:
        """Return the text that the template writes before and after the content of an assistant message."""
        rendered = self.render([PROBE, {"role": "assistant", "content": PLACEHOLDER}], "chat template")
        before, _, after = rendered.rpartition(PLACEHOLDER)
        return before, after

    def _find_end_of_turn(self) -> str:
        tail = self._render_answer()[1]
        special = sorted(special_tokens(self._tokenizer), key=len, reverse=True)
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
        if not head.endswith(self.header):
            raise ModelError(
                f"the chat template opens an assistant turn with {head[-40:]!r}, but prompts generation with "
                f"{self.generation_prompt!r}: the model would be trained on another prompt than it is given later"
            )
