"""The toy task: a sum of products modulo 7, three unless said otherwise, worked out step by step.

    problem   p 3 * 5 q 4 * 2 r 5 * 6 ?
    solution  p 3 * 5 = 1 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4

p, q and r are the products, s = p + q and t = s + r. A longer problem goes on with the products p4,
p5, ... and the sums s4 = t + p4, s5 = s4 + p5, ..., and adds up as it goes: p, q, s, r, t, p4, s4,
... Everything is text: words separated by one space, numbers are the words 0 .. 6. A problem has
exactly one right answer, and one solution without slips. Whoever slips may notice, and put the
right number after "no", or go on with the wrong one:

    noticed      p 3 * 5 = 2 no 1 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4
    not noticed  p 3 * 5 = 2 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 2 + 1 = 3 ; t 3 + 2 = 5 ; #### 5

Every problem has a number (its factors as digits in base 7), and its number modulo 8 says
which split it belongs to, so that warm-start, training and validation problems never overlap,
whatever the seeds are.
"""

from __future__ import annotations

import random
from typing import Literal

MODULUS = 7
USUAL, LONGEST = 3, 24  # products in a problem
NUMBERS = tuple(str(number) for number in range(MODULUS))
NO = "no"  # takes back the number before it
SLIPPING = 0.4  # in a text with slips, how often a step has one
NOTICED = 0.5  # how often a slip is noticed: as undecided as can be


def product_labels(products: int) -> tuple[str, ...]:
    """Labels of the products of a problem with so many."""
    return (*"pqr", *(f"p{i}" for i in range(4, LONGEST + 1)))[:products]


def sum_labels(products: int) -> tuple[str, ...]:
    """Labels of the sums of a problem with so many products: one less."""
    return (*"st", *(f"s{i}" for i in range(4, LONGEST + 1)))[: products - 1]


def sums(products: int) -> tuple[tuple[str, str, str], ...]:
    """Every sum of a problem with so many products: its label, and the labels of its two terms."""
    first, *others = product_labels(products)
    labels = sum_labels(products)
    return tuple(zip(labels, (first, *labels), others, strict=False))


def step_labels(products: int) -> tuple[str, ...]:
    """Labels of the steps of a solution, in its order.

    Of more products than usual each is added as soon as it is there: models as small as the toy's
    do not learn to look for a number many steps before.
    """
    first, *others = product_labels(products)
    if products <= USUAL:
        return (first, *others, *sum_labels(products))
    pairs = zip(others, sum_labels(products), strict=True)
    return (first, *(label for pair in pairs for label in pair))


MARKS = (*product_labels(USUAL), *sum_labels(USUAL), "*", "+", "=", ";", "?", "####", NO)

Factors = tuple[tuple[int, int], ...]  # one pair per product
Split = Literal["warm_start", "train", "validation"]
ErrorKind = Literal["result", "noticed", "operand", "skip", "repeat", "answer", "cut"]
WRONG_RESULT = 16  # the weight of wrong numbers after "=", noticed or not, beside these
ERROR_WEIGHTS: dict[ErrorKind, int] = {"operand": 3, "skip": 1, "repeat": 1, "answer": 1, "cut": 1}
RESIDUES: dict[Split, tuple[int, ...]] = {
    "validation": (0,),
    "train": (1, 2, 3),
    "warm_start": (4, 5, 6, 7),
}


def split_of(factors: Factors) -> Split:
    """The only split that may use this problem."""
    number = 0
    for factor in (factor for pair in factors for factor in pair):
        number = number * MODULUS + factor
    return next(split for split, residues in RESIDUES.items() if number % 8 in residues)


def draw_problem(rng: random.Random, split: Split, products: int = USUAL) -> Factors:
    """A problem of this split, uniform over the split."""
    while True:
        factors = tuple((rng.randrange(MODULUS), rng.randrange(MODULUS)) for _ in range(products))
        if split_of(factors) == split:
            return factors


def problem_text(factors: Factors) -> str:
    """The problem as the student reads it."""
    labels = product_labels(len(factors))
    terms = (f"{label} {a} * {b}" for label, (a, b) in zip(labels, factors, strict=True))
    return f"{' '.join(terms)} ?"


def read_problem(text: str) -> Factors | None:
    """The factors of a problem's text; None where the text is no problem of this task."""
    words = text.split()
    pairs = tuple(
        (int(words[i + 1]), int(words[i + 3]))
        for i in range(0, len(words) - 4, 4)
        if words[i + 1] in NUMBERS and words[i + 3] in NUMBERS
    )
    return pairs if 2 <= len(pairs) <= LONGEST and problem_text(pairs) == text else None


def answer(factors: Factors) -> str:
    """The number that a right solution ends with."""
    return str(sum(a * b for a, b in factors) % MODULUS)


def solution(factors: Factors) -> str:
    """The one worked solution without slips."""
    return attempt(factors, {}, random.Random(0))


def corrupted(factors: Factors, rng: random.Random, errors: int, noticed: float = NOTICED) -> str:
    """An attempt with so many errors of random kinds, carried on in the steps that follow.

    Args:
        noticed: the share of wrong results that are noticed.
    """
    weights: dict[ErrorKind, float] = {
        **{"result": WRONG_RESULT * (1 - noticed), "noticed": WRONG_RESULT * noticed},
        **ERROR_WEIGHTS,
    }
    kinds = rng.choices([*weights], weights=[*weights.values()], k=errors)
    steps = rng.sample(range(2 * len(factors) - 1), errors)
    return attempt(factors, dict(zip(steps, kinds, strict=True)), rng)


def attempt(factors: Factors, errors: dict[int, ErrorKind], rng: random.Random) -> str:
    """A worked solution in which step i goes wrong as `errors[i]` says.

    result: a wrong number after "="; noticed: and then "no" and the right one; operand: another
    number is combined; skip: the step is missing and its value is a guess;
    repeat: the step is written twice; answer: the last number is not the result of the last step;
    cut: the attempt ends in this step.
    """
    values: dict[str, int] = {}
    steps: list[str] = []
    products = len(factors)
    pairs = dict(zip(product_labels(products), factors, strict=True))
    terms = {label: (left, right) for label, left, right in sums(products)}
    for index, label in enumerate(step_labels(products)):
        if label in pairs:
            sign, (a, b) = "*", pairs[label]
        else:
            sign, (a, b) = "+", (values[term] for term in terms[label])
        kind = errors.get(index)
        if kind == "operand":
            a, b = (_other(a, rng), b) if rng.random() < 0.5 else (a, _other(b, rng))
        value = (a * b if sign == "*" else a + b) % MODULUS
        if kind in ("result", "skip"):
            value = _other(value, rng)
        values[label] = value
        shown = [str(value)]
        if kind == "noticed":
            shown = [str(_other(value, rng)), NO, str(value)]
        words = [label, str(a), sign, str(b), "=", *shown, ";"]
        if kind == "cut":
            return " ".join([*steps, *words[: rng.randrange(1, len(words) - 1)]])
        steps += [] if kind == "skip" else [" ".join(words)] * (2 if kind == "repeat" else 1)
    last = values[sum_labels(products)[-1]]
    if "answer" in errors.values():
        last = _other(last, rng)
    return " ".join([*steps, "####", str(last)])


def slips(
    factors: Factors, rng: random.Random, noticed: float = NOTICED
) -> tuple[str, tuple[int, ...]]:
    """A solution with slips, noticed with that probability, and where their numbers stand."""
    errors: dict[int, ErrorKind] = {
        step: "noticed" if rng.random() < noticed else "result"
        for step in range(2 * len(factors) - 1)
        if rng.random() < SLIPPING
    }
    text = attempt(factors, errors, rng)
    results = [place + 1 for place, word in enumerate(text.split()) if word == "="]
    return text, tuple(results[step] for step in errors)


def _other(number: int, rng: random.Random) -> int:
    return (number + rng.randrange(1, MODULUS)) % MODULUS


def examples(split: Split, count: int, seed: int, products: int = USUAL) -> list[dict[str, str]]:
    """Different problems of one split with their solutions and answers."""
    rng = random.Random(f"{split} {seed}")
    drawn: dict[Factors, None] = {}
    while len(drawn) < count:
        drawn[draw_problem(rng, split, products)] = None
    return [
        {
            "problem": problem_text(factors),
            "solution": solution(factors),
            "answer": answer(factors),
        }
        for factors in drawn
    ]
