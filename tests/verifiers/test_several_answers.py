"""Problems with several answers: any of them is right, or all together."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from nemo_trd.data.types import Prompt
from nemo_trd.verifiers.boxes import boxed, last_boxed
from nemo_trd.verifiers.judgement import AnswerList, Judgement
from nemo_trd.verifiers.select import verifier
from nemo_trd.verifiers.several import judge_answer

same_mathematics, same_words = verifier("math"), verifier("exact")


def verdict(text: str, *answers: str, needed: str = "all") -> bool | None:
    return same_mathematics(text, AnswerList(answers, needed))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [r"\boxed{\frac{1}{2}}", "#### 3", r"\boxed{3.0}"])
def test_any_of_several_answers_is_right(text: str) -> None:
    assert verdict(text, "0.5", "3", needed="any") is True


@pytest.mark.parametrize("text", [r"\boxed{2}", r"\boxed{0.5, 3}", "", "no idea"])
def test_what_is_none_of_them_is_wrong(text: str) -> None:
    assert verdict(text, "0.5", "3", needed="any") is False


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (r"\boxed{1, 2}", ("1", "2")),
        (r"\boxed{2,1}", ("1", "2")),
        (r"\boxed{x = 1 \text{ or } x = 2}", ("1", "2")),
        (r"\boxed{1} and \boxed{2}", ("2", "1")),
        (r"I try \boxed{7}. So \boxed{1} and \boxed{2}", ("1", "2")),
        (r"<think>\boxed{7}</think>\boxed{1;2}", ("1", "2")),
        (r"\boxed{\{1, 2\}}", ("1", "2")),
        (r"\boxed{100,200}", ("100", "200")),
        (r"\boxed{1,234, 5}", ("5", "1234")),
        (r"\boxed{(3,4),\ (1,2)}", ("(1,2)", "(3,4)")),
        (r"\boxed{\frac{1}{2}, \text{none}}", ("none", "0.5")),
        ("#### 1 and 2", ("1", "2")),
    ],
)
def test_all_of_several_answers_are_found_in_any_order(text: str, answers: tuple[str, ...]) -> None:
    assert verdict(text, *answers) is True


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{1}",
        r"\boxed{1, 3}",
        r"\boxed{1, 1}",
        r"\boxed{1, 2, 3}",
        r"\boxed{1} or \boxed{2} or \boxed{3}",
        "",
    ],
)
def test_some_of_them_or_others_beside_them_are_wrong(text: str) -> None:
    assert verdict(text, "1", "2") is not True


def test_words_have_several_answers_too() -> None:
    assert same_words("so red", AnswerList(("blue", "red"), "any")) is True
    assert same_words("# red, blue", AnswerList(("blue", "red"), "all")) is True
    assert same_words("# red, red", AnswerList(("blue", "red"), "all")) is False


def test_without_a_verdict_on_one_and_none_that_is_right_there_is_none() -> None:
    def judge(text: str, answer: str) -> Judgement:
        return {"1": Judgement(True, "right"), "2": Judgement(None, "timeout")}.get(
            answer, Judgement(False, "wrong_answer")
        )

    for answers, correct in ((("3", "2", "1"), True), (("3", "2"), None), (("3", "4"), False)):
        assert judge_answer(judge, "x", AnswerList(answers, "any")).correct is correct


@pytest.mark.parametrize("answer", [None, "2", AnswerList(("1", "2"), "all")])
def test_prompts_with_any_kind_of_answer_come_back_from_json(answer: object) -> None:
    prompt, adapter = Prompt(0, "p", (1,), None, answer), TypeAdapter(Prompt)  # type: ignore[arg-type]
    assert adapter.validate_json(adapter.dump_json(prompt)) == prompt


def test_boxes_are_found_in_one_pass_however_they_are_nested() -> None:
    text = r"\boxed{a\}\boxed{b}} \fbox {\frac{1}{2}} \boxed{open"
    assert boxed(text) == [r"a\}\boxed{b}", "b", r"\frac{1}{2}"]
    assert last_boxed(r"$\boxed 7$") == "7" and last_boxed("7") is None
    assert boxed(r"\boxed{" * 100_000) == []
