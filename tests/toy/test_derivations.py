"""The toy task with several right derivations: which texts are one, and which rows show them."""

from __future__ import annotations

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from nemo_trd.toy import task, warm_start
from nemo_trd.toy.derivations import ORDERS, derivation, solution
from nemo_trd.toy.rows import Row, RowMaker
from nemo_trd.toy.tokenizer import build_tokenizer

FACTORS = ((3, 5), (4, 2), (5, 6))
PRODUCTS = "p 3 * 5 = 1 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ;"


def test_every_order_of_the_products_is_a_right_derivation_of_its_own():
    for example in task.examples("train", 100, seed=1):
        factors = task.read_problem(example["problem"])
        texts = [solution(factors, order) for order in ORDERS]
        assert len(set(texts)) == len(ORDERS) == 6
        assert texts[0] == example["solution"]
        for order, text in zip(ORDERS, texts, strict=True):
            assert derivation(factors, text) == order
            for label, a, b, result in re.findall(r"([pqr]) (\d) \* (\d) = (\d)", text):
                assert (int(a), int(b)) == factors["pqr".index(label)]
                assert int(a) * int(b) % 7 == int(result)
            assert text.split()[-2:] == ["####", example["answer"]]


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("r 5 * 6 = 2 ; p 3 * 5 = 1 ; q 4 * 2 = 1 ; s 2 + 1 = 3 ; t 3 + 1 = 4 ; #### 4", "rpq"),
        (f"{PRODUCTS} s 1 + 2 = 3 ; t 1 + 3 = 4 ; #### 4", "pqr"),  # p + r first
        ("p 5 * 3 = 1 ; q 2 * 4 = 1 ; s 1 + 1 = 2 ; r 6 * 5 = 2 ; t 2 + 2 = 4 ; #### 4", "pqr"),
        (f"{PRODUCTS} s 1 + 1 = 3 no 2 ; t 2 + 2 = 5 no 6 no 4 ; #### 4", "pqr"),
    ],
)
def test_a_text_is_right_in_whatever_way_its_numbers_follow(text, order):
    assert derivation(FACTORS, text) == tuple(order)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#### 4",
        PRODUCTS,
        f"{PRODUCTS} s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 5",  # another answer than the last sum
        f"{PRODUCTS} s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4 #### 4",
        f"{PRODUCTS} s 1 + 1 = 2 ; t 2 + 2 = 4",  # no answer
        f"{PRODUCTS} t 2 + 2 = 4 ; #### 4",  # the 2 of a step that is missing
        f"{PRODUCTS} s 1 + 1 = 2 ; s 2 + 2 = 4 ; #### 4",  # no t
        f"{PRODUCTS} s 2 + 2 = 4 ; t 4 + 0 = 4 ; #### 4",  # there is one 2 and no 0
        f"{PRODUCTS} s 1 + 1 = 2 no 3 ; t 3 + 2 = 5 ; #### 5",  # takes back what is right
        f"{PRODUCTS} s 1 * 1 = 1 ; t 1 + 2 = 3 ; #### 3",
        "p 3 * 5 = 1 ; q 3 * 5 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4",
        "p 3 * 5 = 1 ; p 3 * 5 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4",
        f"p 3 * 5 = 1 ; {PRODUCTS} s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4",  # p twice
        # Two errors that cancel: the answer is right, the derivation is not.
        "p 3 * 5 = 2 ; q 4 * 2 = 0 ; r 5 * 6 = 2 ; s 2 + 0 = 2 ; t 2 + 2 = 4 ; #### 4",
    ],
)
def test_a_text_of_which_one_step_does_not_follow_is_no_derivation(text):
    assert derivation(FACTORS, text) is None


def test_no_number_of_a_derivation_can_be_another():
    for order in ORDERS:
        words = solution(FACTORS, order).split()
        for place, word in enumerate(words):
            for number in {*task.NUMBERS} - {word}:
                if word in task.NUMBERS:
                    changed = " ".join([*words[:place], number, *words[place + 1 :]])
                    assert derivation(FACTORS, changed) is None


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def texts(row, tokenizer):
    """Problem, attempt ("" without one) and labels of a row."""
    shown = tokenizer.decode(row.context)
    found = re.search(r"problem : (.*) attempt : (.*) rewrite", shown)
    problem, attempt = found.groups() if found else (shown.split("> ")[1].split(" <")[0], "")
    return problem, attempt, tokenizer.decode(row.labels[:-1])


def test_rows_have_each_order_as_often_as_its_weight_and_rewrites_keep_that_of_the_attempt(
    tokenizer,
):
    rows, rng = RowMaker(tokenizer, warm_start.toy_templates(), orders=(6, 0, 2)), random.Random(0)
    whole = 0
    for kind in ("solve", "rewrite"):
        counts = Counter()
        for row in (rows.row(kind, rng) for _ in range(800)):
            problem, attempt, text = texts(row, tokenizer)
            order = derivation(task.read_problem(problem), text)
            counts[order] += 1
            labels = [step.split()[0] for step in attempt.split(" ; ")[:-1]]
            if len({*labels}) == len(labels) == 5:  # every step stands there once
                whole += 1
                assert labels == [*order, "s", "t"]
        assert counts.keys() == {ORDERS[0], ORDERS[2]}
        assert counts[ORDERS[2]] / 800 == pytest.approx(0.25, abs=0.05)
    assert whole > 400
    equals = tokenizer.convert_tokens_to_ids("=")
    for row in (rows.row("recover", rng) for _ in range(100)):
        problem, _, text = texts(row, tokenizer)
        factors = task.read_problem(problem)
        products = re.findall(r"([pqr]) (\d) \* (\d)", text)
        assert tuple(label for label, *_ in products) in (ORDERS[0], ORDERS[2])
        for label, a, b in products:
            assert (int(a), int(b)) == factors["pqr".index(label)]
        assert {row.labels[place - 1] for place in row.unlearnt} <= {equals}


def test_one_order_alone_gives_the_rows_of_the_task_itself(tokenizer):
    rows, mine, its = RowMaker(tokenizer, warm_start.toy_templates()), *map(random.Random, (3, 3))
    for _ in range(50):
        factors = task.draw_problem(its, "warm_start")
        errors = its.choices((0, 1, 2, 3), weights=(30, 30, 25, 15))[0]
        attempt = task.corrupted(factors, its, errors)
        expected = (task.problem_text(factors), attempt, task.solution(factors))
        assert texts(rows.row("rewrite", mine), tokenizer) == expected
    assert mine.getstate() == its.getstate()


def test_a_model_is_right_in_any_of_the_orders(tokenizer):
    rows, rng = RowMaker(tokenizer, warm_start.toy_templates(), orders=(1,) * 6), random.Random(0)
    answers = rows.right_rows("rewrite", rng)
    assert len({tuple(row.context) for row in answers}) == 1
    problem = task.read_problem(texts(answers[0], tokenizer)[0])
    found = [derivation(problem, texts(row, tokenizer)[2]) for row in answers]
    assert found == [*ORDERS]
    assert len(rows.right_rows("recover", rng)) == 1

    def uniform(input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 10))

    groups = [[Row([6], [1, 2]), Row([6], [3, 2])], [Row([6, 6], [1]), Row([6, 6], [2, 3, 4])]]
    expected = (0.01 + 0.01 + 0.1 + 0.001) / 2
    assert warm_start.accuracy(uniform, groups) == pytest.approx(expected)
