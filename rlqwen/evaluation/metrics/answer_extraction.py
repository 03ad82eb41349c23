"""Find the answer in a text, and compare two answers. Pure functions."""

import re
import unicodedata
from decimal import Decimal

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_QUOTES = " $\"'`*_“”‘’「」《》"
_STOPS = ".,;:!?。，、；：！？"


def after_reasoning(text: str) -> str:
    """Return what follows the thoughts: the whole text if there are none, an empty one if they never end."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def marked_answer(text: str) -> str | None:
    r"""Return the last `\boxed{}`, else the last `<answer>`, else what follows the last `####`; None without a mark."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return str(tagged[-1])
    return text.rpartition("####")[2] if "####" in text else None


def final_answer(text: str) -> str:
    """Return the answer for counting votes, normalized: the marked one, else the last number, else all of the text."""
    marked = marked_answer(text)
    if marked is None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        marked = numbers[-1] if numbers else text
    return normalize_answer(marked)


def normalize_answer(answer: str) -> str:
    """Return one spelling for answers that differ only in form.

    It has Unicode's compatibility form (full-width digits and letters become plain), lower case, single spaces, no
    quotes or emphasis around it and no punctuation at its end. Numbers lose thousands separators and trailing zeros.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    bare = text.strip(_QUOTES).rstrip(_STOPS + _QUOTES) or text
    return _plain_number(bare) if _NUMBER.fullmatch(bare) else bare


def same_answer(text: str, reference: str) -> bool:
    """Return whether both texts have the same normalized answer: what is marked after the thoughts, else all of it."""
    return _own_answer(text) == _own_answer(reference)


def _plain_number(text: str) -> str:
    number = f"{Decimal(text.replace(',', '')):f}"
    return number.rstrip("0").rstrip(".") if "." in number else number


def _own_answer(text: str) -> str:
    text = after_reasoning(text)
    marked = marked_answer(text)
    return normalize_answer(text if marked is None else marked)


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
