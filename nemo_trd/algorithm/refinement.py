"""Builds the teacher's contexts: refinement prompts, and contexts without a rollout.

Pure functions of records and a tokenizer. Source: the refinement step of arXiv 2606.08432; the
wording of the prompts is ours and stands in `conf/refinement/`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from nemo_trd.algorithm.context_budget import Render, Texts, fit
from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Config
from nemo_trd.data.chat import conversation, render_chat
from nemo_trd.data.control_tokens import Message
from nemo_trd.data.prompts import LoadedPrompts
from nemo_trd.data.templates import fill_template
from nemo_trd.data.types import (
    FittedContext,
    Prompt,
    RefinementPrompt,
    Rollout,
    TokenIds,
)

log = logging.getLogger(__name__)


class ContextOverflow(ValueError):
    """Teacher context that does not fit `refinement.max_context_tokens`, however shortened."""


# --- contexts of the teacher ---


def rewriting_kwargs(config: Config) -> dict[str, Any]:
    """Arguments of the chat template for refinement prompts."""
    kwargs = config.refinement.chat_template_kwargs
    return config.data.chat_template_kwargs if kwargs is None else kwargs


def scoring_kwargs(config: Config) -> dict[str, Any]:
    """Arguments of the teacher's chat template for a context without a rollout."""
    kwargs = config.teacher.chat_template_kwargs
    return config.data.chat_template_kwargs if kwargs is None else kwargs


def refinement_prompts(
    rollouts: Sequence[Rollout], config: Config, teacher_tokenizer: Any
) -> list[RefinementPrompt]:
    """Build c_T of every rollout; see `refinement_prompt`."""
    return [refinement_prompt(rollout, config, teacher_tokenizer) for rollout in rollouts]


def refinement_prompt(rollout: Rollout, config: Config, tokenizer: Any) -> RefinementPrompt:
    """Build c_T of a rollout, (x, y_o) or in OPSD (x, y*, y_o), or the reason for none.

    `refinement.subset` wrong and right take the rollouts with that verdict; one without a verdict
    is in neither. With `algorithm.trajectory=rollout` none is in the subset.
    """
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
    scoring = config.teacher.chat_template_kwargs
    if scoring in (None, rewriting_kwargs(config)):
        token_ids, shortened = fit(texts, render, config.refinement, tokenizer)
        if token_ids is None:
            return RefinementPrompt(rollout, None, "context_overflow")
        return RefinementPrompt(rollout, token_ids, shortened=shortened)
    pairs: dict[TokenIds, tuple[TokenIds, TokenIds]] = {}
    render_scoring = renderer(template, templates.system, scoring, tokenizer)

    def longer(texts: Texts) -> TokenIds:
        """Longer one of the rewriting and the scoring context: both have to fit."""
        pair = render(texts), render_scoring(texts)
        pairs[max(pair, key=len)] = pair
        return max(pair, key=len)

    fitting, shortened = fit(texts, longer, config.refinement, tokenizer)
    if fitting is None:
        return RefinementPrompt(rollout, None, "context_overflow")
    rewriting_ids, scoring_ids = pairs[fitting]
    return RefinementPrompt(rollout, rewriting_ids, None, shortened, scoring_ids)


def _in_subset(rollout: Rollout, config: Config) -> bool:
    if config.algorithm.trajectory == "rollout":
        return False
    verdicts = {"all": (True, False, None), "wrong": (False,), "right": (True,)}
    return rollout.correct in verdicts[config.refinement.subset]


def privileged_context(prompt: Prompt, config: Config, tokenizer: Any) -> FittedContext:
    """Build the teacher's context without a rollout (`teacher_context=prompt`): x, in OPSD (x, y*).

    In OPD these are the student's messages in the teacher's own chat template. In OPSD it has the
    student's system prompt, not that of the rewriting instructions, and y* is shortened as in a
    refinement prompt.

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
    dropped = len(loaded.prompts) - len(prompts)
    if not dropped:
        return loaded
    if not prompts:
        raise rule_broken(
            "refinement.max_context_tokens",
            config.refinement.max_context_tokens,
            f"no prompts left: all {dropped} need more as the teacher is to see them",
            "raise it, or set refinement.on_overflow=shorten",
        )
    return LoadedPrompts(prompts, {**loaded.skipped, "context_overflow": dropped})


def _fitting_context(prompt: Prompt, config: Config, tokenizer: Any) -> FittedContext | None:
    """Teacher context of a prompt; None where it does not fit. The student's own always fits."""
    try:
        context = privileged_context(prompt, config, tokenizer)
    except ContextOverflow:
        return None
    limit = config.refinement.max_context_tokens
    if config.algorithm.trajectory == "rollout" and config.algorithm.mode == "opd":
        limit = config.data.max_prompt_tokens  # length that the run is planned for
    fits = len(context.token_ids) <= limit or context.token_ids == prompt.token_ids
    return context if fits else None


def _reference(prompt: Prompt) -> str:
    assert prompt.reference_solution is not None  # config.rules and load_prompts
    return prompt.reference_solution


def renderer(
    template: str, system: str | None, chat_template_kwargs: dict[str, Any], tokenizer: Any
) -> Render:
    """Function that fills a template and renders it with the teacher's chat template."""

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
