"""Find and move the thoughts of messages, which are in `reasoning_content` or in think tags before the answer."""

import re
from collections.abc import Callable

from rlqwen.data.control_tokens import PLACEHOLDER
from rlqwen.types import Message

_BLOCK = re.compile(r"<think>.*?</think>", re.DOTALL)
_TOOL_RESULT = ("<tool_response>", "</tool_response>")


def thoughts_of(message: Message) -> str:
    """Return an assistant's stripped thoughts as Qwen's templates read them; empty if there are none."""
    thoughts = message.get("reasoning_content")
    if isinstance(thoughts, str):
        return thoughts.strip()
    before, closed, _ = message["content"].partition("</think>")
    return str(before.rpartition("<think>")[2].strip()) if closed else ""


def is_cut_thought(content: str) -> bool:
    """Return whether an answer opens a think block and never closes it, as a truncated sample does."""
    return content.lstrip().startswith("<think>") and "</think>" not in content


def text_beside_thoughts(content: str) -> str:
    """Return the text before and between the think blocks of an answer, which Qwen's templates drop."""
    return "".join(_BLOCK.split(content)[:-1]).strip()


def thoughts_in_content(message: Message) -> Message:
    """Return the message with its `reasoning_content` moved into the content, in think tags before the answer."""
    thoughts = thoughts_of(message) if message.get("reasoning_content") else ""
    rest: Message = {key: value for key, value in message.items() if key != "reasoning_content"}
    if not thoughts:
        return rest
    return rest | {"content": f"<think>\n{thoughts}\n</think>\n\n" + message["content"].lstrip("\n")}


def thoughts_in_field(message: Message) -> Message:
    """Return the message with the thoughts of its content moved to `reasoning_content`, as Qwen's templates read them.

    Text before the thoughts is dropped. The same object is returned if the content has no thoughts, or if
    `reasoning_content` is set.
    """
    content = message["content"]
    if message["role"] != "assistant" or message.get("reasoning_content") or "</think>" not in content:
        return message
    answer = content.rpartition("</think>")[2].lstrip("\n")
    return message | {"reasoning_content": thoughts_of(message), "content": answer}


def reads_think_tags(render: Callable[[list[Message]], str]) -> bool:
    """Return whether a template that writes `reasoning_content` also finds thoughts in think tags in the content.

    Qwen3.8's template does not: it writes the tags as part of the answer, after an empty think block.
    """
    question, answer = {"role": "user", "content": "probe"}, {"role": "assistant", "content": "answer"}
    in_field = render([question, answer | {"reasoning_content": PLACEHOLDER}])
    in_tags = render([question, answer | {"content": f"<think>\n{PLACEHOLDER}\n</think>\n\nanswer"}])
    return PLACEHOLDER in in_tags and in_tags.count("</think>") <= in_field.count("</think>")


def drop_earlier_thoughts(messages: list[Message]) -> list[Message]:
    """Drop thoughts of assistant messages before the last question, as Qwen3's template does.

    A tool result is not a question: a message that calls a tool keeps its thoughts until the next user message.
    """
    questions = [number for number, message in enumerate(messages) if _is_question(message)]
    last = questions[-1] if questions else len(messages)
    return [
        _without_thoughts(message) if number < last and message["role"] == "assistant" else message
        for number, message in enumerate(messages)
    ]


def _is_question(message: Message) -> bool:
    begin, end = _TOOL_RESULT
    content = message["content"].strip()
    return message["role"] == "user" and not (content.startswith(begin) and content.endswith(end))


def _without_thoughts(message: Message) -> Message:
    rest: Message = {key: value for key, value in message.items() if key != "reasoning_content"}
    _, closed, answer = message["content"].rpartition("</think>")
    return rest | {"content": answer.lstrip("\n")} if closed else rest
