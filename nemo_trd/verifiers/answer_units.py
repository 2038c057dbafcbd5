r"""Compares quantities: 5 cm, 2 hours 30 minutes, 60 miles per hour.

A unit that one side leaves out is forgiven, for the problem has named it; another unit is not,
unless the numbers convert. Units that are not in the table ("18 eggs") are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from nemo_trd.verifiers.answer_kinds import SCALES, number
from nemo_trd.verifiers.answer_text import TEXT_COMMAND
from nemo_trd.verifiers.judgement import RIGHT, WRONG, Judgement

INCH, POUND = Fraction("0.0254"), Fraction("453.59237")
GALLON = 231 * INCH**3
# Dimension -> names in the singular -> value of one, in a unit of the dimension's own.
TABLE: dict[str, dict[str, Fraction | int]] = {
    "time": {
        "s sec second": 1,
        "min minute": 60,
        "h hr hour": 3600,
        "day": 86400,
        "week wk": 604800,
    },
    "calendar": {"month": 1, "year yr": 12, "decade": 120, "century": 1200},
    "length": {
        "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100),
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
        "in inch": INCH,
        "ft foot feet": 12 * INCH,
        "yd yard": 36 * INCH,
        "mi mile": 63360 * INCH,
    },
    "mass": {
        "mg milligram": Fraction(1, 1000),
        "g gram": 1,
        "kg kilogram": 1000,
        "oz ounce": POUND / 16,
        "lb pound": POUND,
    },
    "celsius": {"celsius": 1},  # not converted: their zeros differ
    "fahrenheit": {"fahrenheit": 1},
    "dollars": {"cent ¢": 1, "dollar usd": 100},
    "euros": {"euro eur": 1},
}
VOLUMES: dict[str, Fraction | int] = {  # cubic metres
    "ml milliliter millilitre": Fraction(1, 10**6),
    "l liter litre": Fraction(1, 1000),
    "gal gallon": GALLON,
    "quart qt": GALLON / 4,
    "pint pt": GALLON / 8,
    "cup": GALLON / 16,
}
Dimensions = tuple[tuple[str, int], ...]  # with their exponents, in order


@dataclass(frozen=True)
class Unit:
    """Unit as powers of dimensions, and its value in their own units."""

    dimensions: Dimensions
    factor: Fraction


def _units() -> dict[str, Unit]:
    units = {}
    for dimension, table in TABLE.items():
        for names, factor in table.items():
            for name in names.split():
                units[name] = Unit(((dimension, 1),), Fraction(factor))
    for names, factor in VOLUMES.items():
        for name in names.split():
            units[name] = Unit((("length", 3),), Fraction(factor))
    units["acre"] = Unit((("length", 2),), 43560 * (12 * INCH) ** 2)
    units["hectare"] = Unit((("length", 2),), Fraction(10_000))
    return units


UNITS = _units()
ABBREVIATIONS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "fps": "ft/s", "cc": "cm^3"}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
FACTOR = re.compile(
    r"(?:(square|sq|cubic|cu)(?:\.| |\. ))?([a-z¢]+)(?: ?\^ ?\{?([23])\}?| (squared|cubed))?"
)
PLAIN = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\\[dt]?frac\{\d+\}\{\d+\})?"
PART = re.compile(
    rf"({PLAIN}|\\[dt]?frac\{{\d+\}}\{{\d+\}}) ?([A-Za-z¢](?:[A-Za-z¢ ./]|\^ ?\{{?[23]\}}?)*)"
)
SINGLE = re.compile(r"(.*[\d)}\]]|\\pi) ?((?<![A-Za-z\\])[A-Za-z¢][A-Za-z¢ ./^{}23-]*)")
SCALED = re.compile(r"(.*\d) ?(thousand|million|billion|trillion)( [a-z]{3,})?", re.IGNORECASE)
UNKNOWN = re.compile(r"(?<=\d) [A-Za-z]{3,}$")
FEET = re.compile(r"(\d+) ?' ?(?:(\d+(?:\.\d+)?) ?(?:\"|''))?")


@dataclass(frozen=True)
class Quantity:
    """Numbers (in LaTeX), each with its unit; more than one of one dimension add up."""

    parts: tuple[tuple[str, Unit], ...]

    @property
    def dimensions(self) -> Dimensions:
        """Dimensions that all parts have."""
        return self.parts[0][1].dimensions

    @property
    def total(self) -> Fraction | None:
        """Sum of the parts in the dimension's own unit; None where a number is not written out."""
        values = [(number(amount), unit.factor) for amount, unit in self.parts]
        if any(value is None for value, _ in values):
            return None
        return sum((value * factor for value, factor in values if value is not None), Fraction(0))


def quantity(answer: str) -> Quantity | None:
    """Quantity that the whole answer is; None where a unit is missing or unknown."""
    if len(answer) > 200:
        return None
    answer = " ".join(TEXT_COMMAND.sub(r" \1 ", answer).split()).strip(" .")
    answer = re.sub(r"^[A-Za-z] ?= ?", "", answer)
    answer = re.sub(r"\^\{?\\circ\}? ?C$|degrees celsius$", " celsius", answer, flags=re.I)
    answer = re.sub(r"\^\{?\\circ\}? ?F$|degrees fahrenheit$", " fahrenheit", answer, flags=re.I)
    feet = FEET.fullmatch(answer)
    if feet:
        answer = f"{feet[1]} feet {feet[2] or 0} inches"
    answer = re.sub(r",? and |, (?=\d)", " ", answer)
    parts = [(match[1], unit_named(match[2])) for match in PART.finditer(answer)]
    rest = PART.sub("", answer).strip()
    if not parts or rest:
        single = SINGLE.fullmatch(answer)
        parts = [(single[1], unit_named(single[2]))] if single else []
    named_parts = tuple((amount, unit) for amount, unit in parts if unit is not None)
    if not parts or len(named_parts) < len(parts):
        return None
    if len({unit.dimensions for _, unit in named_parts}) > 1:
        return None
    return Quantity(named_parts)


def unit_named(name: str) -> Unit | None:
    """Unit of a name (cm^2, square feet, m/s); None if any part of it is not in the table."""
    if len(name) == 1 and name.isupper() and name != "L":
        return None  # a variable
    name = re.sub(r"[{}]", "", name.strip(" .").casefold())
    name = ABBREVIATIONS.get(name, name)
    dimensions: dict[str, int] = {}
    value = Fraction(1)
    for place, part in enumerate(re.split(r" ?/ ?| per ", name)):
        match = FACTOR.fullmatch(part.strip())
        unit = _one(match[2]) if match else None
        if match is None or unit is None:
            return None
        power = int(match[3] or POWERS.get(match[1] or match[4] or "", 1))
        power = -power if place else power
        value *= unit.factor**power
        for dimension, exponent in unit.dimensions:
            dimensions[dimension] = dimensions.get(dimension, 0) + power * exponent
    return Unit(tuple(sorted(dimensions.items())), value)


def _one(name: str) -> Unit | None:
    for singular in (name, name.removesuffix("s"), name.removesuffix("es")):
        if singular in UNITS:
            return UNITS[singular]
    return UNITS["century"] if name == "centuries" else None


def same_quantities(
    answer: str, expected: str, compare: Callable[[str, str], Judgement]
) -> Judgement | None:
    """Judge two answers by their units; None where these decide nothing.

    `compare` judges two numbers in LaTeX.
    """
    ours, theirs = quantity(answer), quantity(expected)
    if ours is None or theirs is None:
        present, bare = (ours, expected) if ours is not None else (theirs, answer)
        return None if present is None else _without_unit(present, bare)
    if ours.dimensions != theirs.dimensions:
        return WRONG
    if ours.total is not None and theirs.total is not None:
        return RIGHT if ours.total == theirs.total else WRONG
    if len(ours.parts) + len(theirs.parts) > 2:
        return WRONG
    (amount, unit), (expected_amount, expected_unit) = ours.parts[0], theirs.parts[0]
    ratio = unit.factor / expected_unit.factor
    factor = rf"\frac{{{ratio.numerator}}}{{{ratio.denominator}}}"
    return compare(amount if ratio == 1 else rf"({amount}) \cdot {factor}", expected_amount)


def _without_unit(present: Quantity, bare: str) -> Judgement | None:
    """Compare a quantity with a bare number, taken in that unit, or in any of a compound one's."""
    value, total = number(bare), present.total
    if len(present.parts) == 1 and (value is None or total is None):
        return None  # left to the parser, which drops units
    if value is None or total is None:
        return WRONG
    fits = any(value * unit.factor == total for _, unit in present.parts)
    return RIGHT if fits else WRONG


def same_scaled(answer: str, expected: str) -> bool | None:
    """Whether both are one number, at least one of them in thousands, millions, ...

    The scale may be missing on one side, as a unit may. None where this decides nothing.
    """
    ours, theirs = _scaled(answer), _scaled(expected)
    if ours is not None and theirs is not None:
        return ours[1] == theirs[1]
    values, bare = (ours, expected) if ours is not None else (theirs, answer)
    value = number(UNKNOWN.sub("", bare))
    return None if values is None or value is None else value in values


def _scaled(answer: str) -> tuple[Fraction, Fraction] | None:
    """Number before "million", and all of it: 5 and 5,000,000."""
    answer = " ".join(TEXT_COMMAND.sub(r" \1 ", answer).split())
    match = SCALED.fullmatch(answer) if len(answer) <= 200 else None
    count = number(match[1]) if match else None
    if match is None or count is None:
        return None
    unit = (match[3] or "").strip()
    if unit not in ("", "dollars") and unit_named(unit) is not None:
        return None
    scale = 10**12 if match[2].casefold() == "trillion" else SCALES[match[2].casefold()]
    return count, count * scale
