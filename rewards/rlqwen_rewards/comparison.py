"""Compare two answers in canonical notation; math-verify compares formulas."""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify

from rlqwen_rewards.answer_parser import (
    SEPARATOR,
    Amount,
    Choice,
    DateOrTime,
    Items,
    ParsedAnswer,
    Prose,
    Words,
    parse_answer,
    read_measure,
)
from rlqwen_rewards.notation import split, squeeze
from rlqwen_rewards.numerals import Number, read_number, same_number

# It warns that timeouts are off; the caller sets a timeout for the whole comparison if it can.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_CONFIG = (
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=LatexNormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        ),
    ),
)
_EQUALS = re.compile(r"\s*(?<![<>!\\])=\s*|\s*\\in(?![A-Za-z])\s*(?=\\\{|[(\[])")
_APPROX = re.compile(r"\s*\\approx(?![A-Za-z])\s*")
_NAME = re.compile(r"\\?[^\W\d_][^=+*/,;<>]{0,30}|\([A-Za-z](?:\s*,\s*[A-Za-z]){1,4}\)")
_INDEX = re.compile(r"_\d+$")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z]*\{)")
_IRRATIONAL = re.compile(r"\\(?:sqrt|pi|ln|log|sin|cos|tan|exp)(?![A-Za-z])|(?<![A-Za-z])e\b")
_BASE = re.compile(r"\d\s*_")
_JUXTAPOSED = re.compile(r"(?<![\d_^.])[\d.]+\s+\d")
_PRIMES = re.compile(r"([A-Za-z])('+)")
_HUGE = re.compile(r"\d\s*\^\s*\{?\s*\(?[\d.]+\}?\s*\^|\^\s*\{?\s*\d{5,}|\d{4,}\s*!|!\s*!|\d\}?\)*!\^")


def is_meaningful(text: str) -> bool:
    """Return whether a gold answer can be compared with another text."""
    parsed = parse_answer(text)
    if isinstance(parsed, Items):
        return all(map(is_meaningful, parsed.items))
    if isinstance(parsed, Amount):
        return parsed.number is not None or bool(_formula(parsed.text)) or bool(_EQUALS.search(parsed.text))
    return not isinstance(parsed, Prose)


def same(gold: str, answer: str) -> bool:
    """Return whether the answer equals the gold answer. May run for a long time on a hostile formula."""
    if squeeze(gold) == squeeze(answer):
        return True
    gold, answer = _exact(gold, gold), _exact(answer, gold)
    named = _same_without_names(gold, answer)
    if named is not None:
        return named
    left, right = parse_answer(gold), parse_answer(answer)
    if isinstance(left, Prose) or isinstance(right, Prose):
        return False
    if isinstance(left, Choice) or isinstance(right, Choice):
        return _same_choice(gold, left, answer, right)
    if isinstance(left, DateOrTime) or isinstance(right, DateOrTime):
        return isinstance(left, DateOrTime) and isinstance(right, DateOrTime) and _same_date_or_time(left, right)
    if isinstance(left, Items) or isinstance(right, Items):
        return _same_items(gold, left, answer, right)
    if isinstance(left, Words) or isinstance(right, Words):
        return left == right
    return _same_amount(left, right)


def _exact(text: str, gold: str) -> str:
    r"""Return the exact side of `\frac{1}{3} \approx 0.33`, or the approximate side if the gold answer is a decimal."""
    first, *others = split(text, _APPROX)
    number = read_number(gold)
    is_decimal = number is not None and number.form == "decimal"
    return others[-1] if others and is_decimal and read_number(first) is None else first


def _same_without_names(gold: str, answer: str) -> bool | None:
    """Compare the parts after `x =`; None if neither text has one. All numbers of `1 = 2 = 72` must be right."""
    golds, answers = _sides(gold), _sides(answer)
    if len(golds) == len(answers) == 1:
        return None
    if len(golds) > 1:
        is_named = len(golds) == 2 and (_NAME.fullmatch(golds[0]) or not _VARIABLE.search(golds[0]))
        if not is_named and len(answers) == 1:
            return False
        if not is_named or (len(answers) > 1 and not _same_name(golds[0], answers[0])):
            return None  # an equation, not a named value
    value = golds[-1]
    numeric = [side for side in answers[:-1] if not _VARIABLE.search(side) and not _NAME.fullmatch(side)]
    return same(value, answers[-1]) and all(same(value, side) or _same_formula(value, side) for side in numeric)


def _sides(text: str) -> list[str]:
    return split(text, _EQUALS) if _EQUALS.search(text) and len(split(text, SEPARATOR)) == 1 else [text]


def _same_name(gold: str, answer: str) -> bool:
    """Return whether two names match; an index may be omitted, as in `x_1 = 1, x_2 = 2` for `x = 1, x = 2`."""
    left, right = squeeze(gold), squeeze(answer)
    return left == right or _INDEX.sub("", left) == right or left == _INDEX.sub("", right)


def _same_choice(gold: str, left: ParsedAnswer, answer: str, right: ParsedAnswer) -> bool:
    if isinstance(left, Choice) and isinstance(right, Choice):
        both = left.content is not None and right.content is not None
        return left.letter == right.letter and (not both or same(str(left.content), str(right.content)))
    if isinstance(left, Choice):
        return squeeze(answer) == left.letter.lower() or (left.content is not None and same(left.content, answer))
    return isinstance(right, Choice) and right.content is not None and same(gold, right.content)


def _same_date_or_time(left: DateOrTime, right: DateOrTime) -> bool:
    if len(left.parts) != len(right.parts):
        return False
    if len(left.parts) == 4:  # a time of day; a.m. and p.m. matter if the gold answer has them
        return left.parts[:3] == right.parts[:3] and (
            left.parts[3] is None or right.parts[3] is not None or (left.parts[0] or 0) > 12
        )
    return left.parts == right.parts


def _letters(parsed: ParsedAnswer) -> str | None:
    """Return the letters of several choices, `AC` for `A, C`."""
    if not isinstance(parsed, Items) or not parsed.items:
        return None
    choices = [parse_answer(item) for item in parsed.items]
    return "".join(sorted(one.letter if isinstance(one, Choice) and one.content is None else "?" for one in choices))


def _same_items(gold: str, left: ParsedAnswer, answer: str, right: ParsedAnswer) -> bool:
    if _letters(left) == squeeze(answer) or squeeze(gold) == _letters(right):
        return True
    if isinstance(left, Items) and isinstance(right, Items):
        kinds = {left.kind, right.kind}
        if len(kinds) == 1 or kinds == {"list", "set"}:
            return _pair_up(left.items, right.items, is_ordered=left.is_ordered)
        if kinds == {"list", "()"} or (kinds in ({"list", "[]"}, {"()", "[]"}) and len(left.items) > 2):
            return _pair_up(left.items, right.items, is_ordered=True)
        return "list" not in kinds and "set" not in kinds and _same_formula(gold, answer)
    if isinstance(right, Items):
        if right.kind in ("list", "set"):  # one answer, repeated
            return (
                isinstance(left, Choice | Amount)
                and right.kind == "list"
                and all(same(gold, item) for item in right.items)
            )
        return isinstance(left, Amount) and left.number is None and _same_formula(left.text, answer)
    if isinstance(left, Items) and isinstance(right, Amount):
        is_formula = left.kind == "ratio" or (left.kind not in ("list", "rows", "range") and right.number is None)
        return is_formula and _same_formula(gold, right.text)
    return False


def _pair_up(golds: tuple[str, ...], answers: tuple[str, ...], *, is_ordered: bool) -> bool:
    if is_ordered:
        return len(golds) == len(answers) and all(map(same, golds, answers))
    if len(answers) > 2 * len(golds):
        return False
    left = list(answers)
    for gold in golds:
        found = next((answer for answer in left if same(gold, answer)), None)
        if found is None:
            return False
        left.remove(found)
    return all(any(same(gold, answer) for gold in golds) for answer in left)


def _same_amount(gold: Amount, answer: Amount) -> bool:
    ratio = None
    if (gold.number or (gold.unit and gold.unit.dimension)) and answer.number is None:
        answer = read_measure(answer.text) or answer
    if answer.unit and answer.unit.dimension and gold.number is None:
        gold = read_measure(gold.text) or gold
    if gold.unit and answer.unit:
        if gold.unit.dimension != answer.unit.dimension:
            return False
        if gold.unit.dimension:
            ratio = answer.unit.factor / gold.unit.factor
    elif (gold.unit and gold.unit.is_compound) or (answer.unit and answer.unit.is_compound):
        return False
    if gold.number is None:
        return (ratio in (None, 1)) and gold.is_percent == answer.is_percent and _same_formula(gold.text, answer.text)
    if answer.number is None:
        # An expression equals a number only if no number expresses it exactly.
        is_exact = gold.number.form == "decimal" and _IRRATIONAL.search(answer.text)
        return bool(is_exact) and ratio in (None, 1) and _same_formula(gold.text, answer.text)
    if answer.number.form == "power" and gold.number.form != "power":
        return False
    value = answer.number.value * (ratio or 1)
    if answer.number.form == "fraction" and gold.number.form != "fraction" and answer.number.value.denominator == 1:
        return False
    values = {value, value / 100} if answer.is_percent and not gold.is_percent else {value}
    if gold.is_percent and not answer.is_percent:
        values = {value, value * 100}
    return any(same_number(gold.number, Number(one, answer.number.form)) for one in values)


def _same_formula(gold: str, answer: str) -> bool:
    if _BASE.search(gold) or _BASE.search(answer) or _HUGE.search(answer):
        return False  # math-verify ignores the base of a number
    left, right = _formula(gold), _formula(answer)
    try:
        return bool(
            left
            and right
            and verify(list(left), list(right), timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
        )
    except Exception:  # noqa: BLE001 - SymPy raises anything on what it cannot compare
        return False


@lru_cache(maxsize=2048)
def _formula(text: str) -> tuple[Any, ...]:
    """Return a tuple with the SymPy object of a formula that is the whole text; an empty tuple if it is none."""
    if not text or _JUXTAPOSED.search(text):  # math-verify adds adjacent numbers
        return ()
    text = _PRIMES.sub(lambda match: f"{match[1]}_{{{len(match[2]) * 'p'}}}", text)  # math-verify ignores primes
    try:
        found: list[Any] = parse(
            f"${text.replace('$', '')}$",
            _CONFIG,
            "no_fallback",
            "first_match",
            parsing_timeout=None,
            raise_on_error=True,
        )
    except Exception:  # noqa: BLE001 - SymPy and ANTLR raise anything on malformed input
        return ()
    return tuple(found)
