"""Judges texts whose problem has several answers: one of them is enough, or all are needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemo_trd.verifiers.boxes import boxed
from nemo_trd.verifiers.judgement import Answer, Judge, Judgement
from nemo_trd.verifiers.thoughts import without_thoughts

SEPARATORS = r",|;|\s(?:and|or)\s|\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}"
BETWEEN = re.compile(SEPARATORS)
# "1,234" may be one number: the comma in it separates only where there are too few answers else.
BETWEEN_NUMBERS = re.compile(SEPARATORS.replace(",|", r"(?<!\d),|,(?!\d{3}(?!\d))|", 1))
BRACKET = re.compile(r"[\[({]|[\])}]")
SPACE = re.compile(r"(?:\\[ ,;:!]|[\s$~])+")


def judge_answer(judge: Judge, text: str, answer: Answer) -> Judgement:
    """Judge a text whose problem may have several answers.

    Any of them: the text is right where it is right for one of them. All: its final answer, split
    where commas, semicolons or "and" stand, or its last boxes, as many as there are answers, are
    these answers, in whatever order; or else it is right as the list of them.
    """
    if isinstance(answer, str):
        return judge(text, answer)
    if answer.needed == "any":
        return _any(judge(text, one) for one in answer.texts)
    for parts in _final_parts(text, len(answer.texts)):
        judgement = _matched(judge, parts, answer.texts)
        if judgement.correct:
            return judgement
    return judge(text, ", ".join(answer.texts))


def _any(judgements: Iterator[Judgement]) -> Judgement:
    """First judgement that is right, else one without a verdict, else the first."""
    others: list[Judgement] = []
    for judgement in judgements:
        if judgement.correct:
            return judgement
        others.append(judgement)
    return next((judgement for judgement in others if judgement.correct is None), others[0])


def _matched(judge: Judge, parts: list[str], answers: tuple[str, ...]) -> Judgement:
    """Judge whether each answer is one of the parts, each part used once."""
    remaining = list(parts)
    for answer in answers:
        judgements = [judge(f"#### {part}", answer) for part in remaining]
        right = next((i for i, judgement in enumerate(judgements) if judgement.correct), None)
        if right is None:
            return _any(iter(judgements))
        del remaining[right]
    return Judgement(True, "right")


def _final_parts(text: str, count: int) -> Iterator[list[str]]:
    """Readings of a text's final answer as `count` parts."""
    text = without_thoughts(text)
    boxes = boxed(text)
    final = boxes[-1] if boxes else text.rpartition("#")[2].strip() if "#" in text else ""
    readings = [_split(final, BETWEEN_NUMBERS), _split(final, BETWEEN)]
    if len(boxes) >= count:
        readings.append([" ".join(box.split()) for box in boxes[-count:]])
    for parts in readings:
        if len(parts) == count:
            yield parts


def _split(final: str, between: re.Pattern[str]) -> list[str]:
    """Split at separators, except inside of brackets."""
    borders = [(match.start(), match.end()) for match in between.finditer(final)]
    brackets = [
        (match.start(), match[0] in "[({") for match in reversed([*BRACKET.finditer(final)])
    ]
    parts, start, depth = [], 0, 0
    for begin, end in [*borders, (len(final), len(final))]:
        while brackets and brackets[-1][0] < begin:
            depth += 1 if brackets.pop()[1] else -1
        if depth == 0 or begin == len(final):
            parts.append(final[start:begin])
            start = end
    cleaned = (SPACE.sub(" ", part).strip() for part in parts)
    return [part for part in cleaned if part]
