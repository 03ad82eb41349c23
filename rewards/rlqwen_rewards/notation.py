"""Write answers in one canonical notation: LaTeX with ASCII characters, without commands that affect only layout."""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

_SIGNS = {
    "\u3000": " ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    "。": ".", "、": ",", "【": "[", "】": "]", "《": "(", "》": ")", "「": '"', "」": '"', "“": '"', "”": '"',
    "‘": "'", "’": "'", "′": "'", "″": "''", "−": "-", "–": "-", "—": "-", "―": "-", "‐": "-", "‑": "-", "∶": ":", "～": "-",
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≃": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "Ø": r"\emptyset ", "∠": r"\angle ", "△": r"\triangle ", "→": r"\to ",
    "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "￥": "¥", "￡": "£", "％": "%",
    "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
}  # fmt: skip
_POWERS = {sign: f"^{{{unicodedata.digit(sign)}}}" for sign in "⁰¹²³⁴⁵⁶⁷⁸⁹"}
_FRACTIONS = {
    sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKD", sign).split("\u2044"))
    for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5E)}
_CHARACTERS = str.maketrans({**_FULL_WIDTH, **_SIGNS, **_POWERS, **_FRACTIONS})

_END = r"(?![A-Za-z])"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[,;:> ]|\\q?quad" + _END + r"|(?<!\\)~|\\(?:thin|med|thick)space" + _END, " "),
        (r"(?<!\\)\\!|\\(?:display|text|script)style" + _END + r"|\\(?:no)?limits" + _END, ""),
        (r"\\[hv]space\*?\{[^{}]*\}|\\hfill" + _END, " "),
        (r"\\(?:left|right|[Bb]igg?[lrm]?)\s*\.(?!\d)", ""),
        (r"\\(?:left|right|middle|[Bb]igg?[lrm]?)" + _END, ""),
        (r"\{\s*,\s*\}", ","),
        (r"\\[dtc]frac" + _END, r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\{\s*\\(?:rm|bf|it|sf)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\math(?:rm|bf|it)\s*\{\s*([eid])\s*\}", r"\1"),
        (r"\\(?:text(?:rm|bf|it|normal|sf|tt)|math(?:rm|it|sf|tt)|[mh]box|operatorname\*?)\s*\{", r"\\text{"),
        (r"\\mathbf\s*\{(?!\s*[A-Za-z]\s*\})", r"\\text{"),  # a single bold letter is a vector
        (r"\\text\s*\{\s*[.,;]?\s*\}|\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\\text\s*\{\s*(,?\s*(?:and|or|或者?|和|与|及))\s*\}", r" \1 "),
        (r"\\text\s*\{([^{}]*?)\s+(and|or)\s*\}", r"\\text{\1} \2 "),
        (r"\\cr" + _END, r"\\\\"),
        (r"\\lbrace" + _END, r"\\{"),
        (r"\\rbrace" + _END, r"\\}"),
        (r"\\(?:leqslant|leq)" + _END + "|<=", r"\\le "),
        (r"\\(?:geqslant|geq)" + _END + "|>=", r"\\ge "),
        (r"\\neq" + _END, r"\\ne "),
        (r"\\varnothing" + _END + r"|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\degree" + _END + r"|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ" + _END + r"|\\text\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"\\%|\\text\{\s*(?:\\?%|percent|per cent|pct)\s*\}", "%"),
        (r"(?<=[\d}])\s*(?:percentage points?|percent|per cent|pct)\b", "%"),
        (r"百分之\s*(\d+(?:\.\d+)?)", r"\1%"),
        (r"(?<![A-Za-z\\])(?:positive )?inf(?:inity)?\b", r"\\infty "),
        (r"(?<=\d)[eE]\+?(-?)0*(\d+)(?![\d.A-Za-z])", r"\\times 10^{\1\2}"),
        (r"\s+", " "),
    )
]
_WRAPPERS = [
    re.compile(pattern)
    for pattern in (
        r"\$\$([^$]*)\$\$", r"\$([^$]+)(?<!\\)\$", r"\\\(((?:(?!\\\)).)*)\\\)", r"\\\[((?:(?!\\\]).)*)\\\]",
        r"\*\*([^*]+)\*\*", r'"([^"]*)"', r"`([^`]*)`", r"\\(?:text|underline|boldsymbol|bm|mathbf)\s*\{([^{}]*)\}", r"\{([^{}]*)\}",
    )
]  # fmt: skip
_LAST = re.compile(r"(?:[\s.,;]|(?<!\\)\\(?=$))+$")
_DOLLAR = re.compile(r"(?<!\\)\$")
_THOUSANDS = re.compile(
    r"(?<![\d.,])(?<!\d )\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,/}])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]| \d)"
)
_BRACKET = re.compile(r"\\begin\b|\\end\b|\\[{}]|\\[lr]angle\b|\\.|[()\[\]{}]", re.DOTALL)
_OPENING = frozenset((r"\begin", r"\{", r"\langle", "(", "[", "{"))
_CLOSING = frozenset((r"\end", r"\}", r"\rangle", ")", "]", "}"))
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_SLASHED = re.compile(r"\\frac\{([A-Za-z]|\d+)\}\{([A-Za-z]|\d+)\}")
_SINGLE = re.compile(r"\{([^{}\\])\}|(?<=[\^_])\{(\d+)\}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    r"""Write equal notations alike: `１，２３４元` becomes `1234元`, `\left(\dfrac12\right)` becomes `(\frac{1}{2})`."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = unwrap(text)
    if len(_DOLLAR.findall(text)) % 2 == 0:  # dollar signs around formulas; a single one is a currency
        text = _DOLLAR.sub("", text)
    return _join_thousands(text.replace(r"\$", "$").strip())


def unwrap(text: str) -> str:
    """Remove trailing punctuation, and signs or commands that enclose the whole text."""
    while True:
        before = text
        text = _LAST.sub("", text.strip())
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        if text == before:
            return text


def squeeze(text: str) -> str:
    r"""Return a comparison key of canonical text: `\text{ cm}`, `{x}` and `\frac{1}{2}` give `cm`, `x`, `1/2`."""
    return _SPACE.sub("", _tidy(text))


def contains(text: str, expression: str) -> bool:
    """Return whether a text contains an expression that is not part of a larger number, word or power; both canonical."""
    pattern = r"\s*".join(map(re.escape, squeeze(expression)))
    return re.search(rf"(?<![\w.^\\]){pattern}(?![\w^]|\.\d)", _tidy(text)) is not None


def _tidy(text: str) -> str:
    return _SINGLE.sub(r"\1\2", _SLASHED.sub(r"\1/\2", plain_text(text)))


def plain_text(text: str) -> str:
    """Return a text without LaTeX's `\\text` commands."""
    return " ".join(_TEXT.sub(r"\1", text).split())


def depths(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, depth after it) of each bracket, brace, and `\\begin` or `\\end`."""
    depth = 0
    for match in _BRACKET.finditer(text):
        if match[0] in _OPENING:
            depth += 1
        elif match[0] in _CLOSING:
            depth -= 1
        else:
            continue
        yield match.start(), match.end(), depth


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at separators outside all brackets."""
    spans = list(_outside(text))
    pieces, start = [], 0
    for match in separator.finditer(text):
        if any(left <= match.start() and match.end() <= right for left, right in spans):
            pieces.append(text[start : match.start()].strip())
            start = match.end()
    pieces.append(text[start:].strip())
    return pieces


def brackets_around(text: str) -> tuple[str, str, str] | None:
    """Return (opening, content, closing) if one pair of brackets encloses the whole text."""
    found = list(depths(text))
    if len(found) < 2 or found[0][0] != 0 or found[-1][1] != len(text) or found[-1][2] != 0:
        return None
    if any(depth <= 0 for _, _, depth in found[:-1]):
        return None
    (_, left, _), (right, _, _) = found[0], found[-1]
    return text[:left], text[left:right].strip(), text[right:]


def _outside(text: str) -> Iterator[tuple[int, int]]:
    start, outside = 0, True
    for left, right, depth in depths(text):
        if outside and depth > 0:
            yield start, left
        outside = depth <= 0
        start = right
    if outside:
        yield start, len(text)


def _join_thousands(text: str) -> str:
    """Remove thousands separators from numbers; inside brackets a comma separates coordinates or members."""
    if not _THOUSANDS.search(text):
        return text
    spans = list(_outside(text))
    return _THOUSANDS.sub(
        lambda match: (
            re.sub("[, ]", "", match[0])
            if " " in match[0] or any(left <= match.start() < right for left, right in spans)
            else match[0]
        ),
        text,
    )
