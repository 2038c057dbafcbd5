"""The toy task: a sum of three products modulo 7, worked out step by step.

    problem   p 3 * 5 q 4 * 2 r 5 * 6 ?
    solution  p 3 * 5 = 1 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4

p, q and r are the products, s = p + q and t = s + r. Everything is text: words separated by one
space, numbers are the words 0 .. 6. A problem has exactly one right answer, and one solution
without slips. Whoever slips may notice, and put the right number after "no", or go on with the
wrong one:

    noticed      p 3 * 5 = 2 no 1 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4
    not noticed  p 3 * 5 = 2 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 2 + 1 = 3 ; t 3 + 2 = 5 ; #### 5

Every problem has a number (its six factors as digits in base 7), and its number modulo 8 says
which split it belongs to, so that warm-start, training and validation problems never overlap,
whatever the seeds are.
"""

from __future__ import annotations

import random
from typing import Literal

MODULUS = 7
PRODUCTS = ("p", "q", "r")
SUMS = (("s", "p", "q"), ("t", "s", "r"))  # label, labels of the two terms
NUMBERS = tuple(str(number) for number in range(MODULUS))
NO = "no"  # takes back the number before it
MARKS = (*PRODUCTS, "s", "t", "*", "+", "=", ";", "?", "####", NO)
SLIPPING = 0.4  # in a text with slips, how often a step has one
NOTICED = 0.5  # how often a slip is noticed: as undecided as can be

Factors = tuple[tuple[int, int], ...]  # one pair per product
Split = Literal["warm_start", "train", "validation"]
ErrorKind = Literal["result", "noticed", "operand", "skip", "repeat", "answer", "cut"]
ERROR_WEIGHTS: dict[ErrorKind, int] = {
    **{"result": 8, "noticed": 8, "operand": 3},
    **{"skip": 1, "repeat": 1, "answer": 1, "cut": 1},
}
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


def draw_problem(rng: random.Random, split: Split) -> Factors:
    """A problem of this split, uniform over the split."""
    while True:
        factors = tuple((rng.randrange(MODULUS), rng.randrange(MODULUS)) for _ in PRODUCTS)
        if split_of(factors) == split:
            return factors


def problem_text(factors: Factors) -> str:
    """The problem as the student reads it."""
    terms = (f"{label} {a} * {b}" for label, (a, b) in zip(PRODUCTS, factors, strict=True))
    return f"{' '.join(terms)} ?"


def read_problem(text: str) -> Factors | None:
    """The factors of a problem's text; None where the text is no problem of this task."""
    words = text.split()
    pairs = tuple(
        (int(words[i + 1]), int(words[i + 3]))
        for i in range(0, len(words) - 4, 4)
        if words[i + 1] in NUMBERS and words[i + 3] in NUMBERS
    )
    return pairs if len(pairs) == len(PRODUCTS) and problem_text(pairs) == text else None


def answer(factors: Factors) -> str:
    """The number that a right solution ends with."""
    return str(sum(a * b for a, b in factors) % MODULUS)


def solution(factors: Factors) -> str:
    """The one worked solution without slips."""
    return attempt(factors, {}, random.Random(0))


def corrupted(factors: Factors, rng: random.Random, errors: int) -> str:
    """An attempt with so many errors of random kinds, carried on in the steps that follow."""
    kinds = rng.choices([*ERROR_WEIGHTS], weights=[*ERROR_WEIGHTS.values()], k=errors)
    steps = rng.sample(range(len(PRODUCTS) + len(SUMS)), errors)
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
    for index, label in enumerate((*PRODUCTS, *(label for label, _, _ in SUMS))):
        if index < len(PRODUCTS):
            sign, (a, b) = "*", factors[index]
        else:
            _, left, right = SUMS[index - len(PRODUCTS)]
            sign, a, b = "+", values[left], values[right]
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
    last = values[SUMS[-1][0]]
    if "answer" in errors.values():
        last = _other(last, rng)
    return " ".join([*steps, "####", str(last)])


def slips(factors: Factors, rng: random.Random) -> tuple[str, tuple[int, ...]]:
    """A solution with slips, noticed with probability `NOTICED`, and where their numbers stand."""
    errors: dict[int, ErrorKind] = {
        step: "noticed" if rng.random() < NOTICED else "result"
        for step in range(len(PRODUCTS) + len(SUMS))
        if rng.random() < SLIPPING
    }
    text = attempt(factors, errors, rng)
    results = [place + 1 for place, word in enumerate(text.split()) if word == "="]
    return text, tuple(results[step] for step in errors)


def _other(number: int, rng: random.Random) -> int:
    return (number + rng.randrange(1, MODULUS)) % MODULUS


def examples(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """Different problems of one split with their solutions and answers."""
    rng = random.Random(f"{split} {seed}")
    drawn: dict[Factors, None] = {}
    while len(drawn) < count:
        drawn[draw_problem(rng, split)] = None
    return [
        {
            "problem": problem_text(factors),
            "solution": solution(factors),
            "answer": answer(factors),
        }
        for factors in drawn
    ]
