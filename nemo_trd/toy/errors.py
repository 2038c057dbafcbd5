"""Where an answer to the toy task goes wrong, and what could follow from there.

Words of answers are the tokens of the toy's tokenizer, its EOS token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nemo_trd.algorithm.change import first_difference
from nemo_trd.toy.task import MODULUS, NO, NUMBERS, Factors, product_labels, solution, sums


class Choice(NamedTuple):
    """Two words that could stand at one place of an answer."""

    go_on: str  # what follows from the answer so far, taken at its word
    turn_back: str  # what the right solution has at this place, or "no"


def first_error(factors: Factors, words: Sequence[str], end: str) -> int | None:
    """The index of the first word that the right solution and `end` do not have there.

    None: the answer is right, or right as far as it goes.
    """
    parted = first_difference(words, [*solution(factors).split(), end])
    return None if parted is None or parted >= len(words) else parted


def choices(factors: Factors, words: Sequence[str], end: str) -> dict[int, Choice]:
    """The places of an answer at which going on and turning back are different words.

    At the first error, "going on" is the wrong word itself. Right after a number that does not
    follow from its operands, going on is ";" and turning back is "no". Further on, a place has a
    choice where a number is copied or computed from a wrong one that was not taken back; it has
    none where a number that is needed was never written or was taken back and not replaced, or a
    step is none of the task. An answer without an error has no such places.
    """
    error = first_error(factors, words, end)
    if error is None:
        return {}
    task = _Labels(len(factors))
    right = [*solution(factors).split(), end]
    true = {step[0]: int(step[5]) for step in _steps(right)}
    written: dict[str, int] = {}
    step: list[str] = []
    places = {error: Choice(words[error], right[error])}
    for place, word in enumerate(words):
        go_on, turn_back = task.value(step, written), task.value(step, true)
        # What a step's operands say comes from the answer; what is right does not depend on them.
        if _wants_result(step):
            turn_back = true.get(step[0])
        if place > error and None not in (go_on, turn_back) and go_on != turn_back:
            places[place] = Choice(str(go_on), str(turn_back))
        if task.has_slipped(step):
            places[place] = Choice(";", NO)
        step = [] if word == ";" else [*step, word]
        if _wants_result(step[:-1]) and word in NUMBERS:
            written[step[0]] = int(word)
        elif word == NO and _wants_result(step):
            written.pop(step[0], None)
    return places


class _Labels:
    """What the steps of an answer combine, of a problem with so many products."""

    def __init__(self, products: int) -> None:
        self._products = product_labels(products)
        self._terms = {label: terms for label, *terms in sums(products)}
        self._last = sums(products)[-1][0]

    def value(self, step: list[str], known: dict[str, int]) -> int | None:
        """The number that comes next in a step, if one does, where `known` has those it needs."""
        if step == ["####"]:
            return known.get(self._last)
        if not step or step[0] not in (*self._products, *self._terms):
            return None
        if _wants_result(step) and step[1] in NUMBERS and step[3] in NUMBERS:
            a, b = int(step[1]), int(step[3])
            results = {"*": a * b % MODULUS, "+": (a + b) % MODULUS}
            return results.get(step[2])
        if step[0] in self._terms and len(step) in (1, 3):
            return known.get(self._terms[step[0]][len(step) // 2])
        return None

    def has_slipped(self, step: list[str]) -> bool:
        """Whether a step ends with a number that does not follow from its operands."""
        if not _wants_result(step[:-1]) or step[-1] not in NUMBERS:
            return False
        return self.value(step[:-1], {}) not in (None, int(step[-1]))


def _wants_result(step: list[str]) -> bool:
    """Whether the next word is the number that a step comes to, be it after a "no"."""
    return len(step) >= 5 and step[4] == "=" and step[-1] in ("=", NO)


def _steps(words: Sequence[str]) -> list[list[str]]:
    return [step.split() for step in " ".join(words).split(" ; ")[:-1]]
