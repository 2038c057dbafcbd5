"""Checks the templates of the teacher's contexts before any model is built."""

from __future__ import annotations

import logging
from typing import Any

from nemo_trd.algorithm.refinement import renderer, rewriting_kwargs, scoring_kwargs
from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config
from nemo_trd.data.chat_checks import (
    check_chat_template,
    opening,
    thinking_variables,
    thought,
    unread,
)
from nemo_trd.data.templates import PLACEHOLDER, placeholder_names

log = logging.getLogger(__name__)

TEMPLATE_FIELDS: dict[str, frozenset[str]] = {
    "system": frozenset(),
    "opd": frozenset({"problem", "rollout"}),
    "opsd": frozenset({"problem", "reference_solution", "rollout"}),
    "privileged_prompt": frozenset({"problem", "reference_solution"}),
}


def check_templates(config: Config, teacher_tokenizer: Any) -> None:
    """Refuse templates that cannot be filled or rendered.

    Raises:
        ConfigError: an unknown or a missing placeholder, a chat template that does not take
            these messages, or instructions that alone exceed the context budget.
    """
    templates = config.refinement.templates
    for name, required in TEMPLATE_FIELDS.items():
        template = getattr(templates, name)
        if template is None:
            continue
        field = f"refinement.templates.{name}"
        placeholders = set(PLACEHOLDER.findall(template))
        if placeholders - required:
            raise rule_broken(
                field,
                template,
                f"it has no value for {placeholder_names(placeholders - required)}",
                f"use {placeholder_names(required)}"
                if required
                else "write it without placeholders",
            )
        if required - placeholders:
            raise rule_broken(
                field,
                template,
                f"{placeholder_names(required - placeholders)} must appear in it",
                "put in what is missing",
            )
    _check_chat_templates(config, teacher_tokenizer)
    template = templates.opd if config.algorithm.mode == "opd" else templates.opsd
    nothing = {"problem": "", "rollout": "", "reference_solution": ""}
    kwargs = rewriting_kwargs(config)
    length = len(renderer(template, templates.system, kwargs, teacher_tokenizer)(nothing))
    if length >= config.refinement.max_context_tokens:
        raise rule_broken(
            "refinement.max_context_tokens",
            config.refinement.max_context_tokens,
            f"the instructions of refinement.templates.{config.algorithm.mode} alone take "
            f"{length} tokens",
            "raise it, or shorten the template",
        )


def _check_chat_templates(config: Config, tokenizer: Any) -> None:
    """Check that the teacher's chat template shows its contexts, with and without a rollout."""
    own_kwargs = config.refinement.chat_template_kwargs
    check_chat_template(
        tokenizer,
        rewriting_kwargs(config),
        "data" if own_kwargs is None else "refinement",
        config.refinement.templates.system,
        "refinement.templates.system",
        inherited=own_kwargs is None,
    )
    own_kwargs = config.teacher.chat_template_kwargs
    if own_kwargs is None and not config.shows_prompt_to_teacher:
        return
    check_chat_template(
        tokenizer,
        scoring_kwargs(config),
        "data" if own_kwargs is None else "teacher",
        config.data.system_prompt if config.shows_prompt_to_teacher else None,
        "data.system_prompt",
        inherited=own_kwargs is None,
    )


def check_openings(config: Config, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Warn where a block of thought is open, or was, for only one of student and teacher.

    y_r follows the opening of the teacher's turn, and is trained on after the student's opening.
    Warns of inherited arguments that the teacher's template does not read, too.
    """
    student = opening(student_tokenizer, config.data.chat_template_kwargs)
    contexts: dict[str, tuple[str, dict[str, Any]]] = {}  # section of the settings -> place, kwargs
    if config.algorithm.trajectory == "refinement":
        contexts["refinement"] = "after the refinement prompt", rewriting_kwargs(config)
    if config.shows_prompt_to_teacher:
        contexts["teacher"] = "where it scores", scoring_kwargs(config)
    elif config.teacher.chat_template_kwargs is not None:
        contexts["teacher"] = "where it scores", config.teacher.chat_template_kwargs
    for section, (where, kwargs) in contexts.items():
        if kwargs is config.data.chat_template_kwargs:
            _warn_of_unread(teacher_tokenizer, kwargs, section)
        teacher = opening(teacher_tokenizer, kwargs)
        states = thought(teacher), thought(student)
        # A teacher that is kept from thinking writes like a student that never thinks.
        if states[0] == states[1] or states == ("closed", "none"):
            continue
        switches = [
            f"{section}.chat_template_kwargs.{name}" + ("=false" if states[0] == "open" else "")
            for name in thinking_variables(teacher_tokenizer, kwargs)
        ]
        log.warning(
            "the teacher's chat template opens the assistant's turn %s with %r, the student's "
            "with %r: %s. Fix: %s, or take a teacher with the student's template",
            *(where, teacher, student, _harm(section, *states)),
            " or ".join(switches) or "chat_template_kwargs of data, refinement and teacher",
        )


def _warn_of_unread(tokenizer: Any, kwargs: dict[str, Any], section: str) -> None:
    for name in unread(tokenizer, kwargs):
        log.warning(
            "the teacher's chat template never reads data.chat_template_kwargs.%s; "
            "%s.chat_template_kwargs={} leaves it out there",
            *(name, section),
        )


def _harm(section: str, teacher: str, student: str) -> str:
    """Consequence of blocks of thought in these states; see `chat_checks.thought`."""
    if section == "teacher":
        return "it then scores after another opening than the student answers to"
    if teacher == "open":
        return (
            "a rewrite is then `thought </think> answer`, all of which the student learns as "
            "its answer"
        )
    if student == "open":
        return "a rewrite has no thought, and the student learns to answer inside of its own"
    return "the rewrite may hold thoughts, and the student learns them where it has none"
