"""The toy task: problems, tokenizer, templates, and a warm start of a few steps."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.toy import task, warm_start
from nemo_trd.toy.rows import Row, RowMaker, as_tensors, check_templates
from nemo_trd.toy.tokenizer import build_tokenizer, unknown_words

FACTORS = ((3, 5), (5, 2), (6, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def factors_in(problem: str) -> task.Factors:
    return tuple((int(a), int(b)) for a, b in re.findall(r"[pqr] (\d+) \* (\d+)", problem))


def last_number(text: str) -> str:
    mark, number = text.split()[-2:]
    assert mark == "####"
    return number


def first_wrong_step(factors: task.Factors, text: str) -> int | None:
    """Index of the first step that the solution does not have; 5 is the last number."""
    steps = zip(task.solution(factors).split(" ; "), text.split(" ; "), strict=False)
    return next((index for index, (right, tried) in enumerate(steps) if right != tried), None)


def test_solutions_are_right_by_evaluating_every_step_of_their_text():
    for example in task.examples("train", 200, seed=3):
        *steps, last = example["solution"].split(" ; ")
        value = {}
        for step in steps:
            label, term, result = re.fullmatch(r"(\w) (.+) = (\d+)", step).groups()
            assert eval(term) % 7 == int(result)
            value[label] = int(result)
        assert re.findall(r"(\w) \d+ [*+]", example["solution"]) == list("pqrst")
        total = sum(a * b for a, b in factors_in(example["problem"])) % 7
        assert value["t"] == total
        assert last == f"#### {total}"
        assert example["answer"] == str(total)


def test_splits_are_disjoint_and_an_example_belongs_to_its_split():
    problems = {}
    for split in task.RESIDUES:
        drawn = [e["problem"] for seed in (0, 1) for e in task.examples(split, 500, seed)]
        assert {task.split_of(factors_in(problem)) for problem in drawn} == {split}
        problems[split] = set(drawn)
    assert not problems["train"] & problems["validation"]
    assert not problems["train"] & problems["warm_start"]
    assert not problems["warm_start"] & problems["validation"]
    residues = sorted(r for residues in task.RESIDUES.values() for r in residues)
    assert residues == list(range(8))


def test_examples_differ_from_each_other_and_repeat_with_their_seed():
    first = task.examples("train", 300, seed=0)
    assert len({example["problem"] for example in first}) == 300
    assert first == task.examples("train", 300, seed=0)
    assert first != task.examples("train", 300, seed=1)


@pytest.mark.parametrize("kind", ["result", "noticed", "operand", "skip", "repeat", "cut"])
@pytest.mark.parametrize("step", range(5))
def test_an_attempt_goes_wrong_in_the_step_that_is_asked_for(kind, step):
    rng = random.Random(f"{kind} {step}")
    for _ in range(20):
        factors = task.draw_problem(rng, "train")
        text = task.attempt(factors, {step: kind}, rng)
        # A repeated step is right itself: what is wrong is that the next one does not follow.
        assert first_wrong_step(factors, text) == step + (kind == "repeat")


def test_a_wrong_last_number_is_no_wrong_step():
    assert task.solution(FACTORS) == (
        "p 3 * 5 = 1 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 1 + 3 = 4 ; t 4 + 5 = 2 ; #### 2"
    )
    text = task.attempt(FACTORS, {0: "answer"}, random.Random(0))
    assert first_wrong_step(FACTORS, text) == 5 and last_number(text) != "2"


def test_errors_are_carried_on_into_the_sums_unless_they_are_noticed():
    text = task.attempt(FACTORS, {0: "result"}, random.Random(0))
    wrong = int(re.match(r"p 3 \* 5 = (\d+) ;", text)[1])
    assert wrong != 1
    assert f"s {wrong} + 3 = {(wrong + 3) % 7} ;" in text
    assert last_number(text) == str((wrong + 3 + 5) % 7)
    text = task.attempt(FACTORS, {0: "noticed"}, random.Random(0))
    shown, no_and_right = re.match(r"p 3 \* 5 = (\d+) (.+?) ;", text).groups()
    assert shown != "1" and no_and_right == "no 1"
    assert text.replace(f"{shown} no ", "", 1) == task.solution(FACTORS)


def read_slips(text):
    """Reads a text with slips, step by step, and holds every number against arithmetic.

    Returns:
        where the wrong numbers stand, which of them are taken back, and the number of steps.
    """
    words = text.split()
    value, wrong, noticed = {}, [], []
    results = [place + 1 for place, word in enumerate(words) if word == "="]
    for place in results:
        label, a, sign, b = words[place - 5 : place - 1]
        if sign == "+":  # sums take the numbers that count, be they right or wrong
            left, right = {"s": "pq", "t": "sr"}[label]
            assert (int(a), int(b)) == (value[left], value[right])
        follows = eval(a + sign + b) % 7
        value[label] = int(words[place])
        if value[label] != follows:
            wrong.append(place)
        if words[place + 1] == "no":
            noticed.append(place)
            assert words[place + 2 : place + 4] == [str(follows), ";"]
            value[label] = follows
        else:
            assert words[place + 1] == ";"
    assert list(value) == list("pqrst")
    assert words[-2:] == ["####", str(value["t"])]
    return wrong, noticed, len(results)


def test_slips_are_the_wrong_numbers_and_half_of_them_are_noticed():
    rng = random.Random(0)
    slips = all_noticed = steps = unnoticed_and_right = 0
    for _ in range(1000):
        factors = task.draw_problem(rng, "warm_start")
        text, places = task.slips(factors, rng)
        assert re.findall(r"[pqr] \d \* \d", text) == [
            f"{label} {a} * {b}" for label, (a, b) in zip("pqr", factors, strict=True)
        ]
        wrong, noticed, count = read_slips(text)
        assert list(places) == wrong
        assert {*noticed} <= {*wrong}
        if wrong == noticed:
            assert last_number(text) == task.answer(factors)
        else:
            unnoticed_and_right += last_number(text) == task.answer(factors)
        slips, all_noticed, steps = slips + len(wrong), all_noticed + len(noticed), steps + count
    assert slips / steps == pytest.approx(0.4, abs=0.03)  # more than four standard deviations
    assert all_noticed / slips == pytest.approx(0.5, abs=0.05)
    assert unnoticed_and_right < 200  # a wrong number is carried on; two can cancel out


def test_tokenizer_round_trip_is_exact_through_auto_tokenizer(tokenizer):
    rng = random.Random(0)
    for errors in (0, 1, 2, 3) * 20:
        factors = task.draw_problem(rng, "train")
        for text in (task.problem_text(factors), task.corrupted(factors, rng, errors)):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split())  # words are tokens
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            assert (
                tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
            )
    every_id = list(range(len(tokenizer)))
    assert tokenizer(tokenizer.decode(every_id)).input_ids == every_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template_writes_turns_and_a_generation_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "solve"},
        {"role": "user", "content": "p 1 * 2"},
        {"role": "assistant", "content": "#### 2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert " ".join(text.split()) == (
        "<|system|> solve <|end|> <|user|> p 1 * 2 <|end|> <|assistant|> #### 2 <|end|>"
    )
    ids = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["2", "<|end|>", "<|assistant|>"]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    # What a model continues is a prefix of the finished conversation; <|end|> is its EOS.
    assert whole[: len(ids)] == ids
    assert whole[len(ids) :] == [*tokenizer("#### 2").input_ids, tokenizer.eos_token_id]


def test_templates_use_only_known_words_and_others_are_refused(tokenizer):
    config = compose(["experiment=quickstart"])
    templates = config.refinement.templates
    assert templates == warm_start.toy_templates()
    check_templates(templates)
    rows = RowMaker(tokenizer, templates)
    for kind in ("solve", "recover", "rewrite", "follow", "follow_attempt"):
        row = rows.row(kind, random.Random(0))
        assert tokenizer.unk_token_id not in row.context + row.labels
        assert len(row.context) <= config.refinement.max_context_tokens
        assert row.labels[-1] == tokenizer.eos_token_id
    every_slip = task.attempt(FACTORS, dict.fromkeys(range(5), "noticed"), random.Random(0))
    assert len(rows.labels(every_slip)) <= config.generation.rollout.max_tokens
    assert unknown_words("rewrite the poem") == ["poem"]
    strange = templates.model_copy(update={"opd": "{problem} {rollout} rewrite the poem"})
    with pytest.raises(ConfigError, match=r"refinement.templates.opd.*no poem.*Fix"):
        check_templates(strange)


def test_rows_show_the_attempt_but_never_train_on_it(tokenizer):
    rows = RowMaker(tokenizer, warm_start.toy_templates())
    context = rows.context("rewrite", "p 1 * 2", "#### 6", "unused")
    assert tokenizer.decode(context) == (
        "<|user|> problem : p 1 * 2 attempt : #### 6 rewrite : keep right steps , fix wrong steps "
        "<|end|> <|assistant|>"
    )
    tokens, targets = as_tensors([Row(context, rows.labels("#### 2")), Row([5], [6, 2])])
    assert tokens.shape == targets.shape
    assert targets[0][targets[0] >= 0].tolist() == rows.labels("#### 2")
    assert targets[0, : len(context) - 1].eq(-100).all()
    assert targets[1].tolist()[:2] == [6, 2]
    assert targets[1, 2:].eq(-100).all()


def test_nothing_is_learnt_at_the_wrong_numbers_of_a_recovery(tokenizer):
    rows, rng = RowMaker(tokenizer, warm_start.toy_templates()), random.Random(0)
    drawn = [rows.row("recover", rng) for _ in range(40)]
    tokens, targets = as_tensors(drawn)
    ignored = 0
    for row, given, wanted in zip(drawn, tokens.tolist(), targets.tolist(), strict=True):
        wrong, _, _ = read_slips(tokenizer.decode(row.labels[:-1]))
        learnt = [-100 if i in wrong else label for i, label in enumerate(row.labels)]
        start = len(row.context) - 1
        assert wanted == [
            *[-100] * start,
            *learnt,
            *[-100] * (len(wanted) - start - len(learnt)),
        ]
        # What comes next is learnt with the wrong number in sight.
        assert given[: start + len(learnt)] == [*row.context, *row.labels[:-1]]
        problem = tokenizer.decode(row.context[1:-2])
        assert row.context == rows.context("solve", problem, "", "")
        assert task.split_of(factors_in(problem)) == "warm_start"
        ignored += len(wrong)
    assert ignored > 40
    for kind in ("solve", "rewrite", "follow", "follow_attempt"):
        row = rows.row(kind, rng)
        assert row.unlearnt == () and task.NO not in tokenizer.decode(row.labels).split()


class SaysNo:
    """In place of a model: next-token logits with given probabilities of "no" at given places."""

    def __init__(self, no, probability):
        self.no, self.probability = no, probability

    def __call__(self, input_ids, use_cache):
        p = torch.full(input_ids.shape, 0.9)  # wherever nobody should look
        for place, value in self.probability.items():
            p[place] = value
        logits = torch.zeros(*input_ids.shape, 50)
        logits[..., self.no] = p.logit() + math.log(49)
        return SimpleNamespace(logits=logits)


def test_noticing_compares_no_after_wrong_results_with_no_after_right_ones(tokenizer):
    q_to_answer = "q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 1 + 3 = 4 ; t 4 + 5 = 2 ; #### 2"
    noticed = f"p 3 * 5 = 6 no 1 ; {q_to_answer}"
    unnoticed = "p 3 * 5 = 1 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 1 + 3 = 0 ; t 0 + 5 = 5 ; #### 5"
    labels = [
        RowMaker(tokenizer, warm_start.toy_templates()).labels(t) for t in (noticed, unnoticed)
    ]
    rows = [Row([6] * 3, labels[0], (5,)), Row([6] * 7, labels[1], (26,))]
    wrong = {(0, 3 + 5): 0.8, (1, 7 + 26): 0.4}
    right = dict.fromkeys([(0, 3 + i) for i in (14, 21, 28, 35)], 0.05)
    right |= dict.fromkeys([(1, 7 + i) for i in (5, 12, 19, 33)], 0.25)
    model = SaysNo(tokenizer.convert_tokens_to_ids("no"), wrong | right)
    assert warm_start.noticing(model, rows, tokenizer) == pytest.approx(0.6 - 0.15, abs=1e-5)


def few_steps(recipe: warm_start.Recipe) -> warm_start.Recipe:
    few_rows = dict.fromkeys(recipe.shares, 2)
    return replace(recipe, max_steps=2, shares=few_rows, gates={}, held_out=2)


def files_of(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if path.name != "warm_start.json"
    }


def test_same_seed_makes_the_same_files_and_a_second_call_keeps_them(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    student, teacher = few_steps(warm_start.STUDENT), few_steps(warm_start.TEACHER)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        warm_start.make(tmp_path / name, seed, student, teacher)
    made = files_of(tmp_path / "a")
    assert made == files_of(tmp_path / "b")
    other = files_of(tmp_path / "c")
    assert made["student/model.safetensors"] != other["student/model.safetensors"]
    assert made["train.jsonl"] != other["train.jsonl"]
    assert made["validation.jsonl"] == other["validation.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "train", None)
        warm_start.make(tmp_path / "a", 0, student, teacher)
        with pytest.raises(TypeError):
            warm_start.make(tmp_path / "a", 1, student, teacher)

    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / role)
        loaded = AutoTokenizer.from_pretrained(tmp_path / "b" / role)
        assert model.config.vocab_size == len(loaded)
        assert model.config.tie_word_embeddings
        assert model.config.head_dim == 32
    record = json.loads((tmp_path / "b" / "train.jsonl").read_text().splitlines()[0])
    assert set(record) == {"problem", "solution", "answer"}


def test_a_model_that_misses_its_gate_is_reported_and_not_written(tmp_path):
    torch.set_num_threads(1)
    student = replace(few_steps(warm_start.STUDENT), gates={"solve": 0.5})
    with pytest.raises(RuntimeError, match=r"student, seed 0.*solve.*0.5"):
        warm_start.make(tmp_path, 0, student)
    assert not (tmp_path / "student").exists()
    assert not (tmp_path / "warm_start.json").exists()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_second_part_of_a_recipe_goes_on_from_the_weights_of_the_first(tokenizer, monkeypatch):
    torch.set_num_threads(1)
    templates = warm_start.toy_templates()
    rows = RowMaker(tokenizer, templates)
    second = few_steps(warm_start.STUDENT)
    first = replace(second, max_steps=1, warmup_steps=1, shares={"follow": 2})
    new = weights(warm_start.new_model(second, tokenizer, 0))
    inner, parts = warm_start.train, []

    def train(recipe, *rest):
        model, reached = inner(recipe, *rest)
        parts.append((recipe, weights(model), {*reached}))
        return model, reached

    monkeypatch.setattr(warm_start, "train", train)
    train(replace(second, before=first, max_steps=0), rows, 0, "a")
    train(replace(second, before=first), rows, 0, "a")
    (one, learnt, _), (_, nothing_more, _), (again, _, _), (_, more, reached) = parts
    assert one == again == first and reached == {"solve", "recover"}
    assert not learnt.equal(new) and nothing_more.equal(learnt)
    assert 0 < (more - learnt).norm() < 0.5 * (more - new).norm()
    made = [{"student": second}, {"student": replace(second, before=first)}]
    assert len({warm_start.digest(0, recipes, templates) for recipes in made}) == 2


def test_the_gate_of_noticing_ends_the_training_or_is_reported(tmp_path, tokenizer, monkeypatch):
    torch.set_num_threads(1)
    rows = RowMaker(tokenizer, warm_start.toy_templates())
    teacher = replace(few_steps(warm_start.STUDENT), held_out=8, gates={"notice": 0.3})
    measured = iter([0.1, 0.2, 0.31, 0.32])
    monkeypatch.setattr(warm_start, "noticing", lambda *_: next(measured))
    recipe = replace(teacher, max_steps=50, check_interval=1)
    _, reached = warm_start.train(recipe, rows, 0, "a")
    assert reached["notice"] == 0.32  # the third check passed, this is the one of the report
    assert {*reached} == {"solve", "recover", "notice"}
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"teacher, seed 0.*notice.*0.3"):
        warm_start.make(tmp_path, 0, few_steps(warm_start.STUDENT), teacher)
