"""Find the text of a completion, and the answer in a text."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

OPEN, CLOSE = "<think>", "</think>"

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_PERCENT = re.compile(r"[\s$]*\\?%")
_FORMULA = r"\$\$[^$]{1,500}\$\$|\$[^$\n]{1,500}\$|\\\([^\n]{1,500}?\\\)|\\\[.{1,500}?\\\]"
_STATED = re.compile(
    rf"(?:answer|答案)[^$\\\n]{{0,50}}?((?:{_FORMULA})(?:[\s,;/|]*(?:and|or|或|和)?\s*(?:{_FORMULA}))*)",
    re.IGNORECASE | re.DOTALL,
)
_ONE_FORMULA = re.compile(_FORMULA, re.DOTALL)
_UNMARKED = re.compile(rf"({_FORMULA})|(?<![\w.])(?<!\d)-?[$€£¥]?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s?%?", re.DOTALL)
_SAID = re.compile(
    r"(?:answer(?:\s+is\b|\s*[:：])|答案\s*[是为:：]+)[\s*_:]*(?!not\b)(\S[^\n]*?)(?=[.。!！]?[\s*_]*(?:\n|$)|[.。!！]\s)",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"[\s*_]*(\(?[A-Z]\)?)[\s*_.。]*")
_TAIL = 2000
"""Number of characters at the end of a text that are searched for an unboxed answer; longer texts could take seconds."""

_HASHED = re.compile(r"####\s*(\S[^\n]*)")
_MISSING = frozenset(("", "nan", "NaN", "<NA>", "NaT"))
_TAGGED = re.compile("<answer>(.*?)</answer>", re.DOTALL)
_LONGEST_JOINT = 80
_JOINING_WORDS = 3
_HEDGE = re.compile(
    r"^(?:,\s*)?(?:or|and|also|else|或|和|以及|还是)|\b(?:maybe|perhaps|possibly|alternatively|otherwise|could|might|either)\b|可能|也许|或者|要么",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:wrong|incorrect|mistake|wait|actually|instead|not?|correct(?:ed|ion)?|so|therefore|thus|hence|final(?:ly)?)\b"
    r"|不对|错|所以|因此|最终",
    re.IGNORECASE,
)
_DECORATION = re.compile(r"\\[()\[\]]|[\s$*.:：。，、]+")
_WORD = re.compile(r"[^\W_]+")


def text_of(completion: Any) -> str:
    """Return the text of a completion: the string, or the last message with content."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        content = message.get("content")
        if isinstance(content, str):
            return content
        if content:
            return "".join(part.get("text", "") for part in content)
    return ""


def texts_of(
    completions: Sequence[Any], prompts: Sequence[Any] | None = None, opened: Sequence[bool] | None = None
) -> list[str]:
    """Return the texts of completions, each preceded by the `<think>` that ends its prompt in some chat templates.

    `opened` says which prompts end with `<think>`. Without it, the text of the prompt decides. If the prompt is messages,
    whose template is unknown here, a completion that closes reasoning without opening it counts as opened.
    """
    texts = [text_of(completion) for completion in completions]
    if opened is None:
        opened = [_was_opened(text, prompt) for text, prompt in zip(texts, prompts or [""] * len(texts), strict=True)]
    return [OPEN + text if is_open else text for text, is_open in zip(texts, opened, strict=True)]


def _was_opened(text: str, prompt: Any) -> bool:
    if not isinstance(prompt, str):
        if not prompt or prompt[-1].get("role") != "assistant":
            return CLOSE in text and OPEN not in text
        prompt = text_of(prompt[-1:])  # the beginning of the model's message
    return bool(prompt.rstrip().endswith(OPEN))


def final_text(text: str, delimiters: Sequence[str] = (CLOSE,)) -> str | None:
    """Return the text after the reasoning; the whole text if there is no reasoning.

    None if the reasoning was never closed, or opened again after an answer.
    """
    for delimiter in delimiters:
        before, closing, final = text.rpartition(delimiter)
        if closing:
            return None if OPEN in final or _answers_between_blocks(before) else final
    return None if OPEN in text else text


def _answers_between_blocks(text: str) -> bool:
    """Return whether an answer is before or between the reasoning blocks of a text whose last block is open."""
    first = text.find(OPEN)
    if first < 0 or (first == 0 and text.find(OPEN, 1) < 0):
        return False
    before, *blocks = text.split(OPEN)
    outside = [before.rsplit(CLOSE, 1)[-1], *(block.rsplit(CLOSE, 1)[1] for block in blocks if CLOSE in block)]
    return any(map(marked_answer, outside))


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return every complete outermost `\boxed{...}` as (start, end, content). Braces are balanced; `\{` is no brace.

    Takes one pass, because a degenerate model may write thousands of unclosed boxes.
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
    r"""Return the content of the last box; boxes with only separators or a few words between them are joined as `a, b`.

    Joining keeps a model from hedging: neither `\boxed{1} or \boxed{2}` nor `\boxed{1}; \boxed{2}` is the answer 2.
    """
    found = boxes(text) if "boxed" in text or "fbox" in text else []
    if not found:
        return None
    contents = [found[-1][2]]
    for (_, end, content), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        if not is_joint(text[end:start]):
            break
        contents.insert(0, content)
    if _PERCENT.match(text, found[-1][1]) and not contents[-1].endswith("%"):
        contents[-1] += r"\%"
    return join(contents)


def is_joint(gap: str) -> bool:
    """Return whether the text between two answers joins them, rather than replaces the first by the second."""
    if len(gap) > _LONGEST_JOINT or CLOSE in gap:
        return False
    gap = _DECORATION.sub(" ", gap).strip()
    if _HEDGE.search(gap):
        return True
    return not _CORRECTION.search(gap) and len(_WORD.findall(gap)) <= _JOINING_WORDS


def join(contents: Iterable[str]) -> str:
    """Join several answers into one, without duplicates."""
    return ", ".join(dict.fromkeys(contents))


def hashed_answer(text: str) -> str | None:
    """Return the line after the last `####` (GSM8K); after several, all that are not corrected later."""
    if "####" not in text:
        return None
    found = list(_HASHED.finditer(text))
    if not found:
        return None
    contents = [found[-1][1].strip()]
    for earlier, later in zip(found[-2::-1], found[:0:-1], strict=True):
        if not is_joint(text[earlier.end() : later.start()]):
            break
        contents.insert(0, earlier[1].strip())
    return join(contents)


def tagged_answer(text: str) -> str | None:
    """Return the text between `<answer>` and `</answer>`; with several tags, all of the texts."""
    end = text.rfind("</answer>")
    found = _TAGGED.findall(text[: end + len("</answer>")]) if end >= 0 else []
    return join(map(str.strip, found)) or None


def stated_answer(text: str) -> str | None:
    """Return the formula after "the answer is"; all of them if there are several and none is corrected later."""
    tail = text[-_TAIL:]
    found = list(_STATED.finditer(tail))
    if not found:
        return None
    contents = _ONE_FORMULA.findall(found[-1][1])
    for earlier, later in zip(found[-2::-1], found[:0:-1], strict=True):
        if not is_joint(tail[earlier.end() : later.start()]):
            break
        contents = _ONE_FORMULA.findall(earlier[1]) + contents
    return join(contents)


def unmarked_answer(text: str) -> str | None:
    """Return the text after "the answer is" (all of them if repeated); otherwise the last formula or number."""
    tail = text[-_TAIL:]
    said = list(_SAID.finditer(tail))
    if not said:
        return _choice_or_number(tail)
    contents = [_choice_or_number(said[-1][1]) or said[-1][1]]
    for earlier, later in zip(said[-2::-1], said[:0:-1], strict=True):
        if not is_joint(tail[earlier.end() : later.start()]):
            break
        contents.insert(0, _choice_or_number(earlier[1]) or earlier[1])
    return join(contents)


def _choice_or_number(text: str) -> str | None:
    """Return a single letter if that is the whole text, otherwise the last formula or number."""
    if choice := _CHOICE.fullmatch(text):
        return choice[1]
    found = [match[0] for match in _UNMARKED.finditer(text)]
    return found[-1].strip() if found else None


def marked_answer(text: str) -> str | None:
    """Return the marked answer: boxed, else after `####`, else in `<answer>`, else None; never an empty string."""
    return boxed_answer(text) or hashed_answer(text) or tagged_answer(text) or None


def solutions_of(reward: str, solution: Sequence[Any] | None, answer: Sequence[Any] | None) -> Sequence[Any]:
    """Return the column with the correct answers: `solution`, else `answer`."""
    column = solution if solution is not None else answer
    if column is None:
        raise ValueError(f"{reward} needs a data column 'solution' or 'answer' with the correct answers")
    return column


def given_solutions(solution: Any) -> list[Any]:
    """Return the accepted answers of one row; [] if the row has none (None, NaN or empty)."""
    given = list(solution) if isinstance(solution, list | tuple) else [solution]
    return [one for one in given if one is not None and str(one).strip() not in _MISSING]
