r"""Compares kinds of answers that math-verify does not know, or does not tell apart.

Numbers, numerals of other bases, letters of choices, and the brackets of lists. All texts are
`answer_text.tidy`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from nemo_trd.verifiers.answer_text import TEXT_COMMAND

NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?([eE][-+]?\d{1,3})?(/\d+)?")
FRACTION = re.compile(
    r"([-+]?)(\d*)\\[dtc]?frac(?:\{(-?\d+)\}\{(\d+)\}|(\d)(\d)(?!\d)|\{(\d+)\}(\d)|(\d)\{(\d+)\})"
)
REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}")
WITH_AND = re.compile(r"^(-?\d+) and (\d+)/(\d+)$")
CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))? ?(?:([ap])\.? ?m\.?)?")
DOUBLE_FACTORIAL = re.compile(r"(?<![\d.)}!])(\d{1,4})!!(?!!)")

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
ONES = _ONES.split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SCALES = {"thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}

NUMERAL = re.compile(
    r"\(?((?=[A-Z]*\d|[A-Z]{2})[0-9A-Z][0-9A-Z ]*)\)?"
    r"(?:_\{?\s*(?:base\s*)?([a-z]+|\d{1,2})\s*\}?|\s*,?\s*\(?(?:in )?base[ -]([a-z]+|\d{1,2})\)?)"
)
DIGITS = re.compile(r"[0-9A-Z ]+")
LETTER = r"(?:\(\s*([A-Ja-j])\s*\)|([A-J])(?:\)|[.:](?=\s|$)|$))"
CHOICE = re.compile(rf"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)[\s:]*)?{LETTER}\s*(.*)", re.DOTALL)
ANNOUNCED_CHOICE = re.compile(
    r"(?i:\b(?:answers?|options?|choices?)\b)[^\n:=]{0,60}?(?:\bis\b|[:=])[\s*$]*"
    r"(?:(?i:option|choice)\s*)?(?:\(([A-J])\)|([A-J])(?![\w'])(?!\s*[=+^/])(?!(?<=[AI])\s+(?!because|since|as\b)[a-z]))"
    r"|(?i:\b(?:answer|option|choice))\s+\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)"
)
CHOICES = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|and|or|&|;)+\s*\(?[A-J]\)?)+")
FURTHER = re.compile(r"[,;&^_=+*/]|- |\( ?[A-J] ?\)|(?:and|or)\b")  # more than A
OPERATORS = re.compile(
    r"\\(?:cup|cap|setminus|times|mid|in|to|l?vert|begin)(?![A-Za-z])|[|:=<>+*]|\)\s*[\^(]"
)
BRACKETS = {r"\{": r"\}", "(": ")", "[": "]", "{": "}", r"\langle": r"\rangle"}
BRACKET = re.compile(r"\\[{}]|\\[lr]angle(?![A-Za-z])|\\[A-Za-z]+|[][(){},;]")


def number(answer: str) -> Fraction | None:
    """Value of a number that is written out: 1,234.5 or 3/4 or 2\\frac{2}{3} or twelve."""
    if len(answer) > 100:
        return None
    repeating = REPEATING.fullmatch(answer)
    if repeating:
        sign, whole, fixed, period = repeating.groups()
        digits = int(whole + fixed + period) - int((whole + fixed) or 0)
        value = Fraction(digits, (10 ** len(period) - 1) * 10 ** len(fixed))
        return -value if sign == "-" else value
    answer = WITH_AND.sub(r"\1\\frac{\2}{\3}", answer)
    latex = FRACTION.fullmatch(answer)
    if latex:
        sign, whole, *parts = latex.groups()
        over, under = (int(part) for part in parts if part is not None)
        if under == 0 or (whole and over < 0):
            return None
        return (-1 if sign == "-" else 1) * (int(whole or 0) + Fraction(over, under))
    if not NUMBER.fullmatch(answer):
        return number_in_words(answer)
    numerator, _, denominator = answer.replace(",", "").partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):  # no digit at all, or n/0
        return None


def number_in_words(answer: str) -> Fraction | None:
    """Value of a number in words, below 10**12: "twenty-one", "one hundred and five"."""
    total, current, room = 0, 0, 1_000
    words = [word for word in re.split(r"[\s-]+", answer.casefold()) if word != "and"]
    for word in words:
        if word in ONES and ONES.index(word) < room:
            current, room = current + ONES.index(word), 0
        elif word in TENS and room >= 100:
            current, room = current + 10 * (TENS.index(word) + 2), 10
        elif word == "hundred" and 0 < current < 10:
            current, room = 100 * current, 100
        elif word in SCALES and 0 < current < 1_000:
            total, current, room = total + current * SCALES[word], 0, 1_000
        else:
            return None
    return Fraction(total + current) if words else None


def with_double_factorials(answer: str) -> str:
    """Replace n!! by its value; math-verify would take it for (n!)!."""

    def value(match: re.Match[str]) -> str:
        product, factor = 1, int(match[1])
        if factor > 2_500:  # beyond what Python writes as digits
            return match[0]
        for smaller in range(factor, 0, -2):
            product *= smaller
        return str(product)

    return DOUBLE_FACTORIAL.sub(value, answer)


# --- numerals of other bases ---


def same_numerals(answer: str, expected: str) -> bool | None:
    """Whether both are the same digits in the same base; None if no base is named.

    A base that one side leaves out is the other's: the problem has named it. The value alone does
    not do, or the answer to "write 13_8 in base 2" could be 13_8.
    """
    numerals = [_numeral(side) for side in (answer, expected)]
    if all(base is None for _, base in numerals):
        return None
    (digits, base), (expected_digits, expected_base) = numerals
    return digits == expected_digits and (None in (base, expected_base) or base == expected_base)


def _numeral(answer: str) -> tuple[str, int | None]:
    answer = TEXT_COMMAND.sub(r"\1", answer)
    answer = re.sub(r"^[A-Za-z]\s*=\s*", "", answer)
    numeral = NUMERAL.fullmatch(answer)
    if numeral is not None:
        base_name = numeral[2] or numeral[3]
        base = int(base_name) if base_name.isdigit() else int(number_in_words(base_name) or 0)
        if 2 <= base <= 36:
            return numeral[1].replace(" ", "").lstrip("0") or "0", base
    return answer.replace(" ", "").replace(",", "").lstrip("0") or "0", None


# --- times of day ---


def same_times(answer: str, expected: str) -> bool | None:
    """Whether 3:30 PM is 3:30 p.m.; the half of the day may be missing on one side only."""
    clocks = [
        CLOCK.fullmatch(TEXT_COMMAND.sub(r"\1", side).casefold()) for side in (answer, expected)
    ]
    if clocks[0] is None or clocks[1] is None or not (clocks[0][3] or clocks[1][3]):
        return None
    times = [(int(match[1]), int(match[2] or 0)) for match in clocks if match]
    halves = {match[3] for match in clocks if match and match[3]}
    return times[0] == times[1] and len(halves) == 1


# --- letters of choices ---


def choice(answer: str) -> tuple[str, str] | None:
    r"""Letter of a choice and the text after it: (C), \textbf{(C)} 42, C. 42."""
    answer = " ".join(TEXT_COMMAND.sub(r"\1 ", answer).split()).strip(" .*")
    match = CHOICE.fullmatch(answer)
    if match is None or FURTHER.match(match[3]):
        return None
    if (match[1] or "").islower() and match[3]:  # (a) 5: a part of the problem
        return None
    return (match[1] or match[2]).upper(), match[3].strip()


def choices(answer: str) -> set[str] | None:
    """Letters of several choices: (A) and (C)."""
    answer = " ".join(TEXT_COMMAND.sub(r"\1 ", answer).split())
    if not CHOICES.fullmatch(answer):
        return None
    return set(re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", answer))


def choice_in_words(text: str) -> str | None:
    """Letter that a text announces or ends with, and does not mark: "It must be (D)."."""
    alone = choice(text) if "\n" not in text.strip() else None
    if alone is not None:
        return alone[0]
    announced = ANNOUNCED_CHOICE.findall(TEXT_COMMAND.sub(r"\1 ", text))
    if announced:
        return next(letter for letter in announced[-1] if letter)
    words = text.split()
    last = words[-1].strip("*.!`$") if words else ""
    final_choice = choice(last)
    if final_choice is None or final_choice[1]:
        return None
    before = words[-2].strip("*,") if len(words) > 1 else "is"
    is_denied = before.lower() in ("not", "isn't", "never", "cannot", "or", "and", "than")
    return None if is_denied or (last in ("A", "I") and before != "is") else final_choice[0]


# --- brackets of lists ---


def other_brackets(answer: str, expected: str) -> bool:
    r"""Whether one is a set where the other is a tuple or an interval: (1,2) and \{1,2\}.

    A list without brackets, "1, 2", is none of them.
    """
    if OPERATORS.search(answer) or OPERATORS.search(expected):
        return False
    lists = [_brackets(side) for side in (answer, expected)]
    if not all(outer or inner for outer, inner in lists):
        return False
    (outer, inner), (expected_outer, expected_inner) = lists
    if outer and expected_outer and (outer == r"\{") != (expected_outer == r"\{"):
        return True
    if bool(outer) == bool(expected_outer):
        return inner != expected_inner
    return False


def _brackets(answer: str) -> tuple[str, list[bool]]:
    """Bracket around the whole list ("" if none), and for each list in it whether it is a set.

    Only brackets with a comma directly inside count.
    """
    stack: list[tuple[str, int, bool]] = []
    lists: list[tuple[int, int, str]] = []
    for match in BRACKET.finditer(answer):
        token = match[0]
        if token in BRACKETS:
            stack.append((token, match.start(), False))
        elif token in ",;" and stack:
            stack[-1] = (*stack[-1][:2], True)
        elif stack and token in (r"\}", ")", "]", "}", r"\rangle"):
            opened, start, is_list = stack.pop()
            if is_list:
                lists.append((start, match.end(), opened))
    lists.sort()
    outer = lists[0][2] if lists and lists[0][:2] == (0, len(answer)) else ""
    outer = r"\{" if outer == "{" else outer
    return outer, sorted(kind in ("{", r"\{") for _, _, kind in lists[bool(outer) :])
