"""Mask personal data and secrets by patterns: matches are replaced by `[EMAIL]`, `[PHONE]` and so on.

Precision matters most, because a masked number in a sum breaks the row. Therefore checksums and fixed formats are
verified, and numbers in sums or after a currency sign are not masked. The patterns do not find data that looks like
ordinary text: names, addresses, passwords in prose, US phone numbers without separators, and landline numbers without
an area code.

    key           API keys and tokens by their issuers' prefixes, private key blocks, JSON web tokens, `Bearer` tokens,
                  passwords in a URL, values assigned to a name such as `api_key`
    email         local part, @, domain with a top-level domain
    id_card       Chinese resident identity number: 18 characters with a real date and the right check digit (GB 11643)
    credit_card   15 to 19 digits with an issuer's prefix and the right Luhn check digit
    ip            IPv4 and IPv6, except loopback, netmask and unspecified addresses, and text that looks like a version
    phone         Chinese mobile and landline, international with + and a country code, US numbers with separators
"""

import datetime
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import get_args

from rlqwen.config.cleaning import MaskKind

KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
"""Kinds in search order: the most certain first."""


@dataclass(frozen=True, slots=True)
class Detector:
    """Find one kind of data; the group `masked` of the pattern is replaced, or else the whole match."""

    pattern: re.Pattern[str]
    is_valid: Callable[[re.Match[str]], bool]
    """Verify a match, for example by its checksum."""
    may_occur: Callable[[str], object]
    """Fast check before the slow search: false if the text cannot contain a match."""


def mask_text(text: str, kinds: Collection[MaskKind]) -> tuple[str, Counter[str]]:
    """Return the text with placeholders, and the number of replacements by kind."""
    counts: Counter[str] = Counter()
    before = -1
    while counts.total() > before:  # a masked match may have hidden its neighbor
        before = counts.total()
        text = _mask_once(text, kinds, counts)
    return text, counts


def _mask_once(text: str, kinds: Collection[MaskKind], counts: Counter[str]) -> str:
    for kind in KINDS:
        if kind not in kinds:
            continue
        for detector in DETECTORS[kind]:
            if detector.may_occur(text):
                text, found = _replace(text, detector, f"[{kind.upper()}]")
                if found:
                    counts[kind] += found
    return text


def _replace(text: str, detector: Detector, placeholder: str) -> tuple[str, int]:
    parts: list[str] = []
    end = 0
    for match in detector.pattern.finditer(text):
        if detector.is_valid(match):
            group = "masked" if "masked" in match.re.groupindex else 0
            parts += [text[end : match.start(group)], placeholder]
            end = match.end(group)
    return ("".join([*parts, text[end:]]), len(parts) // 2) if parts else (text, 0)


def _mixes(match: re.Match[str]) -> bool:
    """Return whether a value has both letters and digits, as a secret has, unlike the name of a variable."""
    value = match["masked"]
    return bool(re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value))


def _is_id_card(match: re.Match[str]) -> bool:
    """Return whether the check digit (ISO 7064 MOD 11-2, GB 11643-1999) is right and the date exists."""
    number = match.group().upper()
    total = sum(int(digit) * pow(2, 17 - index, 11) for index, digit in enumerate(number[:17]))
    if "10X98765432"[total % 11] != number[17]:
        return False
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    return True


def _is_credit_card(match: re.Match[str]) -> bool:
    """Return whether Luhn's checksum is right: with every second digit from the right doubled, digit sums add to 10n."""
    digits = [int(digit) for digit in match.group() if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_VERSION_BEFORE = re.compile(
    r"(?:\bv|version|\bver\.?|release|build|section|chapter|版本|[A-Za-z]/)[号:：=\s]*\Z", re.IGNORECASE
)


def _is_ipv4(match: re.Match[str]) -> bool:
    """Return whether a match is an address, and not a version or section number."""
    address = ipaddress.IPv4Address(match.group())
    parts = match.group().split(".")
    if address.is_loopback or address.is_unspecified or parts[0] == "255" or all(len(part) == 1 for part in parts):
        return False
    return not _VERSION_BEFORE.search(match.string[max(0, match.start() - 16) : match.start()])


def _is_ipv6(match: re.Match[str]) -> bool:
    """Return whether a match is a valid address with a group of four characters, unlike slices or ratios (`1::2`)."""
    try:
        address = ipaddress.IPv6Address(match.group())
    except ValueError:
        return False
    return re.search(r"\b(?=\w*\d)\w{4}\b", match.group()) is not None and not address.is_loopback


def _is_international(match: re.Match[str]) -> bool:
    """Return whether a number has 8 to 13 digits, or ten after +1, of which the first is 2 to 9.

    E.164 allows up to 15 digits, but text with 14 or 15 digits is usually a sum.
    """
    digits = re.sub(r"\D", "", match.group())
    if digits.startswith("1"):
        return re.fullmatch(r"1[2-9]\d{9}", digits) is not None
    return 8 <= len(digits) <= 13 and not digits.endswith("00000")


def _is_mobile(match: re.Match[str]) -> bool:
    return not match.group().endswith("00000")


# Country calling codes of the E.164 plan, except +1.
_COUNTRY = (
    r"(?:7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|(?:2[1-689]|3[578]|42|5[09]|6[7-9]|8[057-8]|9[679])\d)"
)
# Not inside a word or number, and not after a currency sign, an operator or the path of a URL. Two stars are bold type.
_BEFORE = r"(?<![\w$¥€£￥+^-])(?<!\d\.)(?<![^*]\*)(?<![A-Za-z]/)(?<![\d)\s]=)(?<![\w)] [=*×÷+] )"
# Not before the rest of a number, an operator or a currency unit.
_AFTER = r"(?![\w%^]|[.-]\d|,\d{3}(?!\d)|\s*(?:[=×÷]|\*(?!\*)|[+-]\s*\d|元|美元|万|亿|dollars|yuan))"


_has_digits = re.compile(r"\d{4}", re.ASCII).search
_has_dotted_numbers = re.compile(r"\d\.\d", re.ASCII).search


def _has(*parts: str) -> Callable[[str], object]:
    return lambda text: any(part in text for part in parts)


def _always(match: re.Match[str]) -> bool:
    return True


def _detector(
    may_occur: Callable[[str], object], pattern: str, is_valid: Callable[[re.Match[str]], bool] = _always
) -> Detector:
    return Detector(re.compile(pattern, re.ASCII), is_valid, may_occur)


DETECTORS: dict[MaskKind, list[Detector]] = {
    "key": [
        _detector(
            _has("PRIVATE KEY"),
            r"-----BEGIN (?P<name>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----[\s\S]*?-----END (?P=name)-----",
        ),
        _detector(_has("AKIA", "ASIA", "AGPA", "AROA"), r"\b(?:AKIA|ASIA|AGPA|AROA)[A-Z0-9]{16}\b"),  # Amazon
        _detector(_has("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),  # GitHub
        _detector(_has("github_pat_"), r"\bgithub_pat_\w{22,255}\b"),
        _detector(_has("glpat-"), r"\bglpat-[\w-]{20,}"),  # GitLab
        _detector(_has("hf_"), r"\bhf_[A-Za-z0-9]{30,}\b"),  # Hugging Face
        _detector(_has("AIza"), r"\bAIza[\w-]{35}(?![\w-])"),  # Google
        _detector(_has("xox"), r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),  # Slack
        _detector(_has("k_live_", "k_test_"), r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}\b"),  # Stripe
        _detector(_has("npm_"), r"\bnpm_[A-Za-z0-9]{36}\b"),
        _detector(_has("eyJ"), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),  # JSON web token
        _detector(_has("://"), r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s/:@\[\]]+:(?P<masked>[^\s/:@\[\]]+)@"),
        _detector(
            _has("sk-"), r"(?<![\w-])(?P<masked>sk-[\w-]{20,})", _mixes
        ),  # OpenAI, Anthropic, DeepSeek, DashScope
        _detector(_has("LTAI"), r"\b(?P<masked>LTAI[A-Za-z0-9]{12,30})\b", _mixes),  # Alibaba Cloud
        _detector(_has("earer "), r"\b[Bb]earer +(?P<masked>[\w.~+/-]{20,}=*)", _mixes),
        _detector(
            _has("key", "Key", "KEY", "oken", "OKEN", "ecret", "ECRET"),
            r"(?i:(?:api|access|secret|private|auth|account)[_-]?(?:access[_-]?)?(?:key|token|secret)|client[_-]?secret)"
            r"[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?P<masked>[\w+/-]{16,}={0,2})",
            _mixes,
        ),
    ],
    "email": [
        _detector(
            _has("@"),
            r"(?<![\w.+-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
            r"[A-Za-z]{2,24}(?!\w)",
        )
    ],
    "id_card": [
        _detector(
            _has_digits,
            r"(?<!\w)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)",
            _is_id_card,
        )
    ],
    "credit_card": [
        _detector(
            _has_digits,
            rf"{_BEFORE}(?:(?:4\d{{3}}|5[1-5]\d\d|2[2-7]\d\d|6011|64[4-9]\d|65\d\d|62\d\d|35\d\d)([ -]?)\d{{4}}(?:\1\d{{4}}){{2}}"
            rf"|3[47]\d\d([ -]?)\d{{6}}\2\d{{5}}|62\d{{15,17}}){_AFTER}",
            _is_credit_card,
        )
    ],
    "ip": [
        _detector(
            _has_dotted_numbers,
            r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?!\w|\.\d)",
            _is_ipv4,
        ),
        _detector(_has(":"), r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:]|\.\d)", _is_ipv6),
    ],
    "phone": [
        _detector(
            _has_digits, rf"{_BEFORE}(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?:([ -]?)\d{{4}}\1\d{{4}}){_AFTER}", _is_mobile
        ),
        _detector(
            _has("+"),
            rf"(?<![\w)+*/=^.-])\+(?:1|{_COUNTRY})(?:[ .-]?\(\d{{1,4}}\))?[ .-]?\d{{1,14}}(?:[ .-]\d{{1,14}}){{0,5}}{_AFTER}",
            _is_international,
        ),
        _detector(
            _has_digits,
            rf"{_BEFORE}(?:1[ .-])?(?:\([1-9]\d\d\)[ -]?\d{{3}}[ .-]\d{{4}}|[1-9]\d\d([.-])\d{{3}}\1\d{{4}}){_AFTER}",
        ),
        _detector(
            _has_digits, rf"{_BEFORE}(?:\(0(?:10|2\d|[3-9]\d\d)\) ?|0(?:10|2\d|[3-9]\d\d)-)[2-9]\d{{6,7}}{_AFTER}"
        ),
    ],
}
