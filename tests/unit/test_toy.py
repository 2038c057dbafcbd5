"""The toy task: problems, tokenizer, templates, and a warm start of a few steps."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_trd.config import ConfigError, compose
from nemo_trd.toy import task, warm_start
from nemo_trd.toy.rows import KINDS, RowMaker, as_tensors, check_templates
from nemo_trd.toy.tokenizer import build_tokenizer, unknown_words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def factors_in(problem: str) -> task.Factors:
    return tuple((int(a), int(b)) for a, b in re.findall(r"[pqr] (\d+) \* (\d+)", problem))


def test_solutions_are_right_by_evaluating_every_step_of_their_text():
    for example in task.examples("train", 200, seed=3):
        *steps, last = example["solution"].split(" ; ")
        value = {}
        for step in steps:
            label, term, result = re.fullmatch(r"(\w) (.+) = (\d+)", step).groups()
            assert eval(term) % 13 == int(result)
            value[label] = int(result)
        assert re.findall(r"(\w) \d+ [*+]", example["solution"]) == list("pqrst")
        total = sum(a * b for a, b in factors_in(example["problem"])) % 13
        assert value["t"] == total
        assert last == f"#### {total}"
        assert example["answer"] == str(total) == task.extract_answer(example["solution"])


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


@pytest.mark.parametrize("kind", ["result", "operand", "skip", "repeat", "cut"])
@pytest.mark.parametrize("step", range(5))
def test_first_wrong_step_is_where_the_error_was_put(kind, step):
    rng = random.Random(f"{kind} {step}")
    for _ in range(20):
        factors = task.draw_problem(rng, "train")
        text = task.attempt(factors, {step: kind}, rng)
        # A repeated step is right itself: what is wrong is that the next one does not follow.
        assert task.first_wrong_step(factors, text) == step + (kind == "repeat")


def test_first_wrong_step_knows_right_attempts_wrong_answers_and_endless_ones():
    factors = ((3, 9), (8, 2), (5, 9))
    text = task.solution(factors)
    assert text == (
        "p 3 * 9 = 1 ; q 8 * 2 = 3 ; r 5 * 9 = 6 ; s 1 + 3 = 4 ; t 4 + 6 = 10 ; #### 10"
    )
    assert task.first_wrong_step(factors, text) is None
    assert task.first_wrong_step(factors, text.replace("#### 10", "#### 9")) == 5
    assert task.first_wrong_step(factors, f"{text} ; p") == 6
    assert task.first_wrong_step(factors, "") == 0


def test_errors_are_carried_on_into_the_sums():
    factors = ((3, 9), (8, 2), (5, 9))
    text = task.attempt(factors, {0: "result"}, random.Random(0))
    wrong = int(re.match(r"p 3 \* 9 = (\d+)", text)[1])
    assert f"s {wrong} + 3 = {(wrong + 3) % 13} ;" in text
    assert task.extract_answer(text) == str((wrong + 9) % 13)


def test_answer_is_the_number_after_the_last_mark_or_nothing():
    assert task.extract_answer("#### 3 ; #### 12") == "12"
    assert task.extract_answer("p 3 * 9 = 1 ;") is None
    assert task.extract_answer("t 4 + 6 = 10 ; ####") is None
    assert task.extract_answer("#### ;") is None


def test_tokenizer_round_trip_is_exact_through_auto_tokenizer(tokenizer):
    rng = random.Random(0)
    for errors in (0, 1, 2, 3) * 20:
        factors = task.draw_problem(rng, "train")
        for text in (task.problem_text(factors), task.corrupted(factors, rng, errors)):
            ids = tokenizer(text).input_ids
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
    for kind in KINDS:
        context, labels = rows.row(kind, random.Random(0))
        assert tokenizer.unk_token_id not in context + labels
        assert len(context) <= config.refinement.max_context_tokens
        assert labels[-1] == tokenizer.eos_token_id
        assert len(labels) <= config.generation.rollout.max_tokens
    assert unknown_words("rewrite the poem") == ["poem"]
    strange = templates.model_copy(update={"opd": "{problem} {rollout} rewrite the poem"})
    with pytest.raises(ConfigError, match=r"refinement.templates.opd.*no poem.*Fix"):
        check_templates(strange)


def test_rows_show_the_attempt_but_never_train_on_it(tokenizer):
    rows = RowMaker(tokenizer, warm_start.toy_templates())
    context = rows.context("rewrite", "p 1 * 2", "#### 7", "unused")
    assert tokenizer.decode(context) == (
        "<|user|> problem : p 1 * 2 attempt : #### 7 rewrite : keep right steps , fix wrong steps "
        "<|end|> <|assistant|>"
    )
    tokens, targets = as_tensors([(context, rows.labels("#### 2")), ([5], [6, 2])])
    assert tokens.shape == targets.shape
    assert targets[0][targets[0] >= 0].tolist() == rows.labels("#### 2")
    assert targets[0, : len(context) - 1].eq(-100).all()
    assert targets[1].tolist()[:2] == [6, 2]
    assert targets[1, 2:].eq(-100).all()


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
