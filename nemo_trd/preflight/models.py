"""Rules on the two models before either is built: files, layouts, lengths, tokenizers.

Rules between settings alone are in `config.rules`, rules on the data in `data.prompts`. Nothing
is written and nothing that exists is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.lengths import longest_answer, longest_contexts
from nemo_trd.config.schema import Config, Layout, ModelSource
from nemo_trd.models.family import shared_vocab_size
from nemo_trd.models.peft import check_beginning
from nemo_trd.models.read import Model, read_directory, read_tokenizer
from nemo_trd.models.rules import (
    adapts_experts,
    check_expert_adapter,
    check_fp8,
    check_layout,
    check_load_balancing,
    check_no_experts_in_fp8,
)
from nemo_trd.models.served import check_served_weights, is_only_served, read_served
from nemo_trd.preflight.batch import batch_problems
from nemo_trd.preflight.machine import machine_problems
from nemo_trd.preflight.server_lengths import server_length_problems

STUDENT, TEACHER = "model.student.path", "model.teacher.path"


def check(config: Config, world_size: int) -> tuple[Model, Model]:
    """Refuse a run that cannot work on `world_size` ranks. Returns student and teacher.

    Raises:
        ConfigError: every broken rule, one a line: field, value, rule, fix.
    """
    problems = [*machine_problems(config), *batch_problems(config, world_size)]
    return _check(config, problems, served=is_only_served(config))


def check_models(config: Config) -> tuple[Model, Model]:
    """Read and check student and teacher for one process that only computes with them.

    Raises:
        ConfigError: as `check`, without the rules on machine and batch.
    """
    return _check(config, [], served=False)


def _check(config: Config, problems: list[ConfigError], served: bool) -> tuple[Model, Model]:
    """`served`: the teacher's servers hold it, and nobody here."""
    student = read_directory(config.model.student, STUDENT, problems)
    teacher = student
    if config.model.teacher is not None:
        read = partial(_read_served, config) if served else read_directory
        teacher = read(config.model.teacher, TEACHER, problems)
    if student is not None:
        problems += _tokenizer_problems(student)
        if config.student.adapter is not None:
            problems += check_beginning(student.hf, config.student.adapter)
    if student is not None and teacher is not None and teacher is not student:
        problems += _tokenizer_problems(teacher)
        problems += _different_tokenizers(student, teacher)
    problems += model_problems(config, student, teacher)
    if problems:
        raise ConfigError("\n".join(str(problem) for problem in problems))
    assert student is not None and teacher is not None
    return student, teacher


def model_problems(
    config: Config, student: Model | None, teacher: Model | None
) -> Iterator[ConfigError]:
    """Yield the broken rules that config.json of both models tells: layouts, lengths, the loss.

    Without tokenizers `loss.top_k` is held against all shared columns.

    A model that could not be read is None; what needs it is left out.
    """
    if student is not None:
        yield from _layout_problems(config, "student", student)
        yield from _training_problems(config, student)
    if teacher is not None and config.teacher.scoring == "megatron":
        yield from _layout_problems(config, "teacher", teacher)
    if student is not None and teacher is not None:
        yield from _length_problems(config, student, teacher)
        yield from _loss_problems(config, student, teacher)


def real_vocab_size(columns: int, tokenizer: Any | None) -> int:
    """Number of the shared columns that the divergence runs over: ids of the student's tokenizer.

    Columns that pad (Qwen's last 267), and those for tokens that only the teacher knows, are left
    out on both sides. That the teacher knows the student's tokens is what `check` demands. A
    model without a tokenizer has all of them.
    """
    return columns if tokenizer is None else min(columns, _largest_id(tokenizer) + 1)


def _largest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _read_served(
    config: Config, source: ModelSource, field: str, problems: list[ConfigError]
) -> Model | None:
    """Read a teacher that only its servers hold: of any architecture, without weights.

    None where something is wrong with it, which is added to `problems`.
    """
    directory = Path(source.path).absolute()
    assert config.generation.vllm is not None  # config.teacher_rules: servers score
    try:
        hf = read_served(source, field, config.generation.vllm.teacher.server)
        check_served_weights(config, directory)
        trusted = source.trust_remote_code
        tokenizer = read_tokenizer(directory, trusted, f"{field} (tokenizer)")
    except ConfigError as error:
        problems.append(error)
        return None
    return Model(field, directory, hf, tokenizer)


def _layout_problems(
    config: Config, role: Literal["student", "teacher"], model: Model
) -> Iterator[ConfigError]:
    """Yield the first size of the model that the layout does not divide, or not as FP8 needs."""
    precision, field = config.precision, f"parallel.{role}"
    layout: Layout = getattr(config.parallel, role)
    try:
        check_layout(model.hf, layout, field)
        fp8 = "fp8" if role == "student" else "teacher_fp8"
        if (value := getattr(precision, fp8)) is not None:
            check_no_experts_in_fp8(model.hf, f"precision.{fp8}", value)
            check_fp8(model.hf, layout, field, precision.fp8_recipe)
    except ConfigError as error:
        yield error


def _training_problems(config: Config, student: Model) -> Iterator[ConfigError]:
    """Yield the rules that `config.student` breaks with this student."""
    try:
        check_load_balancing(student.hf, config.student.moe_aux_loss_coeff)
    except ConfigError as error:
        yield error
    adapter = config.student.adapter
    if adapter is None:
        return
    try:
        check_expert_adapter(student.hf, adapter, config.parallel.student)
    except ConfigError as error:
        yield error
    if config.served_adapter is not None and adapts_experts(student.hf, adapter):
        yield rule_broken(
            "generation.vllm.weight_sync.what",
            "adapter",
            "servers are given adapters on linear layers only, and student.adapter.targets = "
            f"{list(adapter.targets)} has some in experts",
            "set it to merged, or leave gate, up and down out of the targets",
        )


def _tokenizer_problems(model: Model) -> Iterator[ConfigError]:
    """Yield what a tokenizer lacks that prompts, labels and the embedding need."""
    tokenizer, where = model.tokenizer, f"{model.field} (tokenizer)"
    largest = _largest_id(tokenizer)
    if largest >= model.hf.vocab_size:
        yield rule_broken(
            where,
            str(model.directory),
            f"its largest token id is {largest} and the model has {model.hf.vocab_size} columns",
            "give tokenizer and weights of the same model, or resize the embedding",
        )
    if tokenizer.eos_token_id is None:
        yield rule_broken(
            where,
            str(model.directory),
            "it has no EOS token; answers must end with one",
            "set eos_token in tokenizer_config.json",
        )
    if not tokenizer.chat_template:
        yield rule_broken(
            where,
            str(model.directory),
            "it has no chat template; prompts go through it",
            "use an instruct model, or set chat_template in tokenizer_config.json",
        )


def _different_tokenizers(student: Model, teacher: Model) -> Iterator[ConfigError]:
    """Yield a broken rule unless the teacher knows the student's tokens by id, and ends as it does.

    The teacher may know more tokens: it never samples those (`models.vocabulary`).
    """
    from nemo_trd.models.vocabulary import stop_ids

    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    by_id = [{index: token for token, index in vocab.items()} for vocab in (ours, theirs)]
    differing = sorted({index for _, index in ours.items() - theirs.items()})
    if differing:
        examples = "; ".join(
            f"id {index}: {by_id[0].get(index)!r} (student), {by_id[1].get(index)!r} (teacher)"
            for index in differing[:3]
        )
        yield rule_broken(
            TEACHER,
            str(teacher.directory),
            f"the teacher must map the student's tokens to the same ids; {len(differing)} differ: "
            f"{examples}",
            "choose a teacher of the student's family",
        )
        return
    try:
        stops = stop_ids(student.directory, student.hf, student.tokenizer)
        stop_ids(teacher.directory, teacher.hf, teacher.tokenizer)
    except ConfigError as error:
        yield error
        return
    if teacher.tokenizer.eos_token_id not in {None, *stops}:
        yield rule_broken(
            TEACHER,
            str(teacher.directory),
            f"its EOS token is {teacher.tokenizer.eos_token!r}, the student's is "
            f"{student.tokenizer.eos_token!r}: the student would learn to end with a token that "
            "it is not stopped at",
            "set the same eos_token in both tokenizer_config.json files, or add the teacher's to "
            "eos_token_id in the student's generation_config.json",
        )


def _length_problems(config: Config, student: Model, teacher: Model) -> Iterator[ConfigError]:
    """Yield the settings that allow more positions than the models and servers have."""
    answer = longest_answer(config)
    contexts = longest_contexts(config)
    positions = teacher.hf.max_position_embeddings
    yield from server_length_problems(config, contexts[1], answer, positions)
    for role, model, (field, context) in zip(
        ("student", "teacher"), (student, teacher), contexts, strict=True
    ):
        known = model.hf.max_position_embeddings
        if context + answer > known:
            yield rule_broken(
                field,
                context,
                f"with up to {answer} tokens generated after it the {role} sees {context + answer} "
                f"positions, and {model.directory} has max_position_embeddings = {known}",
                "lower it, or max_tokens of generation.rollout and generation.refinement",
            )


def _loss_problems(config: Config, student: Model, teacher: Model) -> Iterator[ConfigError]:
    """Yield a broken rule where top-k asks for more tokens than both models share."""
    top_k = config.loss.top_k
    columns = shared_vocab_size(student.hf, teacher.hf)
    shared = real_vocab_size(columns, student.tokenizer)
    if top_k is not None and top_k > shared:
        yield rule_broken(
            "loss.top_k",
            top_k,
            f"student and teacher share a vocabulary of {shared} tokens",
            "lower it, or set loss.top_k=null for the full vocabulary",
        )
