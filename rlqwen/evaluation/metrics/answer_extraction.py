"""The answer that a text comes to, and when two answers are the same. Pure functions."""

import re
import unicodedata
from decimal import Decimal

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_QUOTES = " $\"'`*_“”‘’「」《》"
_STOPS = ".,;:!?。，、；：！？"


def after_reasoning(text: str) -> str:
    """What follows the thoughts; the whole text where there are none, and nothing where they never end."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def marked_answer(text: str) -> str | None:
    r"""The last `\boxed{}`, else the last `<answer>`, else what follows the last `####`; None where nothing is marked."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return str(tagged[-1])
    return text.rpartition("####")[2] if "####" in text else None


def final_answer(text: str) -> str:
    """The answer for counting votes: the marked one, else the last number, else all of the text; normalised."""
    marked = marked_answer(text)
    if marked is None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        marked = numbers[-1] if numbers else text
    return normalise_answer(marked)


def normalise_answer(answer: str) -> str:
    """One spelling for answers that differ in form alone.

    Unicode's compatibility form (full-width digits and letters become plain), small letters, single spaces, neither
    quotes nor emphasis around nor punctuation at the end. Numbers lose thousands separators and trailing zeros.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    bare = text.strip(_QUOTES).rstrip(_STOPS + _QUOTES) or text
    return _plain_number(bare) if _NUMBER.fullmatch(bare) else bare


def same_answer(text: str, reference: str) -> bool:
    """Whether the answers of both texts are the same, normalised: what is marked after the thoughts, else all of it."""
    return _own_answer(text) == _own_answer(reference)


def _plain_number(text: str) -> str:
    number = f"{Decimal(text.replace(',', '')):f}"
    return number.rstrip("0").rstrip(".") if "." in number else number


def _own_answer(text: str) -> str:
    text = after_reasoning(text)
    marked = marked_answer(text)
    return normalise_answer(text if marked is None else marked)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position]
    return text[begin + 1 :]
