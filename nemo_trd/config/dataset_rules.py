"""Rules for the columns of a data set."""

from __future__ import annotations

import re

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Dataset, VerifierName


def has_reference(dataset: Dataset) -> bool:
    in_messages = dataset.last_assistant_turn == "reference_solution"
    return in_messages or dataset.columns.reference_solution is not None


def check_dataset(field: str, dataset: Dataset, verifier: VerifierName) -> None:
    """Raises ConfigError: columns that contradict each other, or give the verifier nothing."""
    columns = dataset.columns
    if (columns.problem is None) == (columns.messages is None):
        raise rule_broken(
            f"{field}.columns.problem",
            columns.problem,
            "exactly one of columns.problem and columns.messages is set",
            "set the other one to null",
        )
    if dataset.last_assistant_turn == "reference_solution" and (
        columns.messages is None or columns.reference_solution is not None
    ):
        raise rule_broken(
            f"{field}.last_assistant_turn",
            dataset.last_assistant_turn,
            "it takes the solution out of columns.messages, and is its only source",
            "set last_assistant_turn=refuse, or columns.messages and "
            "columns.reference_solution=null",
        )
    if columns.messages is not None and dataset.template is not None:
        raise rule_broken(
            f"{field}.template",
            dataset.template,
            "it is the user's turn, and columns.messages has that already",
            "set template=null, or name columns.problem instead",
        )
    if dataset.template is not None and "{problem}" not in dataset.template:
        raise rule_broken(
            f"{field}.template", dataset.template, "it lacks {problem}", "put it where it belongs"
        )
    for name in _hidden(dataset, verifier):
        if f"{{{name}}}" in (dataset.template or ""):
            raise rule_broken(
                f"{field}.template",
                dataset.template,
                f"{{{name}}} would show the student what it is to find",
                r"leave it out (\boxed{} is an empty box)",
            )
    if verifier == "code" and dataset.answer_pattern is not None:
        raise rule_broken(
            f"{field}.answer_pattern",
            dataset.answer_pattern,
            "verifier code reads tests from columns.answer, whole",
            "set it to null",
        )
    if isinstance(columns.answer, list) and (verifier != "code" or not columns.answer):
        raise rule_broken(
            f"{field}.columns.answer",
            columns.answer,
            "a list of columns holds the tests of verifier code",
            "name one column",
        )
    if columns.answer is None and dataset.answer_pattern is None:
        if verifier != "none":
            raise rule_broken(
                f"{field}.columns.answer",
                None,
                f"verifier={verifier} compares with an answer",
                "name its column, or set answer_pattern, or verifier=none",
            )
    elif dataset.answer_pattern is not None and not (columns.answer or has_reference(dataset)):
        raise rule_broken(
            f"{field}.answer_pattern",
            dataset.answer_pattern,
            "it is searched in columns.answer, or else in the reference solution",
            "name columns.answer or columns.reference_solution",
        )


def _hidden(dataset: Dataset, verifier: VerifierName) -> list[str]:
    """Columns of the answer and the reference solution that a template could name.

    Tests of a program may be shown.
    """
    columns = dataset.columns
    names = [columns.reference_solution, None if verifier == "code" else columns.answer]
    return [
        name
        for name in names
        if isinstance(name, str) and name != "problem" and re.fullmatch("[a-z_]+", name)
    ]
