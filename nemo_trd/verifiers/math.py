"""Compares final answers as mathematics.

Texts and plain numbers are compared here, everything else by math-verify in a process of its own
(`math_worker`). Answers too large to be compared in its time are refused by their size before
(`answer_size`).
"""

from __future__ import annotations

import atexit
import logging
import re

from nemo_trd.verifiers import answer_kinds as kinds
from nemo_trd.verifiers.answer_size import too_large, too_many_terms
from nemo_trd.verifiers.answer_text import (
    NOT_SAID,
    RETRACTED,
    STEP,
    announced_answer,
    final_answer,
    in_plain_latex,
    same_text,
    tidy,
)
from nemo_trd.verifiers.answer_units import quantity, same_quantities, same_scaled, unit_named
from nemo_trd.verifiers.judgement import NO_ANSWER, RIGHT, TOO_LARGE, WRONG, Judgement
from nemo_trd.verifiers.math_worker import MathWorker
from nemo_trd.verifiers.thoughts import without_thoughts

log = logging.getLogger(__name__)

PROSE_CHARACTERS = 4000  # read from the end of a text without a marked answer
EXPONENT = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")  # a number as programs write it
PERCENT = re.compile(r"(?<=[\d)}])\s*\\?%$")
UNKNOWN_UNITS = re.compile(r"(?<=\d)( [A-Za-z]{3,})+$")  # "18 eggs", but not "18 x" or "2 pi"
_COMPARISON = r"(?:[<>]|\\[gl](?:eq?|eqslant|t)(?![A-Za-z]))"
BOUND = re.compile(
    r"\\neq?(?![A-Za-z])|\d\s*\+$|\bor (?:more|less|greater|fewer)\b"
    rf"|^\s*{_COMPARISON}|{_COMPARISON}\s*$"  # "> 5", where x is left out
)
COUNT = re.compile(r"\s*\$?\d[\d,.]*( [a-z]{3,}){1,3}[\s.]*")  # "18 eggs", but not "2. Eggs"
WORDS = re.compile(r"[A-Za-z]+( [A-Za-z]+)*")
LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
COMPUTED = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]|[^\s$]+", re.DOTALL)
LAST_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{1,2}\s*$")
CONSTANT = re.compile(r"-?(?:[\d.,^()\[\] }]|\{-?|\\(?:pi|sqrt|[dt]?frac|times|cdot)(?![A-Za-z]))+")
IN_SIGNS = re.compile(r"(\$|\\\(|\\\[)([^$]+?[A-Za-z])(\$|\\\)|\\\])")
NOT_OF_A_SENTENCE = {"sqrt", "pi", "and", "or", "square", "cubic", "unit", "units"}
FORMULA = re.compile(r"\$|\\|\d")  # a sign that math-verify may find an answer


class MathJudge:
    """Judges final answers, one at a time, with a worker process of its own."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.worker = MathWorker(timeout_s)
        atexit.register(self.worker.stop)

    def __call__(self, text: str, answer: str) -> Judgement:
        """Whether the final answer of `text` equals `answer` as mathematics.

        The final answer stands after the thoughts: it is the last \\boxed{...}, or else the line
        after the last "####" that heads no further part, or else the last one that is announced
        ("the answer is"), or else the last formula or number that math-verify finds in the text. A
        text without any answer is wrong, for the reason "no_answer", and an answer that is longer,
        deeper or larger than anybody's for the reason "too_large". A unit that one side leaves
        out, or that is not known, is not compared. With a percent sign on one side only, both 50
        and 0.5 equal 50 %.

        There is no verdict, and a warning in the log, when the comparison raised or its process
        died ("error"), when it was stopped after `timeout_s` ("timeout"), or when `answer` is not
        something that can be compared ("error").
        """
        visible_text = without_thoughts(text)
        expected = tidy(in_plain_latex(final_answer(answer) or answer))
        final = final_answer(visible_text, _can_be_marked)
        if final is None:
            visible_text = RETRACTED.split(visible_text)[-1]
            announced = announced_answer(visible_text)
            if announced is None or not _can_be_answer(announced):
                return self._judge_prose(visible_text, expected)
            final = announced
        if len(final) > 4 * PROSE_CHARACTERS + 4 * len(answer):
            return TOO_LARGE
        return self._judge(tidy(in_plain_latex(final)), expected)

    def _judge(self, answer: str, expected: str) -> Judgement:
        """Judge a tidy answer by the tidy expected one."""
        if not answer:
            return NO_ANSWER
        if same_text(answer, expected):
            return RIGHT
        answer, expected = map(kinds.with_double_factorials, (answer, expected))
        if too_large(answer, len(expected)) or too_many_terms(answer, expected):
            return TOO_LARGE
        choice_judgement = self._judge_choice(answer, expected)
        if choice_judgement is not None:
            return choice_judgement
        numbers = kinds.number(answer), kinds.number(expected)
        if numbers[0] is not None and numbers[1] is not None:
            return RIGHT if numbers[0] == numbers[1] else WRONG
        if numbers[1] is not None and BOUND.search(answer):
            return WRONG
        if WORDS.fullmatch(expected):  # as a formula a word is a product of its letters
            if answer.casefold() == expected.casefold():
                return RIGHT
            if len(expected) > 1 and numbers[1] is None:
                return WRONG
        if too_large(expected, len(expected)):
            log.warning("no verdict on the answer %r: it is too large to be computed", expected)
            return Judgement(None, "error")
        same = kinds.same_numerals(answer, expected)
        same = kinds.same_times(answer, expected) if same is None else same
        same = same_scaled(answer, expected) if same is None else same
        if same is not None:
            return RIGHT if same else WRONG
        unit_judgement = same_quantities(answer, expected, self._compare)
        if unit_judgement is not None:
            return unit_judgement
        if kinds.other_brackets(answer, expected):
            return WRONG
        return self._judge_with_percent(answer, expected)

    def _judge_choice(self, answer: str, expected: str) -> Judgement | None:
        """Judge by letters of choices; None where none decides."""
        several = kinds.choices(answer), kinds.choices(expected)
        if several[0] is not None and several[1] is not None:
            return RIGHT if several[0] == several[1] else WRONG
        ours, theirs = kinds.choice(answer), kinds.choice(expected)
        if ours is None and theirs is None:
            return None
        if ours is None or theirs is None:
            content = ours[1] if ours else theirs[1] if theirs else ""
            if not content:
                return None  # perhaps the letter is a variable
            pair = (content, expected) if ours else (answer, content)
            return self._judge(*map(tidy, pair))
        if ours[0] != theirs[0] or not (ours[1] and theirs[1]):
            return RIGHT if ours[0] == theirs[0] else WRONG
        return self._judge(tidy(ours[1]), tidy(theirs[1]))

    def _judge_prose(self, text: str, expected: str) -> Judgement:
        """Judge a text in which no answer is marked."""
        text = in_plain_latex(text[-PROSE_CHARACTERS:])
        if not text.strip():
            return NO_ANSWER
        expected_choice = kinds.choice(expected)
        if expected_choice is not None:
            letter = kinds.choice_in_words(text)
            if letter is not None or not expected_choice[1]:
                return RIGHT if letter == expected_choice[0] else WRONG
        if WORDS.fullmatch(expected) and (
            len(expected) > 1 or expected.casefold() == text.casefold()
        ):
            last = " ".join(tidy(text).split()[-len(expected.split()) :])
            return RIGHT if last.casefold() == expected.casefold() else WRONG
        if NOT_SAID.search(text[-200:]):
            return NO_ANSWER
        text = STEP.sub(" ", re.sub(r"!{2,}", "", text))
        refused_ends = [m.end() for m in COMPUTED.finditer(text) if too_large(m[0], len(m[0]))]
        text = text[refused_ends[-1] :] if refused_ends else text
        if not FORMULA.search(text):
            return TOO_LARGE if refused_ends else NO_ANSWER
        text = IN_SIGNS.sub(lambda match: match[1] + _as_formula(match[2]) + match[3], text)
        return self.worker.compare(text, f"${_as_formula(expected)}$")

    def _judge_with_percent(self, answer: str, expected: str) -> Judgement:
        per_cent = [bool(PERCENT.search(side)) for side in (answer, expected)]
        if all(per_cent):
            answer, expected = (PERCENT.sub("", side) for side in (answer, expected))
        judgement = self._compare(answer, expected)
        if judgement == WRONG:
            if per_cent == [True, False]:
                judgement = self._compare(_hundredth(answer), expected)
            elif per_cent == [False, True]:
                judgement = self._compare(answer, _hundredth(expected))
        return judgement

    def _compare(self, answer: str, expected: str) -> Judgement:
        numbers = [kinds.number(UNKNOWN_UNITS.sub("", side)) for side in (answer, expected)]
        if numbers[0] is not None and numbers[1] is not None:
            return RIGHT if numbers[0] == numbers[1] else WRONG
        return self.worker.compare(f"${_as_formula(answer)}$", f"${_as_formula(expected)}$")


def _can_be_marked(line: str) -> bool:
    """Whether a line after "####" is an answer, and not a heading."""
    return COUNT.fullmatch(line) is not None or _can_be_answer(line)


def _can_be_answer(announced: str) -> bool:
    """Whether an announced text is an answer by itself, without further words around it."""
    answer = tidy(in_plain_latex(announced))
    if kinds.choice(answer) is not None:
        return True
    if not FORMULA.search(answer):
        return False
    if not set(LONG_WORD.findall(answer)) - NOT_OF_A_SENTENCE:
        return True
    return quantity(answer) is not None or kinds.same_times(answer, answer) is not None


def _hundredth(percentage: str) -> str:
    return rf"\frac{{{PERCENT.sub('', percentage)}}}{{100}}"


def _as_formula(answer: str) -> str:
    number = EXPONENT.fullmatch(answer)
    if number:
        return rf"{number[1]} \times 10^{{{number[2]}}}"
    last = LAST_LETTERS.search(answer)
    if last is None or _is_unit(last[0].strip(), answer[: last.start()]):
        return answer
    return f"{answer[: last.start()]}{{{last[0].strip()}}}"  # or math-verify drops t, h, ab, ...


def _is_unit(letters: str, amount: str) -> bool:
    """Whether the last letters of an answer are a unit, and not variables: 5\\pi m, x + 5 cm."""
    known = unit_named(letters) is not None
    return known and (len(letters) > 1 or CONSTANT.fullmatch(amount) is not None)
