"""Prefix failure: figures of single tokens, places of error, means, and the command as a whole."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from oracles import by_definition, make_loss
from tiny_models import byte_tokenizer, make_model
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Prompt, Trajectory
from nemo_trd.prefix_failure import positions
from nemo_trd.prefix_failure.answers import Answer, read_answers
from nemo_trd.prefix_failure.main import main
from nemo_trd.prefix_failure.positions import FIGURES, measure
from nemo_trd.prefix_failure.summary import Bootstrap, Measured, aligned, coarse, curves, groups
from nemo_trd.records.prefix_failure import DIVERGENCES, FILE, PrefixFailure
from nemo_trd.records.trackers import public_settings
from nemo_trd.report import main as report
from nemo_trd.toy import task, warm_start
from nemo_trd.toy.errors import choices, first_error
from nemo_trd.toy.tokenizer import END, build_tokenizer

FACTORS = ((3, 5), (5, 2), (6, 2))
PROBLEM = "p 3 * 5 q 5 * 2 r 6 * 2 ?"
RIGHT = "p 3 * 5 = 1 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 1 + 3 = 4 ; t 4 + 5 = 2 ; #### 2"
WRONG_P = "p 3 * 5 = 6 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 6 + 3 = 2 ; t 2 + 5 = 0 ; #### 0"
NOTICED = "p 3 * 5 = 6 no 1 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 1 + 3 = 4 ; t 4 + 5 = 2 ; #### 2"
VOCAB = 300  # that both models have
AT = {name: column for column, name in enumerate(FIGURES)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


# --- figures of single tokens ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Student and teacher in float64; the teacher's output layer is padded further."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48}
    paths = [
        make_model(root / "student", "qwen3", seed=1, **sizes),
        make_model(root / "teacher", "llama", seed=2, vocab_size=320, **sizes),
    ]
    loaded = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in paths]
    return [model.eval().requires_grad_(False) for model in loaded]


def trajectory(index: int, labels: Sequence[int], source: Any = "rollout") -> Trajectory:
    drawn = random.Random(index)
    context = tuple(drawn.randrange(VOCAB) for _ in range(3 + index))
    teacher_context = (*context, 7, 8, 9)
    return Trajectory(index, 0, source, context, teacher_context, tuple(labels), 0)


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    drawn = random.Random(0)
    labels = [[drawn.randrange(VOCAB) for _ in range(n)] for n in (5, 1, 12, 7)]
    return [
        Answer(trajectory(0, labels[0]), "prompt", "wrong", 2, {2: (5, 6), 4: (17, 299)}),
        Answer(trajectory(1, labels[1]), "prompt", "right", None),
        Answer(trajectory(2, labels[2]), "prompt", "wrong", 0, {0: (1, 2)}),
        Answer(trajectory(3, labels[3]), "prompt", "wrong", None),
    ]


def logits(model: Any, context: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.tensor([[*context, *labels]])).logits
    return found[0, len(context) - 1 : -1, :VOCAB]


TEMPERATURE = 1.7


def reference(models: list[Any], answer: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    t = answer.trajectory
    return (
        logits(models[0], t.student_context, t.labels),
        logits(models[1], t.teacher_context, t.labels),
    )


@pytest.mark.parametrize(("chunk_size", "max_tokens"), [(3, 40), (1000, 10**6)])
def test_figures_are_those_of_dense_distributions(
    models: list[Any], answers: list[Answer], chunk_size: int, max_tokens: int
) -> None:
    loss = make_loss("jsd", temperature=TEMPERATURE, chunk_size=chunk_size)
    found = measure(*models, answers, loss, VOCAB, max_tokens, progress=False)
    for answer, figures in zip(answers, found, strict=True):
        z_s, z_t = (z / TEMPERATURE for z in reference(models, answer))
        student, teacher = Categorical(logits=z_s), Categorical(logits=z_t)
        labels = torch.tensor(answer.trajectory.labels)
        top = teacher.probs.sort(-1, descending=True).values
        expected = {
            "teacher_entropy": teacher.entropy(),
            "student_entropy": student.entropy(),
            "teacher_nll": -teacher.log_prob(labels),
            "student_nll": -student.log_prob(labels),
            "top2_gap": top[:, 0] - top[:, 1],
            **{name: by_definition(z_s, z_t, name) for name in DIVERGENCES},
        }
        assert figures.shape == (len(labels), len(FIGURES))
        for name, values in expected.items():
            assert figures[:, AT[name]] == pytest.approx(values.numpy(), rel=1e-9, abs=1e-12), name
        chosen = [i in answer.choices for i in range(len(labels))]
        assert np.isfinite(figures[:, AT["go_on"] :]).all(1).tolist() == chosen
        for place, (go_on, turn_back) in answer.choices.items():
            p, q = teacher.probs[place], student.probs[place]
            split = torch.stack([p[go_on], p[turn_back], 1 - p[go_on] - p[turn_back]])
            masses = figures[place, AT["go_on"] : AT["other"] + 1]
            assert masses == pytest.approx(split.numpy(), rel=1e-9)
            entropy = Categorical(probs=split).entropy().item()
            assert figures[place, AT["split_entropy"]] == pytest.approx(entropy, rel=1e-9)
            assert figures[place, AT["student_go_on"]] == pytest.approx(q[go_on].item(), rel=1e-9)


def autograd_norms(
    models: list[Any], answer: Answer, divergence: str
) -> tuple[np.ndarray, np.ndarray]:
    """Norms [labels] of the gradients in the student's logits and in its final hidden states."""
    t = answer.trajectory
    ids = torch.tensor([[*t.student_context, *t.labels]])
    with torch.no_grad():
        states = models[0].model(ids).last_hidden_state[0, len(t.student_context) - 1 : -1]
    hidden = states.clone().requires_grad_()
    z = hidden @ models[0].lm_head.weight[:VOCAB].T
    z.retain_grad()
    z_t = reference(models, answer)[1]
    by_definition(z / TEMPERATURE, z_t / TEMPERATURE, divergence).sum().backward()
    assert z.grad is not None and hidden.grad is not None
    return z.grad.norm(dim=-1).numpy(), hidden.grad.norm(dim=-1).numpy()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_share_of_the_gradient_is_that_of_autograd(
    models: list[Any], answers: list[Answer], divergence: Any
) -> None:
    loss = make_loss("jsd", temperature=TEMPERATURE)
    found = measure(*models, answers, loss, VOCAB, 1000, progress=False)
    norms = [autograd_norms(models, answer, divergence) for answer in answers]
    for figures, (of_logits, of_hidden) in zip(found, norms, strict=True):
        assert figures[:, AT[f"{divergence}_gradient"]] == pytest.approx(of_logits, rel=1e-8)
        assert figures[:, AT[f"{divergence}_hidden_gradient"]] == pytest.approx(of_hidden, rel=1e-8)
    wrong, _ = groups([Measured(*pair) for pair in zip(answers, found, strict=True)], 10, 0.9, 0)
    located = [(answers[i].error, norms[i]) for i in (0, 2)]
    for kind, shares in enumerate(
        (
            {part: wrong.parts[part].gradient_share for part in ("before", "at", "after")},
            {part: wrong.parts[part].hidden_gradient_share for part in ("before", "at", "after")},
        )
    ):
        total = sum(norm[kind].sum() for _, norm in located)
        after = sum(norm[kind][error + 1 :].sum() for error, norm in located)
        at = sum(norm[kind][error] for error, norm in located)
        assert shares["after"][divergence].mean == pytest.approx(after / total)
        assert shares["at"][divergence].mean == pytest.approx(at / total)
        assert sum(share[divergence].mean for share in shares.values()) == pytest.approx(1)
    assert wrong.parts["after"].token_share.mean == pytest.approx((2 + 11) / 17)
    assert (wrong.parts["whole"].tokens, wrong.parts["after"].tokens) == (24, 13)
    assert wrong.parts["at"].counts == {}  # at both places of error there is a choice
    assert wrong.parts["after"].counts["go_on"] == 1


def test_no_more_logits_than_a_chunk_exist(
    models: list[Any], answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    inner = positions._log_probs

    def watched(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return inner(hidden, *rest)

    monkeypatch.setattr(positions, "_log_probs", watched)
    measure(*models, answers, make_loss(chunk_size=4), VOCAB, 10**6, progress=False)
    assert max(rows) == 4 and sum(rows) == 2 * 25


def test_logits_that_are_not_finite_are_no_missing_figures(
    models: list[Any], answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = positions._log_probs
    monkeypatch.setattr(positions, "_log_probs", lambda *given: inner(*given) * torch.nan)
    with pytest.raises(FloatingPointError, match=r"prompt 2 sample 0 \(rollout\)"):
        measure(*models, answers, make_loss(), VOCAB, 20, progress=False)


@pytest.mark.parametrize(
    ("teacher", "two_peaked", "entropy"),
    [
        ((1.0, 0.0, 0.0), 0, 0.0),
        ((0.0, 1.0, 0.0), 0, 0.0),
        ((0.5, 0.5, 0.0), 1, np.log(2)),
        ((0.95, 0.05, 0.0), 0, 0.19851524334587),
        ((0.0, 0.0, 1.0), 0, 0.0),
        ((1 / 3, 1 / 3, 1 / 3), 1, np.log(3)),
    ],
)
def test_a_teacher_of_two_minds_is_told_from_one_that_is_not(
    teacher: tuple[float, ...], two_peaked: int, entropy: float
) -> None:
    t = torch.tensor([[*teacher[:2], teacher[2] / 2, teacher[2] / 2]], dtype=torch.float64)
    found = positions._choice_figures(t, t, torch.tensor([[0, 1]]))
    assert found["two_peaked"].item() == two_peaked
    assert found["split_entropy"].item() == pytest.approx(entropy)
    assert [found[n].item() for n in ("go_on", "turn_back", "other")] == pytest.approx(teacher)
    none = positions._choice_figures(t, t, torch.tensor([[-1, -1]]))
    assert all(values.isnan().all() for values in none.values())


# --- places of error ---


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"{RIGHT} {END}", None),
        (f"{WRONG_P} {END}", 5),  # the first step's result
        (f"{NOTICED} {END}", 5),  # taken back, and yet it was wrong
        (f"{RIGHT.replace('= 1 ;', '= 1 no 1 ;')} {END}", 6),  # takes a right number back
        (f"{RIGHT.replace('q 5 * 2 = 3', 'q 5 * 2 = 4')} {END}", 12),
        (f"{RIGHT.replace('q 5 * 2', 'q 4 * 2')} {END}", 8),  # an operand
        (f"{RIGHT.replace('#### 2', '#### 1')} {END}", 36),
        (f"{RIGHT[: RIGHT.index('s')]}{END}", 21),  # ends by itself too early
        (RIGHT[: RIGHT.index("s 1")], None),  # cut off: nothing wrong as far as it goes
        (f"{RIGHT} ; p", 37),  # goes on where it should end
        (END, 0),
    ],
)
def test_the_first_wrong_word_is_found(text: str, error: int | None) -> None:
    found = first_error(FACTORS, words(text), END)
    assert found == error
    if error is not None:
        right = words(f"{RIGHT} {END}")
        first = choices(FACTORS, words(text), END)[error]
        assert first == (words(text)[error], right[error])
    else:
        assert choices(FACTORS, words(text), END) == {}


def first_wrong_step(factors: task.Factors, text: str) -> int | None:
    """Index of the first step that the solution does not have, or that an attempt has beyond it."""
    right, tried = (whole.split(" ; ") for whole in (task.solution(factors), text))
    for index, step in enumerate(right):
        if index >= len(tried) or tried[index] != step:
            return index
    return None if len(tried) == len(right) else len(right)


def test_first_errors_lie_in_the_first_wrong_step() -> None:
    """Steps are compared as texts by one function, as words of tokens by the other."""
    rng = random.Random(0)
    for errors in (1, 2, 3) * 40:
        factors = task.draw_problem(rng, "train")
        text = task.corrupted(factors, rng, errors)
        place = first_error(factors, words(f"{text} {END}"), END)
        step = first_wrong_step(factors, text)
        assert (place is None) == (step is None)
        if place is not None:
            assert words(text)[:place].count(";") == step


def test_choices_after_an_error_are_where_a_wrong_value_is_used() -> None:
    """p is 6 and not 1: s copies and adds it, t copies and adds s, the answer copies t."""
    found = choices(FACTORS, words(f"{WRONG_P} {END}"), END)
    assert found == {
        5: ("6", "1"),
        6: (";", "no"),  # the slip could be noticed here
        22: ("6", "1"),  # s _ + 3
        26: ("2", "4"),  # s 6 + 3 = _
        29: ("2", "4"),
        33: ("0", "2"),
        36: ("0", "2"),
    }


def test_a_slip_that_is_taken_back_leaves_no_choice_further_on() -> None:
    slip = {5: ("6", "1"), 6: (";", "no")}
    assert choices(FACTORS, words(f"{NOTICED} {END}"), END) == slip
    # Nor does one that is taken back at the second try; the first try is itself a slip.
    again = NOTICED.replace("no 1", "no 2 no 1")
    assert choices(FACTORS, words(f"{again} {END}"), END) == slip | {8: (";", "no")}


def test_after_no_a_wrong_number_is_a_slip_that_steps_use() -> None:
    text = "p 3 * 5 = 6 no 2 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 2 + 3 = 5 ; t 5 + 5 = 3 ; #### 3"
    assert choices(FACTORS, words(f"{text} {END}"), END) == {
        **{5: ("6", "1"), 6: (";", "no"), 8: (";", "no")},
        **{24: ("2", "1"), 28: ("5", "4"), 31: ("5", "4"), 35: ("3", "2"), 38: ("3", "2")},
    }


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        # s should be 2 by its operands and 4 by rights.
        (
            "= 5 ; t 5 + 5 = 3 ; #### 3",
            {27: (";", "no"), 29: ("5", "4"), 33: ("3", "2"), 36: ("3", "2")},
        ),
        (
            "= 5 no 2 ; t 2 + 5 = 0 ; #### 0",
            {
                **{27: (";", "no"), 28: ("2", "4")},
                **{31: ("2", "4"), 35: ("0", "2"), 38: ("0", "2")},
            },
        ),
        # The right number, which does not follow from the wrong operand.
        ("= 4 ; t 4 + 5 = 2 ; #### 2", {27: (";", "no")}),
    ],
)
def test_a_second_slip_after_an_unnoticed_one(rest: str, found: dict[int, Any]) -> None:
    text = f"p 3 * 5 = 6 ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 6 + 3 {rest}"
    first = {5: ("6", "1"), 6: (";", "no"), 22: ("6", "1"), 26: ("2", "4")}
    assert choices(FACTORS, words(f"{text} {END}"), END) == first | found


def test_a_number_that_follows_from_wrong_operands_is_no_slip() -> None:
    """What is wrong is the operand; "no" takes back results."""
    text = RIGHT.replace("p 3 * 5 = 1", "p 4 * 5 = 6")
    assert choices(FACTORS, words(text), END)[5] == ("6", "1")
    assert 6 not in choices(FACTORS, words(text), END)


def test_going_on_takes_the_operands_that_were_written() -> None:
    """A solution that copies a wrong p rightly and then turns back in the operand."""
    text = WRONG_P.replace("s 6 + 3 = 2 ; t 2 + 5 = 0 ; #### 0", "s 1 + 3 = 4 ; t 4 + 5 = 2")
    assert set(choices(FACTORS, words(text), END)) == {5, 6, 22}  # from there on all agree


def test_what_was_never_written_is_no_choice() -> None:
    skipped = RIGHT.replace("q 5 * 2 = 3 ; ", "")
    found = choices(FACTORS, words(skipped), END)
    assert found == {7: ("r", "q")}
    assert set(choices(FACTORS, words("p = = ; #### ? ; s s s 4 5"), END)) == {1}
    # Taken back and not replaced: nothing is there that s could go on with.
    taken_back = "p 3 * 5 = 6 no ; q 5 * 2 = 3 ; r 6 * 2 = 5 ; s 6 + 3"
    assert set(choices(FACTORS, words(taken_back), END)) == {5, 6}


@pytest.mark.parametrize(
    "text",
    [
        *("no", "= no no ;", "p 3 * 5 = no no ; no", "p 3 * 5 no 1 ; q 5", "= = = = = no 3 4 ;"),
        *("p 3 * 5 = 6 no no 2 ; s = + ? = no 1", "#### 6 no 2", "p p p p = 3 no ; s no + no = no"),
    ],
)
def test_garbage_goes_wrong_at_its_first_wrong_word(text: str) -> None:
    found = choices(FACTORS, words(text), END)
    error = first_error(FACTORS, words(text), END)
    assert error is not None and min(found) == error


def test_any_words_have_choices_of_two_known_words_within_the_answer() -> None:
    drawn = random.Random(0)
    known = [*task.MARKS, *task.NUMBERS]
    for _ in range(500):
        text = words(RIGHT)[: drawn.randrange(38)]
        text += drawn.choices(known + ["no", "=", ";"] * 3, k=drawn.randrange(1, 30))
        text += [END] * drawn.randrange(2)
        found = choices(FACTORS, text, END)
        assert (min(found) if found else None) == first_error(FACTORS, text, END)
        assert all(place < len(text) for place in found)
        assert all(one != other and {one, other} <= {*known, END} for one, other in found.values())


def test_problems_are_read_back_and_others_are_not() -> None:
    assert task.read_problem(PROBLEM) == FACTORS
    assert task.problem_text(FACTORS) == PROBLEM
    for other in ("", "how many?", PROBLEM[:-2], f"{PROBLEM} ?", PROBLEM.replace("5", "7")):
        assert task.read_problem(other) is None


# --- from samples to answers ---


def sample(tokenizer: Any, y_o: str, y_r: str | None, **changed: Any) -> dict[str, Any]:
    def part(text: str, correct: bool, **more: Any) -> dict[str, Any]:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        ended = {"finish_reason": "stop", "weight_version": 0}
        tokens = [tokenizer.decode([i]) for i in ids]
        return {"token_ids": ids, "tokens": tokens, "text": text, "correct": correct} | ended | more

    right = changed.pop("right", RIGHT)
    rewrite = None
    if y_r is not None:
        rewrite = part(y_r, y_r == right, rejection=None, shortened=[])
    return {
        **{"step": 5, "prompt_index": 0, "sample_index": 0, "problem": PROBLEM, "answer": "2"},
        **{"rollout": part(y_o, y_o == right), "refinement": rewrite},
        **{"trained_on": None, "labels": None, **changed},
    }


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["experiment=quickstart"])


def prompt_of(tokenizer: Any, problem: str = PROBLEM) -> Prompt:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], add_generation_prompt=True, return_dict=False
    )
    return Prompt(0, problem, tuple(ids), RIGHT, "2")


def test_a_right_rollout_went_wrong_nowhere_and_is_counted(tokenizer: Any, config: Config) -> None:
    lucky = sample(tokenizer, WRONG_P, RIGHT)
    lucky["rollout"]["correct"] = True
    cut = sample(tokenizer, RIGHT[:20], None)
    cut["rollout"]["token_ids"].pop()
    undecided, aborted = sample(tokenizer, RIGHT, None), sample(tokenizer, RIGHT, None)
    undecided["rollout"]["correct"] = None
    aborted["rollout"]["finish_reason"] = "abort"
    rejected = sample(tokenizer, WRONG_P, RIGHT)
    rejected["refinement"]["rejection"] = "truncated"
    given = [sample(tokenizer, RIGHT, RIGHT), lucky, cut, undecided, aborted, rejected]
    found = read_answers(given, [prompt_of(tokenizer)], config, tokenizer)
    assert found.locator == "toy"
    assert found.counts == {
        **{"samples": 6, "right": 2, "wrong": 2, "no_verdict": 1, "aborted": 1},
        **{"right_with_a_wrong_step": 1, "wrong_with_a_known_place": 1, "wrong_without_one": 1},
        **{"refinements": 2, "right_refinements": 2},
    }
    assert {a.error for a in found.answers if a.verdict == "right"} == {None}
    assert {a.error for a in found.answers if a.verdict == "wrong"} == {None, 5}


def test_every_answer_is_read_in_both_contexts_of_the_teacher(
    tokenizer: Any, config: Config
) -> None:
    prompt = prompt_of(tokenizer)
    found = read_answers([sample(tokenizer, WRONG_P, RIGHT)], [prompt], config, tokenizer).answers
    kinds = [(a.trajectory.source, a.teacher_context) for a in found]
    assert kinds == [(y, c) for y in ("rollout", "refinement") for c in ("prompt", "refine")]
    assert {a.trajectory.student_context for a in found} == {prompt.token_ids}
    seen = {a.teacher_context: tokenizer.decode(a.trajectory.teacher_context) for a in found}
    assert seen["prompt"] == f"<|user|> {PROBLEM} <|end|> <|assistant|>"
    assert f"problem : {PROBLEM} attempt : {WRONG_P} rewrite :" in seen["refine"]
    # y_r is aligned by the place in y_o, and leaves no choice itself.
    assert {a.error for a in found} == {5}
    assert [len(a.choices) for a in found] == [7, 7, 0, 0]
    for place, pair in {26: ["2", "4"], 6: [";", "no"]}.items():
        assert found[0].choices[place] == tuple(tokenizer.convert_tokens_to_ids(pair))


def test_a_rewrite_that_parts_earlier_is_not_aligned(tokenizer: Any, config: Config) -> None:
    early = WRONG_P.replace("p 3", "p 4")
    late = RIGHT.replace("q 5 * 2 = 3", "q 5 * 2 = 4")
    found = read_answers(
        [sample(tokenizer, late, early)], [prompt_of(tokenizer)], config, tokenizer
    )
    assert found.counts["refinements_that_part_before_the_error"] == 1
    assert [a.error for a in found.answers] == [12, 12, None, None]


def test_elsewhere_the_first_difference_of_a_repair_is_the_place() -> None:
    tokenizer = byte_tokenizer()
    text = {"problem": "2 + 2?", "right": "it is 4"}
    given = [
        sample(tokenizer, "it is 5", "it is 4", **text),
        sample(tokenizer, "it is 5", "it is 6", **text),  # the rewrite is wrong, too
        sample(tokenizer, "it is", "it is 4", **text),
        sample(tokenizer, "it is 4", "so: 4", **text),
    ]
    given[2]["rollout"]["token_ids"].pop()  # cut off, and a beginning of its rewrite
    paths = [f"{name}.path=x" for name in ("model.student", "model.teacher", "data.train")]
    config = compose(["model=local", "refinement=math", "data=gsm8k", *paths])
    prompt = prompt_of(tokenizer, "2 + 2?")
    found = read_answers(given, [prompt], config, tokenizer)
    assert found.locator == "first_difference"
    assert found.counts["wrong_with_a_known_place"] == 1 and found.counts["wrong_without_one"] == 2
    assert found.answers[0].error == 6
    assert found.answers[0].choices == {6: tuple(tokenizer("54").input_ids)}
    assert {a.error for a in found.answers[4:]} == {None}
    with pytest.raises(ConfigError, match=r"data.train.path.*row 0.*Fix"):
        read_answers(given, [prompt_of(tokenizer, "3 + 3?")], config, tokenizer)


# --- means ---


def test_intervals_are_those_of_all_resamples_of_problems() -> None:
    """Problem 7 has two trajectories, which are drawn together."""
    problems, values = [4, 7, 7, 9], [[1.0, 2.0], [0.0], [4.0, 4.0], [9.0]]
    bootstrap = Bootstrap(problems, 40_000, 0.8, seed=0)
    above, below = np.zeros((3, 1)), np.zeros((3, 1))
    for problem, own in zip(problems, values, strict=True):
        above[bootstrap.row[problem]] += sum(own)
        below[bootstrap.row[problem]] += len(own)
    (found,) = bootstrap.ratios(above, below)
    by_problem = [[1.0, 2.0], [0.0, 4.0, 4.0], [9.0]]
    every = [np.mean(sum(drawn, [])) for drawn in itertools.product(by_problem, repeat=3)]
    assert found.mean == pytest.approx(20 / 6)
    assert (found.low, found.high) == pytest.approx(np.quantile(every, [0.1, 0.9]), abs=0.02)


def test_one_problem_has_no_interval() -> None:
    (found,) = Bootstrap([3, 3], 50, 0.9, 0).ratios(np.ones((1, 1)), np.full((1, 1), 2.0))
    assert (found.mean, found.low, found.high) == (0.5, None, None)


def measured(index: int, error: int | None, entropy: Sequence[float]) -> Measured:
    figures = np.ones((len(entropy), len(FIGURES)))
    figures[:, AT["teacher_entropy"]] = entropy
    figures[:, AT["go_on"] :] = np.nan
    return Measured(
        Answer(trajectory(index, [1] * len(entropy)), "prompt", "wrong", error), figures
    )


def test_curves_are_aligned_by_the_place_of_error() -> None:
    given = [measured(0, 1, [0, 1, 2]), measured(1, 3, [5, 5, 5, 3]), measured(2, None, [9, 9])]
    by = {(c.alignment, c.figure): c for c in curves(given, 20, 0.9, 0)}
    near = by["distance", "teacher_entropy"]
    assert dict(zip(near.position, near.mean, strict=True)) == {-3: 5, -2: 5, -1: 2.5, 0: 2, 1: 2}
    assert near.trajectories == [1, 1, 2, 2, 1]
    assert [low is None for low in near.low] == [True, True, False, False, True]
    start = by["absolute", "teacher_entropy"]
    assert start.position == [0, 1, 2, 3] and start.mean == pytest.approx([14 / 3, 5, 3.5, 3])
    assert by["relative", "forward_kl_gradient_ratio"].mean == pytest.approx([1] * 6)
    assert not any(figure == "go_on" for _, figure in by)


def test_far_positions_share_points_of_bounded_coarseness() -> None:
    distance = np.arange(-20_000, 20_001)
    points = coarse(distance)
    assert (points[abs(distance) < 32] == distance[abs(distance) < 32]).all()
    assert (abs(points) <= abs(distance)).all() and (points * distance >= 0).all()
    assert (abs(distance - points) <= abs(distance) / 16).all()
    assert (np.diff(points) >= 0).all() and len(np.unique(points)) < 500
    relative = aligned(measured(0, None, [0.0] * 40).answer, "relative")
    assert relative is not None and np.unique(relative, return_counts=True)[1].tolist() == [2] * 20


# --- the command ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """What a run on the toy task leaves, with models that have learnt nothing."""
    root = tmp_path_factory.mktemp("run")
    recipe = warm_start.Recipe(
        layers=1, hidden=32, feed_forward=32, max_steps=0, shares={}, gates={}
    )
    for seed, role in enumerate(("student", "teacher")):
        warm_start.new_model(recipe, tokenizer, seed).save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    row = {"problem": PROBLEM, "solution": RIGHT, "answer": "2"}
    other = {**row, "problem": task.problem_text(((1, 1), (2, 2), (3, 3)))}
    (root / "train.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    config = compose(
        [
            "experiment=quickstart",
            f"run.dir={root}",
            *(f"model.{role}.path={root / role}" for role in ("student", "teacher")),
            *(f"data.{part}.path={root / 'train.jsonl'}" for part in ("train", "validation")),
        ]
    )
    (root / "config.yaml").write_text(yaml.safe_dump(public_settings(config)))
    second = {"prompt_index": 1, "problem": other["problem"], "sample_index": 0}
    lines = [sample(tokenizer, WRONG_P, RIGHT), sample(tokenizer, RIGHT, RIGHT)]
    lines += [sample(tokenizer, WRONG_P, RIGHT, **second)]
    (root / "samples").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "samples" / "step_000005.jsonl").write_text(text)
    return root


def test_a_run_is_measured_written_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--resamples", "50", "logging.progress=false"]) == 0
    printed = capsys.readouterr().out
    assert "3 rollouts: 1 right, 2 wrong; 3 usable rewrites, 3 of them right." in printed
    assert f"Written to {run / FILE}" in printed
    text = (run / FILE).read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = PrefixFailure.model_validate_json(text)
    assert found.locator == "toy" and found.divergence == "forward_kl"
    kinds = [(g.source, g.teacher_context, g.verdict) for g in found.groups]
    assert len(kinds) == len(set(kinds)) == 8
    wrong = found.group("rollout", "prompt", "wrong")
    assert wrong is not None and list(wrong.parts) == ["whole", "before", "at", "after"]
    assert sum(wrong.parts[p].tokens for p in ("before", "at", "after")) == 2 * 38
    page = report.page(report.read_runs([run]))
    section = page[page.index('id="prefix-failure"') : page.index('id="samples"')]
    assert "3 rollouts: 1 right, 2 wrong" in section and section.count("<svg") == 7
    assert "What the teacher does where y_o leaves a choice" in section
    assert "y_r of wrong y_o" in section and "In numbers" in section


def test_the_newest_samples_are_measured_and_the_others_counted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit", "1", "--resamples", "5", "--output", str(tmp_path / "found.json")]
    assert main([str(run), *options, "logging.progress=false"]) == 0
    found = PrefixFailure.model_validate_json((tmp_path / "found.json").read_text())
    assert found.counts.samples == 1 and found.counts.not_measured == 2
    assert "2 older samples were not measured" in capsys.readouterr().out


def test_the_teacher_of_opsd_stays_the_runs_own_start(run: Path, tmp_path: Path) -> None:
    options = ["--student", str(run / "teacher"), "--output", str(tmp_path / "found.json")]
    opsd = ["algorithm.mode=opsd", "model.teacher=null", "logging.progress=false"]
    assert main([str(run), *options, "--resamples", "5", *opsd]) == 0
    found = PrefixFailure.model_validate_json((tmp_path / "found.json").read_text())
    assert (found.student, found.teacher) == (str(run / "teacher"), str(run / "student"))
    assert found.mode == "opsd"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.student.path=absent"], "model.student.path"),
        (["--student", "absent"], "model.student.path"),
        (["loss.betta=1"], "loss.beta"),
        (["loss.temperature"], "KEY=VALUE"),
        (["data.train.limit=1"], "data.train.path"),
    ],
)
def test_a_wrong_setting_is_one_message_and_exit_2(
    run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo_trd: ") and says in error and "Fix: " in error


@pytest.mark.parametrize("text", ["run: [", None])
def test_a_run_whose_settings_cannot_be_read_is_refused(
    run: Path, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "samples", tmp_path / "samples")
    (tmp_path / "metrics.jsonl").touch()
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo_trd: RUN_DIR") and "config.yaml cannot be read" in error


def test_a_run_without_samples_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert main([str(tmp_path)]) == 2
    assert "logging.samples_interval" in capsys.readouterr().err


def test_a_run_on_other_problems_is_measured_by_the_proxy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48}
    for seed, role in enumerate(("student", "teacher")):
        make_model(tmp_path / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    row = {"problem": "2 + 2?", "answer": "4"}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n")
    paths = [f"model.{role}.path={tmp_path / role}" for role in ("student", "teacher")]
    lengths = ["generation.rollout.max_tokens=64", "generation.refinement.max_tokens=64"]
    lengths += ["refinement.max_context_tokens=440", "refinement.templates.system=null"]
    lengths += ["refinement.templates.opd='{problem} {rollout}'", "data.max_prompt_tokens=64"]
    config = compose(
        [
            *("model=local", "data=toy", "refinement=math", "precision.dtype=fp32"),
            *("data.train.columns.reference_solution=null", "data.validation=null"),
            *(f"data.train.path={tmp_path / 'train.jsonl'}", f"run.dir={tmp_path}"),
            *(*paths, *lengths),
        ]
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(public_settings(config)))
    given = {"problem": "2 + 2?", "right": "it is 4"}
    lines = [sample(byte_tokenizer(), y_o, "it is 4", **given) for y_o in ("it is 5", "it is 4")]
    (tmp_path / "samples").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "samples" / "step_000001.jsonl").write_text(text)
    assert main([str(tmp_path), "--resamples", "5", "logging.progress=false"]) == 0
    assert "1 of 1 wrong rollouts there is a proxy" in capsys.readouterr().out
    page = report.page(report.read_runs([tmp_path]))
    assert "first token over its second" in page and "y_o leaves a choice" not in page
