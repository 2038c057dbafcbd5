r"""Refuses answers that are too large to be anybody's answer, before they are parsed.

Symbolic comparison computes what it reads: 9^{9^{9^9}} takes for ever, and so does the parser with
thousands of brackets. Sizes are estimated from the text alone, from above.
"""

from __future__ import annotations

import math
import re

MAX_CHARACTERS = 1000  # or four times as many as the expected answer has
MAX_DEPTH = 12  # brackets in one another; every level doubles the work of the parser
FUNCTION_DEPTH = 3  # depth of a function's brackets: sympy looks for a value of cos(cos(cos(1)))
MAX_DIGITS = 100_000.0  # largest number to be computed: 2^{2024}, 1000! and 10^{10000} fit
MAX_TERMS = 100_000.0  # longest sum or product
MAX_EXPANDED = 500  # terms that a power of a sum, (x+1)^{300}, has when it is expanded
MAX_ROOT_DIGITS = 2_100  # largest number under a root, which sympy tries to divide: 10^{2024} fits

TOKEN = re.compile(
    r"(?P<number>\d[\d,]*\.?\d*)|(?P<open>\\\{|[{(\[])|(?P<close>\\\}|[})\]])"
    r"|(?P<command>\\[A-Za-z]+)|(?P<letter>[A-Za-z])|(?P<sign>[\^!+])|\\.|.",
    re.DOTALL,
)
BRACKET = re.compile(
    r"(?P<function>\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp)h?\s*\()|[{(\[]|(?P<close>[})\]])"
)
POWER_OF_SUM = re.compile(r"\(([^()]*[-+][^()]*)\)\s*\^\s*\{?\s*(\d+)")
MATRIX = re.compile(r"\\(?:begin|end)\{[a-z*]+\}")


class _TooLarge(Exception):
    pass


def too_large(answer: str, expected_length: int) -> bool:
    """Whether `answer`, in LaTeX, is longer, deeper or larger than the limits above."""
    if len(answer) > max(MAX_CHARACTERS, 4 * expected_length):
        return True
    if _depth(answer) > MAX_DEPTH:
        return True
    tokens = [m for m in TOKEN.finditer(MATRIX.sub(" ", answer)) if not m[0].isspace()]
    try:
        _Estimate(tokens).group()
    except (_TooLarge, RecursionError):
        return True
    return False


def _depth(answer: str) -> int:
    opened: list[int] = []
    depth = deepest = 0
    for match in BRACKET.finditer(answer):
        if match["close"]:
            depth -= opened.pop() if opened else 0
        else:
            opened.append(FUNCTION_DEPTH if match["function"] else 1)
            depth += opened[-1]
            deepest = max(deepest, depth)
    return deepest


def too_many_terms(answer: str, expected: str) -> bool:
    """Whether the powers of sums in `answer` have too many terms, and more than in `expected`."""
    return _expanded(answer) > max(MAX_EXPANDED, _expanded(expected))


def _expanded(answer: str) -> int:
    terms = 0
    for summands, exponent in POWER_OF_SUM.findall(answer):
        power = int(exponent[:6])  # more digits are more than enough
        others = min(len(re.findall("[-+]", summands)), 20)
        terms += math.comb(power + others, others)
    return terms


class _Estimate:
    """Upper bound on the digits of the numbers in an answer; those of a group are added up.

    A letter counts for no digit, and for one where it is raised to a power: a polynomial of a
    large degree is as much work as a large number.
    """

    def __init__(self, tokens: list[re.Match[str]]) -> None:
        self._tokens = tokens
        self._next = 0

    def group(self) -> float:
        """Digits of all numbers up to the closing bracket, or the end.

        Raises:
            _TooLarge: a number exceeds a limit.
        """
        digits = 0.0
        while (token := self._peek()) is not None and token.lastgroup != "close":
            digits += self._powers()
        self._next += 1
        return digits

    def _peek(self) -> re.Match[str] | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _powers(self) -> float:
        """Digits of an atom with its exponents: a^b^c is a^(b^c)."""
        chain = [self._atom()]
        while (token := self._peek()) is not None and token[0] == "^":
            self._next += 1
            while (sign := self._peek()) is not None and sign[0] in "+-*^":
                self._next += 1
            chain.append(self._atom())
        digits = chain.pop()
        while chain:
            digits = _checked((chain.pop() or 1.0) * _value(digits))
        return digits

    def _atom(self) -> float:
        token = self._peek()
        if token is None or token.lastgroup == "close":
            return 0.0
        self._next += 1
        kind, digits = token.lastgroup, 0.0
        if kind == "number":
            digits = _digits(token[0])
        elif kind == "open":
            digits = self.group()
        elif token[0] in (r"\binom", r"\dbinom", r"\tbinom"):
            digits = self._binomial()
        elif token[0] == r"\sqrt":
            digits = self._root()
        elif token[0] in (r"\sum", r"\prod"):
            self._limits()
        while (mark := self._peek()) is not None and mark[0] == "!":
            self._next += 1
            digits = _checked(_value(digits) * digits)
        return digits

    def _binomial(self) -> float:
        over, under = self._atom(), self._atom()
        return _checked(min(0.302 * _value(over), _value(under) * max(over, 1.0)))

    def _root(self) -> float:
        if (token := self._peek()) is not None and token[0] == "[":
            self._atom()
        digits = self._atom()
        if digits > MAX_ROOT_DIGITS:
            raise _TooLarge
        return digits

    def _limits(self) -> None:
        while (token := self._peek()) is not None and token[0] in "_^":
            self._next += 1
            if _value(self._powers()) > MAX_TERMS:
                raise _TooLarge


def _digits(number: str) -> float:
    """log10 of a number of any length, at least 0.3."""
    whole = number.replace(",", "").partition(".")[0].lstrip("0") or "1"
    return max(0.3, len(whole) - 1 + math.log10(float(f"{whole[0]}.{whole[1:15]}")))


def _value(digits: float) -> float:
    return 10.0 ** min(digits, 300.0)


def _checked(digits: float) -> float:
    if digits > MAX_DIGITS:
        raise _TooLarge
    return digits
