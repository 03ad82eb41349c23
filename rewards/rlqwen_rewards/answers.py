"""Find the text of a completion and the answer in a text; shared by the rewards that look at answers."""

import re
from collections.abc import Sequence
from typing import Any

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_JOINT = re.compile(r"[\s$]*(?:,|(?:,\s*)?(?:and|or|\\text\{\s*(?:and|or)\s*\}))[\s$]*")
_PERCENT = re.compile(r"[\s$]*\\?%")


def text_of(completion: Any) -> str:
    """The text of a completion: a string, or messages, of which the last with content counts."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        content = message.get("content")
        if isinstance(content, str):
            return content
        if content:
            return "".join(part.get("text", "") for part in content)
    return ""


def final_text(text: str, delimiters: Sequence[str] = ("</think>",)) -> str | None:
    """What follows the reasoning; the whole text if there is none; None if the reasoning was never closed."""
    for delimiter in delimiters:
        if delimiter in text:
            return text.rsplit(delimiter, 1)[1]
    return None if "<think>" in text else text


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every complete outermost `\boxed{...}`: start, end, and what is inside. Braces are balanced, `\{` is no brace.

    One pass, because a model that degenerates writes thousands of boxes that it never closes.
    """
    found: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int] | None] = []  # start of the box and of its content; None for a plain brace
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                start, content_start = box
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, match.end(), text[content_start : match.start()].strip()))
        elif match[0].endswith("{") and match[0] != r"\{":
            open_braces.append((match.start(), match.end()) if match[0].startswith("\\") else None)
    return found


def boxed_answer(text: str) -> str | None:
    r"""What the last box holds; boxes joined by a comma, `and` or `or` right before it are one answer, `a, b`.

    Joining keeps a model from hedging: `\boxed{1} or \boxed{2}` is not the answer 2.
    """
    found = boxes(text)
    if not found:
        return None
    contents = [found[-1][2]]
    for (_, end, content), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        if not _JOINT.fullmatch(text, end, start):
            break
        contents.insert(0, content)
    if _PERCENT.match(text, found[-1][1]) and not contents[-1].endswith("%"):
        contents[-1] += r"\%"
    return ", ".join(contents)


def hashed_answer(text: str) -> str | None:
    """GSM8K's form: the rest of the line after the last `####`."""
    if "####" not in text:
        return None
    lines = text.rsplit("####", 1)[1].strip().splitlines()
    return lines[0].strip() if lines else None


def marked_answer(text: str) -> str | None:
    """The answer that a text marks as such: boxed, else behind `####`, else None. Never an empty string."""
    return boxed_answer(text) or hashed_answer(text) or None


def solutions_of(reward: str, solution: Sequence[Any] | None, answer: Sequence[Any] | None) -> Sequence[Any]:
    """The column that holds the right answers: `solution`, else `answer`."""
    column = solution if solution is not None else answer
    if column is None:
        raise ValueError(f"{reward} needs a data column 'solution' or 'answer' with the right answers")
    return column
