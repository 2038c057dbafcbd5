"""Prompt datasets: reading, checking and ordering the problems that a run trains on.

Imports neither torch nor transformers; `tokenizer` is always a Hugging Face tokenizer.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from jinja2 import TemplateError

from nemo_trd.config import ConfigError, Dataset, PromptRules, VerifierName, rule_broken
from nemo_trd.rows import read_rows
from nemo_trd.templates import PLACEHOLDER, fill_template
from nemo_trd.types import Prompt, TokenIds
from nemo_trd.verifiers.code_tests import read_tests

log = logging.getLogger(__name__)

Message = dict[str, Any]  # {"role": ..., "content": ...}
ROLES = ("system", "user", "assistant")
RESERVED_TEMPLATE_KWARGS = {"tokenize", "add_generation_prompt", "conversation", "chat_template"}


@dataclass(frozen=True)
class LoadedPrompts:
    """What a dataset has to train on, and what was left out of it and why."""

    prompts: list[Prompt]
    skipped: dict[str, int]  # reason -> rows; the only reason is "too_long"


def load_prompts(dataset: Dataset, field: str, rules: PromptRules, tokenizer: Any) -> LoadedPrompts:
    """Read and check every row of a dataset and put it through the student's chat template.

    Args:
        field: where `dataset` stands in the configuration, as in "data.train". `rules` stand in
            the section around it, or with a benchmark's dataset.

    Prompts of more than `max_prompt_tokens` tokens are left out, counted, and reported with one
    warning.

    Raises:
        ConfigError: a row that breaks a rule (file and line), a dataset or column that does not
            exist, a tokenizer without a chat template, or nothing left to train on.
    """
    section = field if dataset is rules else field.rpartition(".")[0]
    check_chat_template(tokenizer, rules.chat_template_kwargs, section)
    _check_answer_pattern(dataset, field)
    prompts: list[Prompt] = []
    skipped: Counter[str] = Counter()
    for index, (where, row) in enumerate(islice(read_rows(dataset, field), dataset.limit)):
        prompt = _prompt(index, where, row, dataset, field, rules, tokenizer)
        if len(prompt.token_ids) > rules.max_prompt_tokens:
            skipped["too_long"] += 1
        else:
            prompts.append(prompt)
    if not prompts:
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"no prompts left: {skipped['too_long']} rows read, {skipped['too_long']} of them "
            f"longer than {section}.max_prompt_tokens = {rules.max_prompt_tokens}",
            f"raise {section}.max_prompt_tokens" if skipped else "give a dataset with rows",
        )
    if skipped:
        log.warning(
            "%s: left out %d of %d prompts, longer than %s.max_prompt_tokens = %d",
            field,
            skipped["too_long"],
            skipped["too_long"] + len(prompts),
            section,
            rules.max_prompt_tokens,
        )
    return LoadedPrompts(prompts, dict(skipped))


def prompts_of_step(
    prompts: Sequence[Prompt], step: int, prompts_per_step: int, seed: int
) -> list[Prompt]:
    """The prompts of one step: a function of its arguments, so resuming needs only `step`.

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
    """A shuffle of range(count) that starts with nothing that its first step already has."""
    if count < per_step:
        return _shuffled(count, seed, epoch)
    first = epoch  # the last epoch that starts with a step depends on none before it
    while first * count % per_step:
        first -= 1
    order = _shuffled(count, seed, first)
    for later in range(first + 1, epoch + 1):
        taken = later * count % per_step  # of the step on the border, by the epoch before
        before = set(order[count - taken :]) if taken else set()
        shuffled = _shuffled(count, seed, later)
        head = [i for i in shuffled if i not in before][: (per_step - taken) % per_step]
        chosen = set(head)
        order = (*head, *(i for i in shuffled if i not in chosen))
    return order


def _shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"prompt order {seed} {epoch}").shuffle(order)
    return tuple(order)


# --- chat templates ---


def check_chat_template(
    tokenizer: Any, chat_template_kwargs: dict[str, Any], section: str = "data"
) -> None:
    """Raises ConfigError when the tokenizer has no chat template or an argument is ours."""
    if not getattr(tokenizer, "chat_template", None):
        raise rule_broken(
            "tokenizer",
            getattr(tokenizer, "name_or_path", ""),
            "it has no chat template, which turns a problem into a prompt",
            "use the directory of an instruct model, or put a chat_template.jinja into this one",
        )
    reserved = RESERVED_TEMPLATE_KWARGS & set(chat_template_kwargs)
    if reserved:
        raise rule_broken(
            f"{section}.chat_template_kwargs",
            sorted(reserved),
            "these arguments are set by the program",
            "remove them",
        )


def render_chat(
    messages: Sequence[Message], tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> TokenIds:
    """The conversation as token ids, ending where the assistant's turn begins.

    Raises:
        jinja2.TemplateError: the template does not take such a conversation.
    """
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    # The template has written the special tokens; the tokenizer must not add a second BOS.
    # `verbose` off: the caller checks lengths and reports them with numbers.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def conversation(system: str | None, user: str) -> list[Message]:
    """A user's turn, after a system prompt where there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": user}]


def _transcript(messages: list[Message]) -> str:
    """What a refinement template shows as the problem: all that the student was told."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


# --- one row ---


def _check_answer_pattern(dataset: Dataset, field: str) -> None:
    if dataset.answer_pattern is None:
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


def _prompt(
    index: int,
    where: str,
    row: dict[str, Any],
    dataset: Dataset,
    field: str,
    rules: PromptRules,
    tokenizer: Any,
) -> Prompt:
    columns = dataset.columns
    reader = _RowReader(where, row, field)
    if columns.messages is not None:
        messages = reader.messages(columns.messages)
        problem = _transcript(messages)
        if messages[0]["role"] != "system" and rules.system_prompt:
            messages = [{"role": "system", "content": rules.system_prompt}, *messages]
    else:
        assert columns.problem is not None  # config_rules.check_consistent
        problem = reader.text("problem", columns.problem)
        if dataset.template is not None:
            problem = reader.filled(dataset.template, problem)
        messages = conversation(rules.system_prompt, problem)
    reference = None
    if columns.reference_solution is not None:
        reference = reader.text("reference_solution", columns.reference_solution)
    answer = _answer(reader, dataset, reference, rules.verifier)
    try:
        token_ids = render_chat(messages, tokenizer, rules.chat_template_kwargs)
    except TemplateError as error:
        raise ConfigError(
            f"{where}: the chat template of {tokenizer.name_or_path!r} refuses this "
            f"conversation: {error}. Fix: correct the row, or system_prompt=null for "
            "a template without system messages."
        ) from error
    return Prompt(index, problem, token_ids, reference, answer)


def _answer(
    reader: _RowReader, dataset: Dataset, reference: str | None, verifier: VerifierName
) -> str | None:
    """The final answer of a row; of verifier code its tests, which must be readable."""
    column = dataset.columns.answer
    if verifier == "code":
        assert column is not None  # config_rules.check_dataset
        return reader.tests(column)
    assert not isinstance(column, list)  # config_rules.check_dataset
    answer = reader.number_or_text("answer", column) if column else None
    if dataset.answer_pattern is not None:
        searched = answer if answer is not None else reference
        assert searched is not None  # config_rules.check_dataset
        answer = reader.search(dataset.answer_pattern, searched)
    return answer


@dataclass(frozen=True)
class _RowReader:
    """Takes values out of one row. Every method raises ConfigError that names the place."""

    where: str
    row: dict[str, Any]
    field: str  # of the dataset, as in "data.train"

    def value(self, key: str, column: str) -> Any:
        if column not in self.row:
            raise ConfigError(
                f"{self.where}: no column {column!r}, which {self.field}.columns.{key} names. "
                f"Fix: name one of {', '.join(map(repr, self.row))}, or correct the row."
            )
        return self.row[column]

    def text(self, key: str, column: str) -> str:
        value = self.value(key, column)
        if not isinstance(value, str) or not value.strip():
            raise self.broken(column, value, "it must be a text that is not empty")
        return value

    def number_or_text(self, key: str, column: str) -> str:
        value = self.value(key, column)
        if isinstance(value, str) and value.strip():
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self.broken(column, value, "it must be a number or a text that is not empty")
        return str(value)

    def filled(self, template: str, problem: str) -> str:
        """The template with the problem and whatever other columns it names."""
        names = set(PLACEHOLDER.findall(template)) - {"problem"}
        values = {name: self.value("problem", name) for name in names}
        for name, value in values.items():
            lines = value if isinstance(value, list) else [value]
            if not all(isinstance(line, str) for line in lines):
                rule = f"{self.field}.template puts it in: it must be a text, or a list of lines"
                raise self.broken(name, value, rule)
            values[name] = "\n".join(lines)
        return fill_template(template, problem=problem, **values)

    def tests(self, column: str | list[str]) -> str:
        """The tests of a program as JSON; several columns, without their nulls, form an object."""
        if isinstance(column, list):
            values = {name: self.value("answer", name) for name in column}
            held: Any = {name: value for name, value in values.items() if value is not None}
        else:
            held = self.value("answer", column)
        text = held if isinstance(held, str) else json.dumps(held)
        try:
            read_tests(text)
        except ValueError as error:
            raise self.broken(str(column), held, str(error)) from None
        return text

    def search(self, pattern: str, text: str) -> str:
        matches = list(re.finditer(pattern, text))
        answer = matches[-1][1] if matches else None
        if answer is None or not answer.strip():
            raise ConfigError(
                f"{self.where}: {self.field}.answer_pattern = {pattern!r} finds no answer in "
                f"{_shown(text)}. Fix: correct the pattern, or the row."
            )
        return answer.strip()

    def messages(self, column: str) -> list[Message]:
        value = self.value("messages", column)
        if not isinstance(value, list) or not value:
            raise self.broken(column, value, "it must be a list of messages that is not empty")
        messages = []
        for position, message in enumerate(value):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                rule = f"message {position} must be an object whose role is one of {ROLES}"
                raise self.broken(column, value, rule)
            if message["role"] == "system" and position > 0:
                raise self.broken(column, value, "only the first message may be from the system")
            content = message.get("content")
            if not isinstance(content, str) or not content.strip():
                rule = f"the content of message {position} must be a text that is not empty"
                raise self.broken(column, value, rule)
            # Parquet gives every message every key; a null stands for a key that is not there.
            messages.append({key: item for key, item in message.items() if item is not None})
        if messages[-1]["role"] != "user":
            raise self.broken(column, value, "the last message must be from the user")
        return messages

    def broken(self, column: str, value: object, rule: str) -> ConfigError:
        return ConfigError(
            f"{self.where}, column {column!r} = {_shown(value)}: {rule}. "
            "Fix: correct the row, or leave it out."
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
