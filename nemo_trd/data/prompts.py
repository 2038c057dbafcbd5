"""Reads, checks and orders the problems that a run trains on or is evaluated on.

Imports neither torch nor transformers; `tokenizer` is always a Hugging Face tokenizer.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from jinja2 import TemplateError

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Dataset, Generation, PromptRules, VerifierName
from nemo_trd.data.chat import conversation, render_chat, transcript
from nemo_trd.data.chat_checks import check_chat_template, left_out
from nemo_trd.data.control_tokens import Message
from nemo_trd.data.files import read_rows
from nemo_trd.data.row import BOXED, BadRow, RowReader, shown
from nemo_trd.data.stored import read_pair
from nemo_trd.data.turns import ends_with_user, read_messages
from nemo_trd.data.types import Prompt
from nemo_trd.verifiers.judgement import Answer, AnswerList

log = logging.getLogger(__name__)

SHOWN_BAD_ROWS = 3


@dataclass(frozen=True)
class LoadedPrompts:
    """Usable prompts of a dataset, and counts of the rows left out by reason."""

    prompts: list[Prompt]
    skipped: dict[str, int]  # reason ("too_long", or that of a BadRow) -> rows


def load_prompts(
    dataset: Dataset,
    field: str,
    rules: PromptRules,
    tokenizer: Any,
    needs_reference: bool = False,
    stored_for: Generation | None = None,
) -> LoadedPrompts:
    """Read and check every row of a dataset and put it through the student's chat template.

    Prompts of more than `max_prompt_tokens` tokens are left out, counted, and reported with one
    warning; so are, with `on_bad_row: skip`, rows that break a rule.

    Args:
        field: where `dataset` stands in the configuration, as in "data.train". `rules` stand in
            the section around it, or with a benchmark's dataset.
        needs_reference: whether somebody reads the reference solutions. A row without one is good
            otherwise, as is one without an answer where there is no verifier.
        stored_for: settings whose `stored` names columns with a pair of each row; None: no pairs.

    Raises:
        ConfigError: a bad row (file and line) or too many of them, a dataset or column that does
            not exist, a tokenizer without a chat template, or nothing left to train on.
    """
    section = field if dataset is rules else field.rpartition(".")[0]
    check_chat_template(
        tokenizer,
        rules.chat_template_kwargs,
        section,
        rules.system_prompt,
        f"{section}.system_prompt",
    )
    _check_answer_pattern(dataset, field)
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    too_long = 0
    for index, (where, row) in enumerate(islice(read_rows(dataset, field), dataset.limit)):
        try:
            reader = _reader(where, row, field)
            prompt = _prompt(index, reader, dataset, rules, tokenizer, needs_reference)
            if stored_for is not None and stored_for.stored is not None:
                pair = read_pair(reader, stored_for, stored_for.stored, tokenizer)
                prompt = replace(prompt, stored=pair)
        except BadRow as error:
            if rules.on_bad_row == "error":
                raise
            bad.append(error)
            continue
        if len(prompt.token_ids) > rules.max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(prompt)
    count = len(prompts) + len(bad) + too_long
    _report_bad_rows(bad, count, dataset, field, section, rules)
    if not prompts:
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"no prompts left: {count} rows read, {too_long} of them longer than "
            f"{section}.max_prompt_tokens = {rules.max_prompt_tokens}, {len(bad)} of them bad",
            f"raise {section}.max_prompt_tokens" if too_long else "give a dataset with rows",
        )
    if too_long:
        log.warning(
            "%s: left out %d of %d prompts, longer than %s.max_prompt_tokens = %d",
            field,
            too_long,
            too_long + len(prompts),
            section,
            rules.max_prompt_tokens,
        )
    skipped = {"too_long": too_long} if too_long else {}
    return LoadedPrompts(prompts, {**skipped, **_reasons(bad)})


def _reasons(bad: Sequence[BadRow]) -> dict[str, int]:
    return dict(Counter(error.reason for error in bad).most_common())


def _report_bad_rows(
    bad: Sequence[BadRow],
    rows: int,
    dataset: Dataset,
    field: str,
    section: str,
    rules: PromptRules,
) -> None:
    """Log one warning with counts by reason and the first rows.

    Raises:
        ConfigError: with the same text, where too many rows are bad.
    """
    if not bad:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in _reasons(bad).items())
    first = "; ".join(error.problem for error in bad[:SHOWN_BAD_ROWS])
    if len(bad) > rules.max_bad_share * rows:
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"{len(bad)} of {rows} rows ({len(bad) / rows:.1%}) cannot be used, which is more than "
            f"{section}.max_bad_share = {rules.max_bad_share:g}: {reasons}. The first: {first}",
            f"{bad[0].fix}; or raise {section}.max_bad_share",
        )
    log.warning(
        "%s: left out %d of %d rows (%.1f%%) that cannot be used: %s. The first: %s",
        field,
        len(bad),
        rows,
        100 * len(bad) / rows,
        reasons,
        first,
    )


def prompts_of_step(
    prompts: Sequence[Prompt], step: int, prompts_per_step: int, seed: int
) -> list[Prompt]:
    """Prompts of one step: a function of its arguments, so resuming needs only `step`.

    Steps walk through the prompts in a new order in each epoch, every prompt once an epoch. A
    step may cross the border of two epochs and still holds no prompt twice, unless there are
    fewer prompts than `prompts_per_step`: then it holds each of them about equally often.
    """
    count = len(prompts)
    positions = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    return [
        prompts[_epoch_order(count, prompts_per_step, seed, position // count)[position % count]]
        for position in positions
    ]


@lru_cache(maxsize=8)
def _epoch_order(count: int, per_step: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Shuffle of range(count); its head repeats nothing of the step that crosses into the epoch."""
    if count < per_step:
        return _shuffled(count, seed, epoch)
    first = epoch  # the last epoch that starts with a step depends on none before it
    while first * count % per_step:
        first -= 1
    order = _shuffled(count, seed, first)
    for later in range(first + 1, epoch + 1):
        carried = (
            later * count % per_step
        )  # prompts of the step on the border that the epoch before has
        before = set(order[count - carried :]) if carried else set()
        shuffled = _shuffled(count, seed, later)
        head = [i for i in shuffled if i not in before][: (per_step - carried) % per_step]
        head_set = set(head)
        order = (*head, *(i for i in shuffled if i not in head_set))
    return order


def _shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"prompt order {seed} {epoch}").shuffle(order)
    return tuple(order)


# --- one row ---


def _check_answer_pattern(dataset: Dataset, field: str) -> None:
    if dataset.answer_pattern in (None, BOXED):
        return
    try:
        groups = re.compile(dataset.answer_pattern).groups
    except re.error as error:
        raise rule_broken(
            f"{field}.answer_pattern",
            dataset.answer_pattern,
            f"it is not a regular expression ({error})",
            "correct it",
        ) from error
    if groups < 1:
        raise rule_broken(
            f"{field}.answer_pattern",
            dataset.answer_pattern,
            "group 1 of its last match is the answer, and it has no group",
            "put parentheses around the answer",
        )


def _reader(where: str, row: dict[str, Any] | BadRow, field: str) -> RowReader:
    if isinstance(row, BadRow):
        raise row
    return RowReader(where, row, field)


def _prompt(
    index: int,
    reader: RowReader,
    dataset: Dataset,
    rules: PromptRules,
    tokenizer: Any,
    needs_reference: bool,
) -> Prompt:
    """Build the prompt of one row.

    Raises:
        BadRow: the row breaks a rule.
    """
    try:
        messages, last_turn = _messages(reader, dataset)
        problem = transcript(messages)
        if messages[0]["role"] != "system" and rules.system_prompt:
            messages = [{"role": "system", "content": rules.system_prompt}, *messages]
        searched = dataset.answer_pattern is not None and dataset.columns.answer is None
        reference_needed = needs_reference or (searched and rules.verifier != "none")
        reference = _reference(reader, dataset, last_turn, reference_needed)
        answer = _answer(reader, dataset, reference, rules.verifier)
        token_ids = render_chat(messages, tokenizer, rules.chat_template_kwargs)
        hidden = left_out(messages, tokenizer, rules.chat_template_kwargs) if messages[1:] else []
    except TemplateError as error:
        raise BadRow(
            "chat_template",
            f"{reader.where}: the chat template of {tokenizer.name_or_path!r} refuses this "
            f"conversation: {error}",
            "correct the row, or leave it out",
        ) from error
    except RecursionError:
        raise BadRow(
            "nested_too_deep", f"{reader.where}: a value is nested too deeply", "correct the row"
        ) from None
    if hidden:
        message = messages[hidden[0]]
        raise BadRow(
            "chat_template",
            f"{reader.where}: the chat template of {tokenizer.name_or_path!r} leaves out the "
            f"message of the {message['role']} = {shown(message['content'])}",
            "correct the row, or leave it out, or take a model whose template shows it",
        )
    return Prompt(index, problem, token_ids, reference, answer, tuple(messages))


def _messages(reader: RowReader, dataset: Dataset) -> tuple[list[Message], str | None]:
    """Messages of a row for the student, and the solution that was its last turn, if any."""
    columns, solution = dataset.columns, None
    if columns.messages is not None:
        messages = read_messages(reader, columns.messages)
        takes_last = dataset.last_assistant_turn == "reference_solution"
        if takes_last and messages[-1]["role"] == "assistant":
            solution = messages.pop()["content"]
        setting = f"{reader.field}.last_assistant_turn"
        ends_with_user(reader, columns.messages, messages, setting)
    else:
        assert columns.problem is not None  # config.dataset_rules.check_dataset
        problem = reader.text("problem", columns.problem)
        if dataset.template is not None:
            problem = reader.filled(dataset.template, problem)
        messages = conversation(None, problem)
    if columns.system is not None and messages[0]["role"] != "system":
        system = reader.system(columns.system)
        messages = [*conversation(system, "")[:-1], *messages]
    return messages, solution


def _reference(
    reader: RowReader, dataset: Dataset, last_turn: str | None, needed: bool
) -> str | None:
    """y* of a row. Where nobody needs it, a missing or broken one is None."""
    column = dataset.columns.reference_solution
    if last_turn is not None or (column is None and not needed):
        return last_turn
    if column is None:
        raise BadRow(
            "missing_reference_solution",
            f"{reader.where}: the conversation does not end with a turn of the assistant",
            "correct the row, or leave it out",
        )
    try:
        return reader.reference(column)
    except BadRow:
        if needed:
            raise
        return None


def _answer(
    reader: RowReader, dataset: Dataset, reference: str | None, verifier: VerifierName
) -> Answer | None:
    """Expected answer for the verifier; for verifier code the tests, which must be readable.

    Without a verifier a missing or broken one is None.
    """
    column, pattern = dataset.columns.answer, dataset.answer_pattern
    if verifier == "code":
        assert column is not None  # config.dataset_rules.check_dataset
        return reader.tests(column)
    assert not isinstance(column, list)  # config.dataset_rules.check_dataset
    try:
        if column is not None:
            texts = reader.answers(column)
        else:
            texts = [reference] if reference is not None and pattern is not None else []
        if pattern is not None:
            texts = [reader.search(pattern, text) for text in texts]
    except BadRow:
        if verifier != "none":
            raise
        return None
    different = tuple(dict.fromkeys(texts))
    if len(different) > 1:
        return AnswerList(different, dataset.answer_list)
    return different[0] if different else None
