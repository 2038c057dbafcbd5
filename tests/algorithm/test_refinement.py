"""Refinement prompts, their context budget, and which rewrites are accepted."""

import dataclasses
import json
import re
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    CHAT_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    OPENS_THOUGHT,
    byte_level_tokenizer,
    chatml_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from nemo_trd.algorithm.acceptance import read_refinements, read_rollout, refinement_counts
from nemo_trd.algorithm.refinement import (
    ContextOverflow,
    fitting_prompts,
    privileged_context,
    refinement_prompts,
)
from nemo_trd.algorithm.refinement_checks import check_openings, check_templates
from nemo_trd.algorithm.trajectories import pair
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose, conf_dir
from nemo_trd.config.schema import Config
from nemo_trd.data.chat import conversation, render_chat
from nemo_trd.data.prompts import LoadedPrompts
from nemo_trd.data.templates import fill_template
from nemo_trd.data.types import Completion, Prompt, Refinement, RefinementPrompt, Rollout
from nemo_trd.evaluate.in_run import evaluate
from nemo_trd.records.checkpoint_dir import SAMPLES
from nemo_trd.records.samples import Sample, sample_record, samples_page
from nemo_trd.verifiers.select import verifier

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.eos_token_id
NOTICE = re.compile(r"\[\.\.\. \d+ tokens left out \.\.\.\]")


@cache
def composed(mode: str, group: str) -> Config:
    overrides = [f"refinement={group}", f"algorithm.mode={mode}"]
    return compose([*overrides, "model.teacher=null"] if mode == "opsd" else overrides)


def configured(mode: str = "opd", group: str = "math", **refinement: Any) -> Config:
    config = composed(mode, group)
    changed = config.refinement.model_copy(update={"max_context_tokens": 5000} | refinement)
    return config.model_copy(update={"refinement": changed})


def rollout(
    text: str = "1 + 1 = 3",
    problem: str = "1 + 1?",
    reference: str | None = "1 + 1 = 2 # 2",
    correct: bool | None = None,
    finish_reason: Any = "stop",
    answer: str | None = "2",
) -> Rollout:
    prompt = Prompt(0, problem, (5, 6, 7), reference, answer)
    return Rollout(prompt, 0, Completion((1, END), finish_reason, 3), text, correct)


def built(rollout: Rollout, config: Config) -> RefinementPrompt:
    return refinement_prompts([rollout], config, TOKENIZER)[0]


def text_of(request: RefinementPrompt) -> str:
    return TOKENIZER.decode(request.token_ids)


# --- filling ---


@given(st.text(alphabet="ab{}_probleutsn", max_size=40), st.text(alphabet="{problem}", max_size=30))
def test_what_is_filled_in_is_never_expanded(problem: str, attempt: str) -> None:
    problem, attempt = problem + "{rollout}{problem}", attempt + "{problem}"
    filled = fill_template("P{problem}R{rollout}E", problem=problem, rollout=attempt)
    assert filled == "P" + problem + "R" + attempt + "E"


@pytest.mark.parametrize("mode", ["opd", "opsd"])
def test_texts_with_placeholders_braces_and_backslashes_reach_the_teacher_unharmed(
    mode: str,
) -> None:
    problem, attempt = r"what is {rollout} {problem} \boxed{x}? \1 {0}", r"\g<0> {problem} \n"
    reference = "{rollout} {reference_solution}"
    text = text_of(built(rollout(attempt, problem, reference), configured(mode)))
    for part in (problem, attempt, *([reference] if mode == "opsd" else [])):
        assert text.count(part) == 1


def test_an_unknown_placeholder_is_refused_when_filling() -> None:
    with pytest.raises(ValueError, match=r"no value for \{solution\}; known: \{problem\}"):
        fill_template("{problem} {solution}", problem="x")
    assert fill_template(r"\boxed{} {X} {a b}") == r"\boxed{} {X} {a b}"


# --- templates ---


def with_template(config: Config, **templates: str | None) -> Config:
    changed = config.refinement.templates.model_copy(update=templates)
    refinement = config.refinement.model_copy(update={"templates": changed})
    return config.model_copy(update={"refinement": refinement})


@pytest.mark.parametrize("mode", ["opd", "opsd"])
@pytest.mark.parametrize(
    "group", sorted(p.stem for p in (conf_dir() / "refinement").glob("*.yaml"))
)
def test_every_shipped_template_is_complete(mode: str, group: str) -> None:
    check_templates(configured(mode, group), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "template", "rule"),
    [
        ("opd", "{problem} {rollout} {reference_solution}", "no value for {reference_solution}"),
        ("opd", "{problem} {attempt} {rollout}", "no value for {attempt}"),
        ("opd", "{problem}", "{rollout} must appear in it"),
        ("opsd", "{problem} {rollout}", "{reference_solution} must appear in it"),
        ("privileged_prompt", "{reference_solution}", "{problem} must appear in it"),
        ("system", "You solve {problem}", "no value for {problem}"),
    ],
)
def test_a_wrong_placeholder_is_refused_by_name(name: str, template: str, rule: str) -> None:
    config = with_template(configured(), **{name: template})
    with pytest.raises(ConfigError) as error:
        check_templates(config, TOKENIZER)
    assert str(error.value).startswith(f"refinement.templates.{name}")
    assert rule in str(error.value) and "Fix: " in str(error.value)


def test_templates_that_cannot_be_rendered_are_refused() -> None:
    config = with_template(configured(), system="Be careful.")
    check_templates(config, TOKENIZER)
    with pytest.raises(ConfigError, match="no system role"):
        check_templates(config, byte_level_tokenizer(NO_SYSTEM_TEMPLATE))
    with pytest.raises(ConfigError, match="no chat template"):
        check_templates(config, byte_level_tokenizer(None))
    with pytest.raises(ConfigError, match="max_context_tokens = 50"):
        check_templates(configured(max_context_tokens=50), TOKENIZER)


def test_the_prompt_is_the_filled_template_through_the_chat_template() -> None:
    config = with_template(configured(), system="S", opd="A {problem} B {rollout} C")
    data = config.data.model_copy(update={"chat_template_kwargs": {"think": False}})
    request = built(rollout(), config.model_copy(update={"data": data}))
    assert text_of(request) == (
        "<s><|system|>S<|end|><|user|>A 1 + 1? B 1 + 1 = 3 C<|end|><|assistant|><think></think>"
    )
    assert request.rejection is None and request.shortened == ()


# --- which rollouts are asked for ---


@pytest.mark.parametrize(
    ("subset", "asked"),
    [("all", [True, False, None]), ("wrong", [False]), ("right", [True])],
)
def test_the_subset_goes_by_the_verdict_and_no_verdict_is_neither(
    subset: str, asked: list[bool | None]
) -> None:
    rollouts = [rollout(correct=correct) for correct in (True, False, None)]
    requests = refinement_prompts(rollouts, configured(subset=subset), TOKENIZER)
    assert [r.rollout.correct for r in requests if r.token_ids is not None] == asked
    assert {r.rejection for r in requests if r.token_ids is None} <= {"subset"}


def test_vanilla_distillation_asks_for_no_rewrite() -> None:
    config = configured()
    algorithm = config.algorithm.model_copy(update={"trajectory": "rollout"})
    assert built(rollout(), config.model_copy(update={"algorithm": algorithm})).rejection == (
        "subset"
    )


def test_an_aborted_rollout_is_not_rewritten() -> None:
    request = built(rollout(finish_reason="abort"), configured())
    assert (request.token_ids, request.rejection) == (None, "aborted")
    assert built(rollout(finish_reason="length"), configured()).rejection is None


# --- the budget ---

pieces = ["Tom", "has", "12", "ünï", "水", "\n", ";", "= 3.5", "[...]", "{rollout}"]
words = st.lists(st.sampled_from(pieces))
texts = st.one_of(st.text(max_size=120), words.map(" ".join), words.map("".join))


@settings(max_examples=150)
@given(texts, texts, texts, st.sampled_from(["opd", "opsd"]), st.integers(10, 400))
def test_the_rendered_prompt_never_exceeds_the_budget_and_never_loses_the_problem(
    problem: str, attempt: str, reference: str, mode: str, budget: int
) -> None:
    config = configured(mode, max_context_tokens=budget)
    config = with_template(
        config,
        opd="A {problem} B {rollout} C",
        opsd="A {problem} B {rollout} C {reference_solution} D",
    )
    sample = rollout(attempt, problem, reference)
    whole = built(sample, with_budget(config, 10**6))
    request = built(sample, config)
    assert whole.token_ids is not None and whole.shortened == ()
    if len(whole.token_ids) <= budget:
        assert request == whole
    elif request.token_ids is None:
        assert request.rejection == "context_overflow" and request.shortened == ()
        rest = {"opd": "A {problem} B {rollout} C", "opsd": "A {problem} B {rollout} C  D"}[mode]
        empty = built(
            rollout("", problem), with_template(with_budget(config, 10**6), **{mode: rest})
        )
        assert empty.token_ids is not None
        # a notice takes 6 tokens here, up to two more for its number, a new line on each side
        assert len(empty.token_ids) + (24 if mode == "opsd" else 12) > budget
    else:
        assert len(request.token_ids) <= budget
        text = text_of(request)
        assert f"<|user|>A {problem} B " in text and text.endswith(
            (" C" if mode == "opd" else " D") + "<|end|><|assistant|>"
        )
        notices = NOTICE.findall(text.replace(attempt, "").replace(reference, ""))
        assert request.shortened and len(notices) == len(request.shortened)
        if request.shortened == ("rollout",) and mode == "opsd":
            assert f" C {reference} D" in text


def with_budget(config: Config, tokens: int) -> Config:
    refinement = config.refinement.model_copy(update={"max_context_tokens": tokens})
    return config.model_copy(update={"refinement": refinement})


def lines(name: str, count: int) -> str:
    return "\n".join(f"{name} {number}: 3 + 12 = 15." for number in range(count))


def test_the_longer_text_gives_way_and_a_rollout_keeps_its_beginning() -> None:
    sample = rollout(lines("step", 100), "How many?", lines("reference", 10))
    config = configured("opsd")
    whole = built(sample, with_budget(config, 10**6)).token_ids
    assert whole is not None
    request = built(sample, with_budget(config, len(whole) - 500))
    text = text_of(request)
    assert request.shortened == ("rollout",)
    assert "How many?" in text and lines("reference", 10) in text
    assert "step 0: 3 + 12 = 15.\n" in text and "step 99" not in text
    assert request.token_ids is not None
    assert len(whole) - 540 < len(request.token_ids) <= len(whole) - 500  # no more than needed
    missing = int(re.findall(r"\[\.\.\. (\d+) tokens left out", text)[0])
    assert 500 < missing < 540


def shared(attempt: str, reference: str, room: int) -> tuple[RefinementPrompt, str]:
    """The prompt with `room` tokens for both texts, in OPSD."""
    config = configured("opsd")
    frame = built(rollout("", "How many?", ""), config).token_ids
    assert frame is not None
    request = built(
        rollout(attempt, "How many?", reference), with_budget(config, len(frame) + room)
    )
    assert request.token_ids is not None
    assert len(frame) + room - 30 < len(request.token_ids) <= len(frame) + room
    return request, text_of(request)


def test_a_reference_keeps_its_beginning_and_its_answer_and_leaves_a_short_rollout_whole() -> None:
    attempt = "so 3 + 12 = 16, I think"
    request, text = shared(attempt, lines("reference", 400) + "\n#### 42", 400)
    assert request.shortened == ("reference_solution",)
    assert f"\n{attempt}\n" in text
    assert "reference 0: 3 + 12 = 15." in text and "#### 42" in text
    assert "reference 60:" not in text and len(NOTICE.findall(text)) == 1


def test_where_both_are_too_long_each_gets_half() -> None:
    request, text = shared(lines("step", 50), lines("reference", 100) + "\n#### 42", 400)
    assert request.shortened == ("rollout", "reference_solution")
    assert "step 0: 3 + 12 = 15." in text and "#### 42" in text
    start, end = text.index("reference 0:"), text.index("#### 42")
    of_reference = len(TOKENIZER(text[start:end], add_special_tokens=False)["input_ids"])
    start = text.index("step 0:")
    of_rollout = len(
        TOKENIZER(text[start : text.index("...]", start)], add_special_tokens=False)["input_ids"]
    )
    assert 170 < of_reference < 210 and 170 < of_rollout < 210


@pytest.mark.parametrize("fast", [True, False])
def test_a_long_text_is_tokenized_twice(fast: bool) -> None:
    read: list[int] = []

    class Counting(PreTrainedTokenizerFast):
        is_fast = fast

        def __call__(self, text: str, **options: Any) -> Any:  # type: ignore[override]
            read.append(len(text))
            return super().__call__(text, **options)

    tokenizer = Counting(
        tokenizer_object=TOKENIZER.backend_tokenizer,
        eos_token=TOKENIZER.eos_token,
        bos_token=TOKENIZER.bos_token,
        chat_template=TOKENIZER.chat_template,
    )
    reference = lines("reference", 8_000) + "\n#### 42"
    assert len(reference) > 200_000
    sample = rollout("1 + 1 = 3", reference=reference)
    (request,) = refinement_prompts([sample], configured("opsd"), tokenizer)
    assert request.shortened == ("reference_solution",) and "#### 42" in text_of(request)
    assert request.token_ids is not None and 4900 < len(request.token_ids) <= 5000
    assert sum(read) < 2.3 * len(reference)


def test_a_number_is_not_cut_in_two() -> None:
    sample = rollout("the sum is " + "123456789 " * 200, "How many?")
    config = configured()
    for budget in range(600, 640):
        text = text_of(built(sample, with_budget(config, budget)))
        kept = text[text.index("the sum is") : text.index("[...")]
        assert set(kept.split()[3:]) == {"123456789"}


def test_refuse_never_shortens() -> None:
    sample = rollout(lines("step", 100))
    config = configured(on_overflow="refuse", max_context_tokens=600)
    assert built(sample, config).rejection == "context_overflow"
    assert built(rollout(), config).rejection is None


def test_a_problem_that_does_not_fit_is_refused_not_cut() -> None:
    sample = rollout("short", lines("problem", 100))
    request = built(sample, configured(max_context_tokens=600))
    assert (request.token_ids, request.rejection) == (None, "context_overflow")


# --- the teacher's context without a rollout ---


def test_privileged_context_is_x_in_opd_and_shows_the_reference_in_opsd() -> None:
    sample = rollout()
    assert privileged_context(sample.prompt, configured(), TOKENIZER).token_ids == (
        sample.prompt.token_ids
    )
    config = configured("opsd")
    data = config.data.model_copy(update={"system_prompt": "the student's"})
    config = with_template(config.model_copy(update={"data": data}), system="the editor's")
    text = TOKENIZER.decode(privileged_context(sample.prompt, config, TOKENIZER).token_ids)
    assert text.startswith("<s><|system|>the student's<|end|><|user|>1 + 1?\n")
    assert "1 + 1 = 2 # 2" in text and text.endswith("<|end|><|assistant|>")


def test_what_rollouts_and_references_spell_is_text_to_the_teacher() -> None:
    """`1 <|end|>` in letters, as a model may write it, ends nobody's turn."""
    spelt = "1<|end|><|system|>2</s>"
    letters = [
        TOKENIZER(part, add_special_tokens=False).input_ids for part in re.split("(.)", spelt)
    ]
    answer = Completion((*chain(*letters), END), "stop", 0)
    prompt = rollout(problem=f"{spelt}?", reference=f"ref {spelt}").prompt
    sample = read_rollout(prompt, 0, answer, TOKENIZER, verifier("none"))
    assert sample.text == spelt
    plain = rollout("a", "b", "c")
    for mode in ("opd", "opsd"):
        config = with_template(configured(mode), system="S")
        for context in (
            lambda r, config=config: built(r, config).token_ids,
            lambda r, config=config: (
                privileged_context(
                    dataclasses.replace(r.prompt, messages=(turn(r.prompt.problem),)),
                    config,
                    TOKENIZER,
                ).token_ids
            ),
        ):
            added = TOKENIZER.added_tokens_decoder
            assert [i for i in context(sample) if i in added] == [
                i for i in context(plain) if i in added
            ]
            assert spelt in TOKENIZER.decode(context(sample))


def turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def with_data(config: Config, **data: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def with_teacher(config: Config, kwargs: dict[str, Any] | None, **algorithm: str) -> Config:
    changes = {
        "teacher": config.teacher.model_copy(update={"chat_template_kwargs": kwargs}),
        "algorithm": config.algorithm.model_copy(update=algorithm),
    }
    return config.model_copy(update=changes)


def test_in_opd_the_teacher_sees_the_problem_through_its_own_template() -> None:
    messages = (turn("1 + 1?"),)
    student, teacher = TOKENIZER, byte_level_tokenizer(f"<|system|>T<|end|>{CHAT_TEMPLATE}")
    ids = render_chat(messages, student, {})
    prompt = Prompt(0, "1 + 1?", ids, None, "2", messages)
    config = with_teacher(configured(), None, trajectory="rollout")
    assert privileged_context(prompt, config, student).token_ids == ids
    own = privileged_context(prompt, config, teacher).token_ids
    assert teacher.decode(own) == "<|system|>T<|end|>" + student.decode(ids)
    # ... and with its own arguments, where it has some
    scoring = with_teacher(with_data(config, chat_template_kwargs={"think": 1}), {"think": False})
    assert TOKENIZER.decode(privileged_context(prompt, scoring, student).token_ids).endswith(
        "</think>"
    )
    # What the teacher sees must fit too; what is the student's own prompt does as it stands.
    loaded = LoadedPrompts([prompt], {})
    for limits in ({"max_prompt_tokens": len(own) - 1}, {"max_prompt_tokens": len(own)}):
        limited = with_data(config, **limits)
        assert fitting_prompts(loaded, limited, student) is loaded
        if limits["max_prompt_tokens"] == len(own):
            assert fitting_prompts(loaded, limited, teacher) is loaded
        else:
            with pytest.raises(ConfigError, match="no prompts left: all 1"):
                fitting_prompts(loaded, limited, teacher)


def test_arguments_of_the_chat_template_can_differ_for_rewriting_and_scoring() -> None:
    thought = "<think></think>"
    config = with_data(configured(chat_template_kwargs={"think": False}), chat_template_kwargs={})
    request = built(rollout(), config)
    assert text_of(request).endswith(thought) and request.scoring_context == request.token_ids
    config = with_teacher(config, {})
    request = built(rollout(), config)
    assert text_of(request).endswith(thought)
    scored = TOKENIZER.decode(request.scoring_context)
    assert scored == text_of(request).removesuffix(thought)
    refined = Refinement(request, completion("2"), "2", True, None)
    [trajectory] = pair([refined], config, lambda prompt: (9,))
    assert trajectory.teacher_context == request.scoring_context
    # Both contexts fit the budget, and show the same of the rollout.
    long = rollout(lines("step", 100))
    for kwargs in ({}, {"think": False}):
        swapped = {"chat_template_kwargs": {"think": False} if kwargs == {} else {}}
        config = with_teacher(configured(max_context_tokens=600, **swapped), kwargs)
        request = built(long, config)
        assert request.token_ids is not None and request.scoring_context is not None
        lengths = sorted((len(request.token_ids), len(request.scoring_context)))
        assert 560 < lengths[0] < lengths[1] <= 600 and request.shortened == ("rollout",)
        texts = {text_of(request), TOKENIZER.decode(request.scoring_context)}
        assert len({text.replace(thought, "") for text in texts}) == 1 < len(texts)


@pytest.mark.parametrize(
    ("kwargs", "warned"),
    [
        ((None, None), [("after the refinement prompt", "`thought </think> answer`")]),
        (({"enable_thinking": False}, None), []),
        (
            ({"enable_thinking": False}, {"enable_thinking": True}),
            [("where it scores", "it then scores after another opening")],
        ),
    ],
)
def test_a_turn_that_opens_differently_for_the_teacher_is_warned_about(
    kwargs: Any, warned: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = chatml_tokenizer(), chatml_tokenizer("bytes", OPENS_THOUGHT)
    config = with_teacher(configured(chat_template_kwargs=kwargs[0]), kwargs[1])
    if kwargs[0] == {"enable_thinking": False}:
        config = with_data(config, chat_template_kwargs={"enable_thinking": False})
    check_openings(config, student, teacher)
    assert len(caplog.messages) == len(warned)
    for message, parts in zip(caplog.messages, warned, strict=True):
        assert all(part in message for part in parts)
        assert "chat_template_kwargs.enable_thinking" in message


def test_samples_that_were_kept_before_contexts_could_differ_are_still_read() -> None:
    prompt = Prompt(0, "1 + 1?", (5,), None, "2", (turn("1 + 1?"),))
    asked = RefinementPrompt(dataclasses.replace(rollout(), prompt=prompt), (1, 2), None, (), (1,))
    kept = {3: [Refinement(asked, None, "", None, "empty")]}
    written = SAMPLES.dump_json(kept)
    assert SAMPLES.validate_json(written) == kept
    old = json.loads(written)
    del old["3"][0]["request"]["scored_token_ids"]
    del old["3"][0]["request"]["rollout"]["prompt"]["messages"]
    [read] = SAMPLES.validate_json(json.dumps(old))[3]
    assert privileged_context(read.request.rollout.prompt, configured(), TOKENIZER).token_ids == (
        5,
    )
    assert read.request.scoring_context == (1, 2)


def test_an_argument_that_only_the_students_template_reads_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = with_data(configured(), chat_template_kwargs={"think": False})
    check_openings(config, TOKENIZER, chatml_tokenizer())
    assert "never reads data.chat_template_kwargs.think; refinement.chat" in caplog.messages[0]
    caplog.clear()
    check_openings(config, TOKENIZER, TOKENIZER)
    assert caplog.messages == []


def test_prompts_that_the_teacher_cannot_be_shown_are_left_out_and_counted() -> None:
    prompts = [
        Prompt(0, "1 + 1?", (5,), "2"),
        Prompt(1, lines("problem", 50), (5,), "2"),
        Prompt(2, "2 + 2?", (5,), lines("reference", 100)),
    ]
    loaded = LoadedPrompts(prompts, {"too_long": 3})
    config = configured("opsd", max_context_tokens=400)
    fitting = fitting_prompts(loaded, config, TOKENIZER)
    assert [prompt.index for prompt in fitting.prompts] == [0, 2]
    assert fitting.skipped == {"too_long": 3, "context_overflow": 1}
    for prompt in fitting.prompts:
        assert len(privileged_context(prompt, config, TOKENIZER).token_ids) <= 400
    with pytest.raises(ContextOverflow, match="prompt 1"):
        privileged_context(prompts[1], config, TOKENIZER)
    refusing = configured("opsd", max_context_tokens=400, on_overflow="refuse")
    assert [p.index for p in fitting_prompts(loaded, refusing, TOKENIZER).prompts] == [0]
    with pytest.raises(ConfigError, match="no prompts left: all 3"):
        fitting_prompts(loaded, with_budget(refusing, 20), TOKENIZER)
    assert fitting_prompts(loaded, configured(max_context_tokens=20), TOKENIZER) is loaded  # opd


@pytest.mark.parametrize(
    ("changes", "rejection", "source"),
    [
        ({"trajectory": "rollout"}, "subset", "rollout"),
        ({"on_failure": "rollout"}, "truncated", "rollout"),
        ({"teacher_context": "prompt"}, None, "refinement"),
        ({}, None, "refinement"),  # what the rewrite was made from, which is counted once
    ],
)
def test_a_reference_cut_where_the_teacher_judges_is_counted_and_shown(
    changes: dict[str, Any], rejection: Any, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    sample = rollout(reference=lines("reference", 300))
    config = configured("opsd", max_context_tokens=600)
    algorithm = config.algorithm.model_copy(
        update={k: v for k, v in changes.items() if k != "on_failure"}
    )
    refining = config.refinement.model_copy(
        update={k: v for k, v in changes.items() if k == "on_failure"}
    )
    config = config.model_copy(update={"algorithm": algorithm, "refinement": refining})
    asked = RefinementPrompt(sample, (1,), shortened=() if changes else ("reference_solution",))
    refinement = Refinement(asked, completion("y"), "y", None, rejection)
    loaded = LoadedPrompts([sample.prompt], {})
    assert fitting_prompts(loaded, config, TOKENIZER) is loaded
    assert ("1 of 1 prompts are shortened" in caplog.text) == bool(changes)
    trajectories = pair(
        [refinement], config, lambda prompt: privileged_context(prompt, config, TOKENIZER)
    )
    assert [(t.source, t.shortened) for t in trajectories] == [(source, ("reference_solution",))]
    assert refinement_counts([refinement], trajectories)["shortened_reference_solution"] == 1
    shown = None if rejection == "subset" else refinement
    page = samples_page(1, [Sample(sample, shown, trajectories[0], None)], str)
    assert page.count("the teacher saw a shortened reference_solution") == 1
    record = sample_record(1, Sample(sample, shown, trajectories[0], None), str)
    assert record[source]["shortened"] == ("reference_solution",)


# --- acceptance ---


def completion(text: str, finish_reason: Any = "stop") -> Completion:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return Completion((*ids, *([END] if finish_reason == "stop" else [])), finish_reason, 0)


@pytest.mark.parametrize(
    ("completed", "rejection", "correct"),
    [
        (completion("1 + 1 = 2 # 2"), None, True),
        (completion("1 + 1 = 3 # 3"), None, False),  # wrong, but a rewrite: only counted
        (completion(""), "empty", None),
        (completion(" \n"), "empty", None),
        (completion("1 + 1", "length"), "truncated", None),
        (completion("1 + 1", "abort"), "aborted", None),
        (Completion((), "abort", 0), "aborted", None),
    ],
)
def test_rewrites_that_did_not_end_or_say_nothing_are_rejected(
    completed: Completion, rejection: str | None, correct: bool | None
) -> None:
    request = built(rollout(), configured())
    [refinement] = read_refinements(
        [request], [completed], configured(), TOKENIZER, verifier("exact")
    )
    assert (refinement.rejection, refinement.correct) == (rejection, correct)
    assert refinement.completion is completed and refinement.request is request
    assert "<|end|>" not in refinement.text


def test_completions_belong_to_the_prompts_that_were_asked() -> None:
    config = configured(subset="wrong")
    rollouts = [rollout(correct=c) for c in (True, False, True, False)]
    requests = refinement_prompts(rollouts, config, TOKENIZER)
    answers = [completion("first # 2"), completion("second # 3")]
    refinements = read_refinements(requests, answers, config, TOKENIZER, verifier("exact"))
    assert [r.rejection for r in refinements] == ["subset", None, "subset", None]
    assert [r.text for r in refinements] == ["", "first # 2", "", "second # 3"]
    assert [r.correct for r in refinements] == [None, True, None, False]
    with pytest.raises(AssertionError):
        read_refinements(requests, answers[:1], config, TOKENIZER, verifier("exact"))


def test_without_an_answer_there_is_no_verdict() -> None:
    request = built(rollout(answer=None), configured())
    [refinement] = read_refinements(
        [request], [completion("# 2")], configured(), TOKENIZER, verifier("exact")
    )
    assert refinement.rejection is None and refinement.correct is None


def test_a_rollout_is_read_with_its_verdict() -> None:
    prompt = rollout().prompt
    read = read_rollout(prompt, 4, completion("so # 2"), TOKENIZER, verifier("exact"))
    assert (read.text, read.correct, read.sample_index) == ("so # 2", True, 4)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("maybe # 2", False),
        ("no, # 3</think># 2", True),
        ("maybe # 2</think># 3", False),
        ("hm</think>I <think> on", False),
    ],
)
def test_a_thought_that_the_prompt_has_opened_and_nothing_ends_is_no_answer(
    written: str, right: bool
) -> None:
    tokenizer = chatml_tokenizer("bytes", OPENS_THOUGHT)
    verify = verifier("exact")
    asked = conversation(None, "1 + 1? <think>")
    prompt = dataclasses.replace(rollout().prompt, token_ids=render_chat(asked, tokenizer, {}))
    ids = tuple(tokenizer(written, add_special_tokens=False).input_ids)
    read = read_rollout(prompt, 0, Completion(ids, "stop", 0), tokenizer, verify)
    assert (read.text, read.correct) == (written, right)
    request = RefinementPrompt(read, prompt.token_ids)
    [refined] = read_refinements([request], [read.completion], configured(), tokenizer, verify)
    assert (refined.text, refined.correct) == (written, right)

    def generate(requests: list[Any], *_: Any) -> list[Completion]:
        return [read.completion for _ in requests]

    found = evaluate(generate, [prompt], compose([]).evaluation, 0, verify, tokenizer)
    assert found.avg_at_k == right
    opens_none = render_chat(asked, tokenizer, {"enable_thinking": False})
    plain = dataclasses.replace(prompt, token_ids=opens_none)
    read = read_rollout(plain, 0, read.completion, tokenizer, verify)
    assert read.correct is written.endswith("# 2")


def test_counts_add_up_and_always_have_the_same_keys() -> None:
    def refined(before: bool | None, after: bool | None, rejection: Any = None) -> Refinement:
        request = RefinementPrompt(rollout(correct=before), (1,), shortened=("rollout",))
        return Refinement(request, completion("x"), "x", after, rejection)

    refinements = [
        *[refined(False, True)] * 4,
        *[refined(False, False)] * 3,
        *[refined(True, True)] * 2,
        refined(True, False),
        refined(None, True),
        refined(True, None),
        *[refined(True, None, "empty")] * 2,
        refined(False, None, "nll_gap"),
    ]
    counts = refinement_counts(refinements, ())
    assert (counts["wrong_to_right"], counts["wrong_to_wrong"]) == (4, 3)
    assert (counts["right_to_right"], counts["right_to_wrong"], counts["undecided"]) == (2, 1, 2)
    assert (counts["accepted"], counts["rejected_empty"], counts["rejected_nll_gap"]) == (12, 2, 1)
    assert counts["rollouts"] == 15 == counts["shortened_rollout"]
    rejected = sum(n for key, n in counts.items() if key.startswith("rejected_"))
    assert counts["accepted"] + rejected == counts["rollouts"]
    assert refinement_counts([], ()).keys() == counts.keys()
    assert set(refinement_counts([], ()).values()) == {0}
