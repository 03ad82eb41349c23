"""Read units, so that 10 cm equals 100 mm but not 10 m, and 2 hours 30 minutes equal 150 minutes."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_TABLE: dict[str, dict[str, str | int | Fraction]] = {
    "length": {
        "m meter metre 米": 1, "km kilometer kilometre 千米 公里": 1000, "dm 分米": "0.1",
        "cm centimeter centimetre 厘米": "0.01", "mm millimeter millimetre 毫米": "0.001", "inch inches": "0.0254",
        "ft foot feet": "0.3048", "yd yard": "0.9144", "mi mile": "1609.344",
    },
    "mass": {
        "g gram 克": 1, "kg kilogram 千克 公斤": 1000, "mg milligram 毫克": "0.001", "ton tonne 吨": 1000000,
        "lb lbs pound": "453.59237", "oz ounce": "28.349523125", "斤": 500,
    },
    "time": {
        "s sec second 秒 秒钟": 1, "min mins minute 分钟": 60, "h hr hrs hour 小时 时": 3600, "day 天": 86400,
        "week 周 星期": 604800, "ms millisecond 毫秒": "0.001",
    },
    "months": {"month 个月": 1, "year yr yrs 年": 12},
    "area": {"acre": "4046.8564224", "hectare ha 公顷": 10000},
    "volume": {"L l liter litre 升": 1, "mL ml milliliter millilitre 毫升": "0.001", "gallon gal": "3.785411784"},
    "dollar": {"$ dollar USD 美元": 1, "cent 美分": "0.01"},
    "yuan": {"元 yuan RMB 人民币 ¥ CNY 块": 1, "角": "0.1"},
    "euro": {"€ euro EUR 欧元": 1},
    "sterling": {"£ GBP 英镑": 1},
    "angle": {r"^\circ degree deg 度": 1},
    "radian": {"rad radian 弧度": 1},
    "temperature": {r"^\circC celsius 摄氏度": 1},
    "fahrenheit": {r"^\circF fahrenheit 华氏度": 1},
    "speed": {"mph": "0.44704", "kph kmh kmph": Fraction(5, 18)},
    **{name: {names: 1} for name, names in {
        "force": "N newton 牛 牛顿", "energy": "J joule 焦 焦耳", "power": "W watt 瓦 瓦特", "voltage": "V volt 伏 伏特",
        "current": "A ampere amp 安 安培", "resistance": "ohm 欧 欧姆", "frequency": "Hz hertz 赫兹", "kelvin": "K kelvin",
        "pressure": "Pa pascal 帕", "amount": "mol mole 摩尔", "charge": "C coulomb 库仑",
    }.items()},
}  # fmt: skip
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, units in _TABLE.items()
    for names, factor in units.items()
    for name in names.split()
}
_DERIVED = {
    (("length", 1), ("time", -1)): ((("speed", 1),), Fraction(1)),
    (("length", 3),): ((("volume", 1),), Fraction(1000)),
    (("length", 2),): ((("area", 1),), Fraction(1)),
}
"""Power or quotient of dimensions -> (dimension that it equals, factor)."""

_TOKEN = re.compile(
    r"(?P<per>/|\bper\b|每)|(?P<prefix>\b(?:square|sq|cubic|cu)\b\.?|平方|立方)"
    r"|(?P<name>\^\\circ ?[CF]?|[$€£¥]|[A-Za-z]+|[一-鿿]+?(?=每|平方|立方|[^一-鿿]|$))"
    r"(?:\s*\^?\s*\{?\s*(?P<power>-?\d)\s*\}?)?|\\cdot|[\s*.·]"
)
_PREFIXES = {"s": 2, "平": 2, "c": 3, "立": 3}


@dataclass(frozen=True)
class Unit:
    """Hold a unit of measure, or the name of counted things."""

    name: str
    dimension: tuple[tuple[str, int], ...] | None = None
    """Base dimensions and their powers; None for counted things."""
    factor: Fraction = Fraction(1)
    """Size in the dimension's base unit."""
    is_compound: bool = False
    """Whether it has several units, such as 2 hours 30 minutes, so that the number alone is meaningless."""


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit:
    """Return the unit that a text names; a unit outside the table counts as the name of counted things."""
    dimensions: dict[str, int] = {}
    factor, sign, prefix, position = Fraction(1), 1, 1, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return Unit(text)
        position = match.end()
        if match["per"]:
            sign = -1
        elif match["prefix"]:
            prefix = _PREFIXES[match["prefix"][0]]
        elif match["name"]:
            found = _lookup(match["name"].replace(" ", ""))
            if found is None:
                return Unit(text)
            power = sign * prefix * int(match["power"] or 1)
            dimensions[found[0]] = dimensions.get(found[0], 0) + power
            factor, prefix = factor * found[1] ** power, 1
    dimension = tuple(sorted((name, power) for name, power in dimensions.items() if power))
    if dimension in _DERIVED:
        dimension, scale = _DERIVED[dimension]
        factor *= scale
    return Unit(text, dimension, factor) if dimension else Unit(text)


def _lookup(name: str) -> tuple[str, Fraction] | None:
    for spelling in (name, name.lower() if len(name) > 3 else name):
        for singular in (spelling, spelling.removesuffix("s") if len(spelling) > 2 else spelling):
            if singular in _UNITS:
                return _UNITS[singular]
    return None
