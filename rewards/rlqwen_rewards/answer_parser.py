"""Parse an answer into a choice, a date or time, several answers, an amount with its unit, words, or a formula."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rlqwen_rewards.notation import brackets_around, plain_text, split, unwrap
from rlqwen_rewards.numerals import Number, leading_number, read_number
from rlqwen_rewards.units import Unit, read_unit


@dataclass(frozen=True)
class Choice:
    """Hold the letter of a multiple choice, and the text of the option if it is given."""

    letter: str
    content: str | None


@dataclass(frozen=True)
class DateOrTime:
    """Hold a date (year, month, day), or a time of day; parts that are not given are None."""

    parts: tuple[int | None, ...]


@dataclass(frozen=True)
class Items:
    """Hold several answers in one.

    `kind` is `list`, `set`, `rows`, `row`, `ratio`, `range`, the brackets, or the shape of a matrix.
    """

    kind: str
    items: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("list", "set", "rows")


@dataclass(frozen=True)
class Amount:
    """Hold a number or formula, and its unit if it has one."""

    text: str
    number: Number | None = None
    unit: Unit | None = None
    is_percent: bool = False


@dataclass(frozen=True)
class Words:
    """Hold an answer in words, which is compared letter by letter."""

    text: str


@dataclass(frozen=True)
class Prose:
    """Stand for a text in which no answer is recognized; it equals only itself."""


ParsedAnswer = Choice | DateOrTime | Items | Amount | Words | Prose

_CHOICE_WORD = r"(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:?|故?选项?|答案[是为]?:?)"
_CHOICE = re.compile(
    rf"(?:{_CHOICE_WORD}\s*)?(?:\((?P<a>[A-Ja-j])\)|(?P<b>[A-J]))[.):]?"
    r"|(?:\((?P<c>[A-J])\)[.:]?\s*|(?P<d>[A-J])(?:[.)]\s*|:\s+))(?P<content>\S.*)",
)
_OPTION = re.compile(r"\b[A-J][.):]\s")
_OPERATOR_FIRST = re.compile(r"[-+*/^=<>]|\\(?:times|cdot|div|cup|cap|pm|le|ge|ne|in)\b")
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})[a-z]*\.?"
_DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s*(?P<year>\d{{4}}))?",
        rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}(?:,?\s*(?P<year>\d{{4}}))?",
        rf"{_MONTH},?\s+(?P<year>\d{{4}})",
        r"(?P<year>\d{4})[-/.](?P<number>\d{1,2})[-/.](?P<day>\d{1,2})",
        r"(?:(?P<year>\d{4})年)?(?P<number>\d{1,2})月(?P<day>\d{1,2})[日号]",
        r"(?P<year>\d{4})年(?P<number>\d{1,2})月",
    )
]
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap])?\.?(?:m\.?)?", re.IGNORECASE)
_RANGE = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
_RATIO = re.compile(r"\s*:\s*")
SEPARATOR = re.compile(
    r"\s*[,;]\s*(?:(?:and|or)\b|\\(?:lor|land|vee|wedge)(?![A-Za-z]))?|\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*"
    r"|\s*\\(?:lor|land|vee|wedge)(?![A-Za-z])\s*|(?<=[\d}A-Za-z)])\s*(?:或者?|和|与|以及)\s*|\s*(?:或者?|以及)\s*"
)
_BUILDER = re.compile(r"[A-Za-z](?:\s*\\in\s*\\mathbb\{R\})?\s*(?:\||\\mid\b|:)\s*(\S.*)")
_ROW, _CELL = re.compile(r"\s*\\\\\s*(?:\[[^\]]*\])?"), re.compile(r"\s*(?<!\\)&\s*")
_GRID = re.compile(
    r"(?:\(|\[|(?P<system>\\\{)|\\lbrack)?\s*\\begin\s*\{(?P<name>[pbB]?matrix|smallmatrix|array|[dr]?cases|aligned|gathered)\*?\}"
    r"(?:\s*\{[lcr|@{}\s]*\})?(?P<body>(?:(?!\\begin).)*)\\end\s*\{(?P=name)\*?\}\s*(?:\)|\]|\\\})?"
)
_CONDITION = re.compile(r"\\text\{\s*(?:if|when|for|where|当)?\s*\}|^\s*(?:if|when|for)\b")
_UPRIGHT = r"\\text\{[^{}]*\}|\^\{?-?\d\}?|\^\\circ|\\cdot|[\s/·]"
_UPRIGHT_UNIT = re.compile(rf"(?P<amount>.*?)(?P<unit>\s*\\text\{{\s*[^{{}}]*[^{{}}\s\d][^{{}}]*\}}(?:{_UPRIGHT})*)")
_DEGREES = re.compile(r"(?P<amount>.+?)(?P<unit>\s*\^\\circ\s*(?:[CF]|\\text\{\s*[CF]\s*\})?)")
_BARE_UNIT = re.compile(
    r"\s*(?P<unit>[A-Za-z一-鿿$€£¥][^\d\\=<>{}+,;:()]*(?:\^\{?-?\d\}?)?[A-Za-z一-鿿/ .]*(?:\^\{?-?\d\}?)?)"
)
_CURRENCY = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<unit>(?:US|HK|CA|AU)?\$|[€£¥]|(?:USD|RMB|EUR|Rs\.?)(?=[\s\d]))\s*(?P<amount>\S.*)"
)
_CONNECTIVES = re.compile(
    r"\b(?:or|and|to|than|out|if|not|is|are|was|more|less|but|plus|minus|times|maybe)\b|[或和与到至]"
)
_PIECE = re.compile(r"\s*(?:,|and\b)?\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]+|[一-鿿]+|\^\\circ|''?)")
_PIECE_UNITS = {"'": ("angle", Fraction(1, 60)), "''": ("angle", Fraction(1, 3600)), "分": ("time", Fraction(60))}
_WORD = re.compile(
    r"[^\W\d_]{3,}(?:[ '-][^\W\d_]+){0,4}|(?:[Nn]o|NO|[Oo]n|[Uu]p|[Ii]t|OK)(?: [^\W\d_]{2,}){0,4}|[一-鿿]{1,20}"
)
_NUMBERS = {
    word: number
    for words in (
        "zero one two three four five six seven eight nine ten eleven twelve",
        "零 一 二 三 四 五 六 七 八 九 十",
    )
    for number, word in enumerate(words.split())
}
_ARTICLE = re.compile(r"^(?:the|an?) ", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?:\s+|[.,:;]\s*)[A-Za-z]{2,}|[一-鿿]")


@lru_cache(maxsize=8192)
def parse_answer(text: str) -> ParsedAnswer:
    """Parse a text in canonical notation into one of the types of answers."""
    for reader in _READERS:
        if (parsed := reader(text)) is not None:
            return parsed
    return Prose() if _PROSE.search(plain_text(text)) else Amount(text)


def _read_number(text: str) -> ParsedAnswer | None:
    number = read_number(text)
    return Amount(text, number) if number else None


def _read_grid(text: str) -> ParsedAnswer | None:
    match = _GRID.fullmatch(text)
    if match is None:
        return Items("row", tuple(cells)) if len(cells := split(text, _CELL)) > 1 else None
    rows = [row for row in split(match["body"].strip(), _ROW) if row]
    if match["system"] or "cases" in match["name"] or match["name"] in ("aligned", "gathered"):
        rows = [" & ".join(unwrap(cell) for cell in split(_CONDITION.sub(" ", row), _CELL) if cell) for row in rows]
        return Items("rows" if any(len(split(row, _CELL)) > 1 for row in rows) else "list", tuple(rows))
    cells = [cell for row in rows for cell in split(row, _CELL)]
    return Items(f"matrix of {len(rows)} rows", tuple(cells))


def _read_choice(text: str) -> ParsedAnswer | None:
    match = _CHOICE.fullmatch(plain_text(text))
    if match is None:
        return None
    content = match["content"] or ""
    if _OPERATOR_FIRST.match(content) or _OPTION.search(content):
        return None  # `A + B`, or several options
    return Choice((match["a"] or match["b"] or match["c"] or match["d"]).upper(), match["content"])


def _read_date_or_time(text: str) -> ParsedAnswer | None:
    text = plain_text(text)
    if text[:1].isdigit() and (match := _CLOCK.fullmatch(text)) and int(match[1]) < 25 and int(match[2]) < 60:
        hour = int(match[1]) % 12 + (12 if match[4] in "pP" else 0) if match[4] else int(match[1])
        return DateOrTime((hour, int(match[2]), int(match[3] or 0), None if match[4] is None else 1))
    for pattern in _DATES:
        if match := pattern.fullmatch(text):
            part = match.groupdict()
            month = part.get("number") or _MONTHS.index(part["month"].lower()) + 1
            year, day = (int(part[name]) if part.get(name) else None for name in ("year", "day"))
            return DateOrTime((year, int(month), day))
    return None


def _read_brackets(text: str) -> ParsedAnswer | None:
    found = brackets_around(text)
    if found is None:
        return None
    opening, content, closing = found
    items = tuple(split(content, SEPARATOR))
    if "" in items:
        return None
    if (opening, closing) == (r"\{", r"\}"):
        builder = _BUILDER.fullmatch(content)
        return parse_answer(builder[1]) if builder else Items("set", items)
    if len(items) == 1:
        return parse_answer(items[0]) if (opening, closing) == ("(", ")") else None
    opening, closing = ("(" if opening == r"\langle" else opening), (")" if closing == r"\rangle" else closing)
    return Items(opening + closing, items) if opening in "([" and closing in ")]" else None


def _read_compound(text: str) -> ParsedAnswer | None:
    """Read 2 hours 30 minutes, 5 feet 3 inches, 1小时20分: units of one dimension, largest first."""
    text = plain_text(text)
    total, position = Fraction(0), 0
    sizes: list[Fraction] = []
    dimensions: set[str] = set()
    while position < len(text):
        match = _PIECE.match(text, position)
        if match is None:
            return None
        name = match["unit"]
        unit = read_unit("min" if name == "m" and dimensions == {"time"} else name)
        known = _PIECE_UNITS.get(name) or (unit.dimension and (unit.dimension[0][0], unit.factor))
        if not known:
            return None
        total += Fraction(match["number"]) * known[1]
        sizes.append(known[1])
        dimensions.add(known[0])
        position = match.end()
    if len(sizes) < 2 or len(dimensions) > 1 or sizes != sorted(set(sizes), reverse=True):
        return None
    return Amount(text, Number(total, "decimal"), Unit(text, ((dimensions.pop(), 1),), is_compound=True))


def _read_list(text: str) -> ParsedAnswer | None:
    if match := _RANGE.fullmatch(text):
        return Items("range", match.groups())
    items = tuple(split(text, SEPARATOR))
    if len(items) > 1:
        return Items("list", items) if "" not in items else Prose()
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        minus, plus = (text.replace(r"\pm", sign).strip().removeprefix("+").strip() for sign in "-+")
        return Items("list", (plus, minus))
    items = tuple(split(text, _RATIO))
    return Items("ratio", items) if len(items) > 1 and all(map(read_number, items)) else None


def _read_amount(text: str) -> ParsedAnswer | None:
    if text.endswith("%"):
        amount = text[:-1].strip()
        return Amount(amount, read_number(amount), is_percent=True) if amount else None
    if match := _CURRENCY.fullmatch(text):
        amount, unit = match["sign"] + match["amount"], read_unit(match["unit"])
        inner = _read_amount(match["amount"])  # `$5 per hour`, `$5 USD`
        if isinstance(inner, Amount) and inner.unit is not None:
            amount = match["sign"] + inner.text
        return Amount(amount, read_number(amount), unit) if not _CONNECTIVES.search(amount) else None
    if (start := leading_number(text)) and start[1]:
        number, rest = start
        match = _BARE_UNIT.fullmatch(rest)
        if match and _is_bare_unit(rest, match["unit"]):
            return Amount(text[: len(text) - len(rest)].strip(), number, read_unit(match["unit"].strip()))
    tail = _DEGREES.fullmatch(text) or _UPRIGHT_UNIT.fullmatch(text)
    if tail and (amount := tail["amount"].strip()) and amount[-1] not in "+-*/=^(":
        name = plain_text(tail["unit"]).strip(" .")
        if name and not _CONNECTIVES.search(name) and not _PROSE.search(plain_text(amount)):
            return Amount(amount, read_number(amount), read_unit(name))
    return None


def read_measure(text: str) -> Amount | None:
    """Read a number and a one-letter unit, as in `0.1 m`, which only the context distinguishes from a product."""
    start = leading_number(text)
    unit = read_unit(start[1].strip()) if start and start[1].strip() else None
    return Amount(text, start[0], unit) if start and unit and unit.dimension else None


def _is_bare_unit(rest: str, unit: str) -> bool:
    """Return whether a unit follows, as in `5 apples`, `5cm`, `5 m/s`, `5元`, but not `5x`, `5m`, `5ab`, `5 or 6`."""
    unit = unit.strip(" .")
    if not unit or _CONNECTIVES.search(unit) or len(unit.split()) > 4:
        return False
    if read_unit(unit).dimension is not None:
        return len(unit) > 1 or not unit.isascii()
    return not unit[0].isascii() or (rest[0] == " " and len(unit.split()[0]) > 2 and unit.replace(" ", "").isalpha())


def _read_words(text: str) -> ParsedAnswer | None:
    text = plain_text(text).strip("!. ")
    if text.casefold() in _NUMBERS:
        return Amount(text, Number(Fraction(_NUMBERS[text.casefold()]), "integer"))
    if not _WORD.fullmatch(text):
        return None
    return Words(_ARTICLE.sub("", text.replace("-", " ")).casefold())


_READERS: tuple[Callable[[str], ParsedAnswer | None], ...] = (
    _read_number, _read_grid, _read_choice, _read_date_or_time, _read_brackets, _read_compound, _read_list, _read_amount,
    _read_words,
)  # fmt: skip
