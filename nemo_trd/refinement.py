"""Refinement prompts: what the teacher sees when it rewrites a rollout, and which rewrites count.

Pure functions of records and a tokenizer. Source: the refinement step of arXiv 2606.08432; the
wording of the prompts is ours and stands in `conf/refinement/`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

from jinja2 import TemplateError

from nemo_trd.chat import conversation, render_chat
from nemo_trd.config import Config, ConfigError, rule_broken
from nemo_trd.context_budget import Render, Texts, fit
from nemo_trd.control_tokens import Message
from nemo_trd.generation.stop_strings import completion_text
from nemo_trd.prompts import LoadedPrompts
from nemo_trd.templates import fill_template
from nemo_trd.thoughts import text_to_judge
from nemo_trd.types import (
    Completion,
    FittedContext,
    Prompt,
    Refinement,
    RefinementPrompt,
    Rejection,
    Rollout,
    TokenIds,
    Trajectory,
)
from nemo_trd.verifiers import Verifier, judge_all

log = logging.getLogger(__name__)


class ContextOverflow(ValueError):
    """A teacher context that does not fit `refinement.max_context_tokens`, however shortened."""


# --- contexts of the teacher ---


def rewriting_kwargs(config: Config) -> dict[str, Any]:
    """Arguments of the chat template for refinement prompts."""
    own = config.refinement.chat_template_kwargs
    return config.data.chat_template_kwargs if own is None else own


def scoring_kwargs(config: Config) -> dict[str, Any]:
    """Arguments of the teacher's chat template for a context without a rollout."""
    own = config.teacher.chat_template_kwargs
    return config.data.chat_template_kwargs if own is None else own


def refinement_prompts(
    rollouts: Sequence[Rollout], config: Config, teacher_tokenizer: Any
) -> list[RefinementPrompt]:
    """c_T of every rollout, (x, y_o) or in OPSD (x, y*, y_o), or why none is asked for.

    `refinement.subset` wrong and right take the rollouts that the verifier called so; one
    without a verdict is in neither. With `algorithm.trajectory=rollout` none is in the subset.
    """
    return [_refinement_prompt(rollout, config, teacher_tokenizer) for rollout in rollouts]


def _refinement_prompt(rollout: Rollout, config: Config, tokenizer: Any) -> RefinementPrompt:
    if not _in_subset(rollout, config):
        return RefinementPrompt(rollout, None, "subset")
    if rollout.completion.finish_reason == "abort":
        return RefinementPrompt(rollout, None, "aborted")
    templates = config.refinement.templates
    texts = {"problem": rollout.prompt.problem, "rollout": rollout.text}
    template = templates.opd
    if config.algorithm.mode == "opsd":
        texts["reference_solution"] = _reference(rollout.prompt)
        template = templates.opsd
    render = renderer(template, templates.system, rewriting_kwargs(config), tokenizer)
    scored = config.teacher.chat_template_kwargs
    if scored in (None, rewriting_kwargs(config)):
        token_ids, shortened = fit(texts, render, config.refinement, tokenizer)
        if token_ids is None:
            return RefinementPrompt(rollout, None, "context_overflow")
        return RefinementPrompt(rollout, token_ids, shortened=shortened)
    pairs: dict[TokenIds, tuple[TokenIds, TokenIds]] = {}
    render_scored = renderer(template, templates.system, scored, tokenizer)

    def longer(texts: Texts) -> TokenIds:
        """Of the two contexts; both of them have to fit."""
        pair = render(texts), render_scored(texts)
        pairs[max(pair, key=len)] = pair
        return max(pair, key=len)

    fitting, shortened = fit(texts, longer, config.refinement, tokenizer)
    if fitting is None:
        return RefinementPrompt(rollout, None, "context_overflow")
    asked, scored_ids = pairs[fitting]
    return RefinementPrompt(rollout, asked, None, shortened, scored_ids)


def _in_subset(rollout: Rollout, config: Config) -> bool:
    if config.algorithm.trajectory == "rollout":
        return False
    wanted = {"all": (True, False, None), "wrong": (False,), "right": (True,)}
    return rollout.correct in wanted[config.refinement.subset]


def privileged_context(prompt: Prompt, config: Config, tokenizer: Any) -> FittedContext:
    """The teacher's context without a rollout (`teacher_context=prompt`): x, in OPSD (x, y*).

    In OPD the student's messages through the teacher's own chat template. In OPSD it has the
    student's system prompt, not the one of the rewriting instructions, and y* is shortened as in
    a refinement prompt.

    Raises:
        ContextOverflow: it does not fit; `fitting_prompts` leaves such prompts out beforehand.
    """
    if config.algorithm.mode == "opd":
        if prompt.messages is None:
            return FittedContext(prompt.token_ids)
        return FittedContext(_rendered(prompt.messages, scoring_kwargs(config), tokenizer))
    texts = {"problem": prompt.problem, "reference_solution": _reference(prompt)}
    template = config.refinement.templates.privileged_prompt
    render = renderer(template, config.data.system_prompt, scoring_kwargs(config), tokenizer)
    token_ids, shortened = fit(texts, render, config.refinement, tokenizer)
    if token_ids is None:
        raise ContextOverflow(
            f"prompt {prompt.index}: problem and reference solution do not fit "
            f"refinement.max_context_tokens = {config.refinement.max_context_tokens}"
        )
    return FittedContext(token_ids, shortened)


def fitting_prompts(loaded: LoadedPrompts, config: Config, tokenizer: Any) -> LoadedPrompts:
    """Leave out the prompts that the teacher could not be shown, counted as "context_overflow".

    One warning tells how many are shown shortened.

    Raises:
        ConfigError: none is left.
    """
    if config.algorithm.mode == "opd" and not config.shows_prompt_to_teacher:
        return loaded
    prompts, shortened = [], 0
    for prompt in loaded.prompts:
        context = _fitting_context(prompt, config, tokenizer)
        if context is not None:
            prompts.append(prompt)
            shortened += bool(context.shortened)
    if shortened and config.shows_prompt_to_teacher:
        log.warning(
            "the reference solutions of %d of %d prompts are shortened to fit "
            "refinement.max_context_tokens = %d where the teacher judges an answer",
            shortened,
            len(prompts),
            config.refinement.max_context_tokens,
        )
    left_out = len(loaded.prompts) - len(prompts)
    if not left_out:
        return loaded
    if not prompts:
        raise rule_broken(
            "refinement.max_context_tokens",
            config.refinement.max_context_tokens,
            f"no prompts left: all {left_out} need more as the teacher is to see them",
            "raise it, or set refinement.on_overflow=shorten",
        )
    return LoadedPrompts(prompts, {**loaded.skipped, "context_overflow": left_out})


def _fitting_context(prompt: Prompt, config: Config, tokenizer: Any) -> FittedContext | None:
    """What the teacher can be shown of a prompt, None: nothing. The student's own always fits."""
    try:
        context = privileged_context(prompt, config, tokenizer)
    except ContextOverflow:
        return None
    limit = config.refinement.max_context_tokens
    if config.algorithm.trajectory == "rollout" and config.algorithm.mode == "opd":
        limit = config.data.max_prompt_tokens  # what the run is planned for
    fits = len(context.token_ids) <= limit or context.token_ids == prompt.token_ids
    return context if fits else None


def _reference(prompt: Prompt) -> str:
    assert prompt.reference_solution is not None  # config_rules.check_consistent and load_prompts
    return prompt.reference_solution


def renderer(
    template: str, system: str | None, chat_template_kwargs: dict[str, Any], tokenizer: Any
) -> Render:
    """What fills a template and puts it through the teacher's chat template."""

    def render(texts: Texts) -> TokenIds:
        messages = conversation(system, fill_template(template, **texts))
        return _rendered(messages, chat_template_kwargs, tokenizer)

    return render


def _rendered(
    messages: Sequence[Message], chat_template_kwargs: dict[str, Any], tokenizer: Any
) -> TokenIds:
    try:
        return render_chat(messages, tokenizer, chat_template_kwargs)
    except TemplateError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the teacher's "
            f"messages: {error}. Fix: a teacher whose template takes what the data have."
        ) from error


# --- acceptance ---


def read_rollout(
    prompt: Prompt, sample_index: int, completion: Completion, tokenizer: Any, verify: Verifier
) -> Rollout:
    """y_o with its text and the verifier's verdict."""
    text = completion_text(completion, tokenizer)
    said = text_to_judge(text, prompt.token_ids, completion, tokenizer)
    return Rollout(prompt, sample_index, completion, text, _verdict(said, prompt, verify))


def judge(
    prompts: Sequence[RefinementPrompt],
    completions: Sequence[Completion],
    config: Config,
    tokenizer: Any,
    verify: Verifier,
) -> list[Refinement]:
    """Decide which rewrites can be trained on: those that ended by themselves and say something.

    Being right is no condition: the verdict is recorded. What happens to a rejected one is
    `refinement.on_failure`'s matter, in `batching.pair`.

    Args:
        completions: of those prompts that have token ids, in their order.
    """
    asked = [prompt for prompt in prompts if prompt.token_ids is not None]
    assert len(asked) == len(completions), (len(asked), len(completions))
    remaining = iter(completions)
    pairs = [(p, None if p.token_ids is None else next(remaining)) for p in prompts]
    return judge_all(lambda pair: _judge_one(*pair, tokenizer, verify), pairs)


def _judge_one(
    request: RefinementPrompt, completion: Completion | None, tokenizer: Any, verify: Verifier
) -> Refinement:
    if completion is None or request.token_ids is None:
        return Refinement(request, None, "", None, request.rejection)
    text = completion_text(completion, tokenizer)
    rejection: Rejection | None = None
    if completion.finish_reason == "abort":
        rejection = "aborted"
    elif completion.finish_reason == "length":
        rejection = "truncated"
    elif not completion.token_ids or not text.strip():
        rejection = "empty"
    said = text_to_judge(text, request.token_ids, completion, tokenizer)
    verdict = _verdict(said, request.rollout.prompt, verify) if rejection is None else None
    return Refinement(request, completion, text, verdict, rejection)


def _verdict(text: str, prompt: Prompt, verify: Verifier) -> bool | None:
    return None if prompt.answer is None else verify(text, prompt.answer)


def refinement_counts(
    refinements: Sequence[Refinement], trajectories: Sequence[Trajectory]
) -> dict[str, int]:
    """What became of the rollouts of a step; every key is always there, so that ranks can add.

    `rollouts` = `accepted` + all `rejected_*`; `accepted` = the four `*_to_*` + `undecided`.
    `shortened_*` are rollouts for which the teacher saw a text cut, where it rewrote them or
    where it judged their trajectory.
    """
    judged = {(t.prompt_index, t.sample_index): t.shortened for t in trajectories}
    changes = [f"{a}_to_{b}" for a in ("wrong", "right") for b in ("wrong", "right")]
    counts = dict.fromkeys(
        [
            *("rollouts", "accepted", *(f"rejected_{reason}" for reason in get_args(Rejection))),
            *(*changes, "undecided", "shortened_rollout", "shortened_reference_solution"),
        ],
        0,
    )
    says = {True: "right", False: "wrong"}
    for refinement in refinements:
        counts["rollouts"] += 1
        rollout = refinement.request.rollout
        shown = judged.get((rollout.prompt.index, rollout.sample_index), ())
        for name in {*refinement.request.shortened, *shown}:
            counts[f"shortened_{name}"] += 1
        if refinement.rejection is not None:
            counts[f"rejected_{refinement.rejection}"] += 1
            continue
        counts["accepted"] += 1
        before, after = rollout.correct, refinement.correct
        if before is None or after is None:
            counts["undecided"] += 1
        else:
            counts[f"{says[before]}_to_{says[after]}"] += 1
    return counts
