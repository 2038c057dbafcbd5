"""Judges a text by its last words: what `data.verifier=exact` means."""

from __future__ import annotations

from nemo_trd.verifiers.judgement import RIGHT, WRONG, Judgement


def judge_words(text: str, answer: str) -> Judgement:
    """Judge whether the text ends in the words of the answer.

    The final answer is what follows the last "#" ("# 10", "#### 42"), or without any "#" as
    many last words as the answer has. White space does not matter, case does.
    """
    expected = answer.split()
    if "#" in text:
        return RIGHT if text.rpartition("#")[2].split() == expected else WRONG
    return RIGHT if expected and text.split()[-len(expected) :] == expected else WRONG
