"""Read numbers exactly: integers, decimals, fractions, mixed numbers and powers of integers."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Form = Literal["integer", "decimal", "fraction", "power"]

_MAX_DIGITS = 400
_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_TIMES = r"\s*(?:\\times|\\cdot|\*|x)\s*"
_PATTERN = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?:
      (?P<whole>\d+)\s*\\frac\s*\{{\s*(?P<a>\d+)\s*\}}\s*\{{\s*(?P<b>\d+)\s*\}}
    | (?P<whole2>\d+)[ ]+(?P<a2>\d+)\s*/\s*(?P<b2>\d+)
    | \\frac\s*\{{\s*(?P<p>-?{_UNSIGNED})\s*\}}\s*\{{\s*(?P<q>{_UNSIGNED})\s*\}}
    | \(?(?P<p2>{_UNSIGNED})\s*/\s*(?P<q2>{_UNSIGNED})\)?
    | (?P<repeating>\d+\.\d*)\\(?:overline|dot|bar)\s*\{{?(?P<period>\d+)\}}?
    | (?:(?P<mantissa>{_UNSIGNED}){_TIMES})?10\s*\^\s*\{{?\s*(?P<exponent>[+-]?\d{{1,3}})\s*\}}?
    | (?P<base>\d{{1,9}})\s*\^\s*\{{?\s*(?P<power>\d{{1,3}})\s*\}}?
    | (?P<number>{_UNSIGNED})
    )(?:\s*(?P<scale>hundred|thousand|million|billion|trillion|dozen|百|千|万|亿|十亿|百万|千万)(?![A-Za-z克米瓦卡]))?""",
    re.VERBOSE,
)
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "百": 100, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8, "十亿": 10**9,
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """Hold a number and its notation."""

    value: Fraction
    form: Form
    is_reduced: bool = True
    """False for a fraction with a common factor, such as 2/6 or 48/2."""


def read_number(text: str) -> Number | None:
    """Read a number that is the whole text (in canonical notation); None for an expression or other text."""
    match = _PATTERN.fullmatch(text.strip())
    return _number(match) if match else None


def leading_number(text: str) -> tuple[Number, str] | None:
    """Return the number at the beginning of a text, and the rest of the text."""
    match = _PATTERN.match(text)
    number = _number(match) if match else None
    return (number, text[match.end() :]) if match and number else None


def _number(match: re.Match[str]) -> Number | None:
    try:
        number = _unsigned(match.groupdict())
    except ZeroDivisionError:
        return None
    if number is None:
        return None
    scale = _SCALES[match["scale"]] if match["scale"] else 1
    return Number(number.value * (-scale if match["sign"] == "-" else scale), number.form, number.is_reduced)


def _unsigned(part: dict[str, str | None]) -> Number | None:
    if text := part["number"]:
        return Number(Fraction(text), "decimal" if "." in text else "integer") if len(text) < _MAX_DIGITS else None
    whole = part["whole"] or part["whole2"]
    if whole:
        return Number(
            int(whole) + Fraction(int(part["a"] or part["a2"] or 0), int(part["b"] or part["b2"] or 0)), "fraction"
        )
    p, q = part["p"] or part["p2"], part["q"] or part["q2"]
    if p and q:
        value = Fraction(p) / Fraction(q)
        return Number(value, "fraction", is_reduced=value.denominator == Fraction(q))
    if part["repeating"]:
        digits, period = part["repeating"], part["period"] or ""
        places = len(digits.partition(".")[2])
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10**places)
        return Number(Fraction(digits.rstrip(".")) + tail, "fraction")
    if part["exponent"]:
        value = Fraction(part["mantissa"] or 1) * Fraction(10) ** int(part["exponent"])
        return Number(value, "decimal" if part["mantissa"] else "integer")
    base, power = int(part["base"] or 0), int(part["power"] or 0)
    return Number(Fraction(base**power), "power") if len(str(base)) * power < _MAX_DIGITS else None


def same_number(left: Number, right: Number) -> bool:
    """Compare two numbers: exactly, or to six decimal places if one is a decimal, as math-verify does."""
    if left.value == right.value:
        return True
    if "decimal" not in (left.form, right.form):
        return False
    gap, size = abs(left.value - right.value), max(abs(left.value), abs(right.value))
    return gap <= Fraction(5, 10**7) and gap <= size * Fraction(5, 10**6)
