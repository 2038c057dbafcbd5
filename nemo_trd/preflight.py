"""What can be checked of a run before any model is built: files, layouts, lengths, tokenizers.

Rules between settings alone are in `config.py`, rules about the data in `prompts.py`. Nothing is
written here and nothing that exists is changed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_trd import latest
from nemo_trd.config import Config, ConfigError, Layout, ModelSource, rule_broken
from nemo_trd.hf_directory import check_model_type, check_weights
from nemo_trd.model_rules import check_layout, check_supported
from nemo_trd.sandbox import check_sandbox
from nemo_trd.served_model import check_served_weights, is_only_served, read_served
from nemo_trd.server_lengths import server_length_problems

STUDENT, TEACHER = "model.student.path", "model.teacher.path"


@dataclass(frozen=True)
class Model:
    """What a model directory says about itself."""

    field: str
    directory: Path
    hf: Any  # transformers.PretrainedConfig; of a teacher on servers only, see served_model.py
    tokenizer: Any  # transformers.PreTrainedTokenizerBase


def check(config: Config, world_size: int) -> tuple[Model, Model]:
    """Refuse a run that cannot work on `world_size` ranks. Returns student and teacher.

    Raises:
        ConfigError: every broken rule that was found, one a line: field, value, rule, fix.
    """
    problems = [*_machine_problems(config), *batch_problems(config, world_size)]
    return _check(config, problems, served=is_only_served(config))


def check_models(config: Config) -> tuple[Model, Model]:
    """As `check`, for one process that only computes with both models.

    Raises:
        ConfigError
    """
    return _check(config, [], served=False)


def _check(config: Config, problems: list[ConfigError], served: bool) -> tuple[Model, Model]:
    """`served`: the teacher's servers hold it, and nobody here."""
    student = _load(config.model.student, STUDENT, problems)
    teacher = student
    if config.model.teacher is not None:
        load = partial(_load_served, config) if served else _load
        teacher = load(config.model.teacher, TEACHER, problems)
    if student is not None:
        problems += _tokenizer_problems(student)
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
    """What config.json of the two models tells: layouts, lengths, the loss. Needs no tokenizer.

    A model that could not be read is None; what needs it is left out.
    """
    if student is not None:
        yield from _layout_problems("parallel.student", config.parallel.student, student)
    if teacher is not None and config.teacher.scoring == "megatron":
        yield from _layout_problems("parallel.teacher", config.parallel.teacher, teacher)
    if student is not None and teacher is not None:
        yield from _length_problems(config, student, teacher)
        yield from _loss_problems(config, student, teacher)


def shared_vocab_size(student_hf: Any, teacher_hf: Any) -> int:
    """For how many token ids both models have a column.

    Families pad their output layer differently (Qwen: 151,936 or 152,064 columns for the same
    ids).
    """
    return min(student_hf.vocab_size, teacher_hf.vocab_size)


def real_vocab_size(columns: int, tokenizer: Any | None) -> int:
    """Over how many of the shared columns the divergence runs: ids of the student's tokenizer.

    Columns that pad (Qwen's last 267), and those for tokens that only the teacher knows, are left
    out on both sides. That the teacher knows the student's tokens is what `check` demands. A
    model without a tokenizer has all of them.
    """
    return columns if tokenizer is None else min(columns, _largest_id(tokenizer) + 1)


def _largest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def longest_trajectory(config: Config) -> int:
    """Tokens of the longest sequence, context and labels, that either model can meet."""
    return max(context for _, context in _longest_contexts(config)) + longest_answer(config)


def longest_answer(config: Config) -> int:
    """Tokens of the longest rollout or refinement."""
    longest = config.generation.rollout.max_tokens
    if config.algorithm.trajectory == "refinement":
        longest = max(longest, config.generation.refinement.max_tokens)
    return longest


def _longest_contexts(config: Config) -> list[tuple[str, int]]:
    """(field, tokens) that bound the student's and the teacher's context."""
    prompt = ("data.max_prompt_tokens", config.data.max_prompt_tokens)
    if config.algorithm.trajectory == "rollout" and config.algorithm.mode == "opd":
        return [prompt, prompt]
    return [prompt, ("refinement.max_context_tokens", config.refinement.max_context_tokens)]


def _machine_problems(config: Config) -> Iterator[ConfigError]:
    """The run directory, the devices and the optional packages."""
    run_dir = config.run_dir.absolute()
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield rule_broken(
            "run.dir",
            config.run.dir,
            f"the run writes below it, and {existing} is not a writable directory",
            "choose another directory, or change its permissions",
        )
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not latest.follow(Path(resume)).is_dir():
        yield rule_broken(
            "checkpoint.resume",
            resume,
            "it is auto, never, or the directory of one checkpoint; there is no such directory",
            "name a checkpoint below run.dir of an earlier run, or set auto",
        )
    gpus = gpu_count()
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    if gpus and ranks_here > gpus:
        yield rule_broken(
            "ranks on this machine",
            ranks_here,
            f"each rank has a GPU of its own and {gpus} are visible",
            "start fewer ranks a machine, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
        )
    yield from _transformer_engine_problems(config, gpus)
    if config.data.verifier == "code":
        try:
            check_sandbox("data.verifier", config.sandbox)
        except ConfigError as error:
            yield error
    for field, wanted, package in (
        ("logging.wandb", config.logging.wandb, "wandb"),
        ("logging.mlflow", config.logging.mlflow, "mlflow"),
    ):
        if wanted is not None and not importable(package):
            yield rule_broken(
                field,
                wanted.model_dump(),
                f"the package {package} is not installed",
                f"pip install 'nemo_trd[{package}]', or set {field}=null",
            )


def _transformer_engine_problems(config: Config, gpus: int) -> Iterator[ConfigError]:
    """Without TransformerEngine megatron-core ignores fp8 in silence."""
    wants: dict[str, tuple[object, object]] = {  # field -> value, what switches it off
        "precision.fp8": (config.precision.fp8, "null"),
        "precision.teacher_fp8": (config.precision.teacher_fp8, "null"),
    }
    for role, layout in _layouts(config):
        size = layout.context_parallel_size
        wants[f"parallel.{role}.context_parallel_size"] = (size if size > 1 else None, 1)
    for field, (value, off) in wants.items():
        if value is None:
            continue
        if not gpus:
            yield rule_broken(
                field, value, "it needs a CUDA device and there is none", f"set {field}={off}"
            )
        if not importable("transformer_engine"):
            yield rule_broken(
                field,
                value,
                "it needs TransformerEngine, which is not installed",
                f"run in an image that has it, or set {field}={off}",
            )
        elif field.endswith("context_parallel_size"):
            yield rule_broken(
                field, value, "sequences are not split over ranks", f"set {field}={off}"
            )


def _layouts(config: Config) -> list[tuple[str, Layout]]:
    """Of the models that are held in Megatron."""
    layouts = [("student", config.parallel.student)]
    if config.teacher.scoring == "megatron":
        layouts.append(("teacher", config.parallel.teacher))
    return layouts


def importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def batch_problems(config: Config, world_size: int) -> Iterator[ConfigError]:
    """World size, global batch and micro-batches."""
    train = config.train
    for role, layout in _layouts(config):
        if world_size % layout.model_parallel_size:
            yield rule_broken(
                "world size",
                world_size,
                f"the {role} takes tensor x pipeline x context = "
                f"{layout.tensor_model_parallel_size} x {layout.pipeline_model_parallel_size} x "
                f"{layout.context_parallel_size} ranks, which must divide it",
                f"start a multiple of {layout.model_parallel_size} ranks, or change "
                f"parallel.{role}",
            )
    if train.micro_batch_size is not None:
        ranks = max(1, world_size // config.parallel.student.model_parallel_size)
        unit = train.micro_batch_size * ranks
        if train.trajectories_per_step % unit:
            yield rule_broken(
                "train.prompts_per_step",
                train.prompts_per_step,
                f"prompts_per_step x rollouts_per_prompt = {train.trajectories_per_step} must be "
                f"a multiple of micro_batch_size x data parallel ranks = {unit}",
                "change one of them, or set train.max_tokens_per_micro_batch instead of "
                "train.micro_batch_size",
            )
    longest = longest_trajectory(config)
    budget = train.max_tokens_per_micro_batch
    if budget is not None and budget < longest:
        yield rule_broken(
            "train.max_tokens_per_micro_batch",
            budget,
            f"the longest sequence that these settings allow has {longest} tokens",
            f"raise it to {longest}, or lower refinement.max_context_tokens or max_tokens of "
            "generation.rollout and generation.refinement",
        )


def _load(source: ModelSource, field: str, problems: list[ConfigError]) -> Model | None:
    """Read and check a model directory. What is wrong with it is added to `problems`."""
    from transformers import AutoConfig, AutoTokenizer

    from nemo_trd.generation.eos import read_generation_config

    directory = Path(source.path).absolute()
    try:
        check_model_type(directory, field)
        options = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
        hf = _read(AutoConfig, directory, f"{field} (config.json)", options)
        check_supported(hf)
        check_weights(directory, hf, field)
        read_generation_config(directory)
        tokenizer = _read(AutoTokenizer, directory, f"{field} (tokenizer)", options)
    except ConfigError as error:
        problems.append(error)
        return None
    return Model(field, directory, hf, tokenizer)


def _load_served(
    config: Config, source: ModelSource, field: str, problems: list[ConfigError]
) -> Model | None:
    """As `_load`, of a teacher that only its servers hold: of any architecture, without weights."""
    from transformers import AutoTokenizer

    directory = Path(source.path).absolute()
    assert config.generation.vllm is not None  # config_rules: servers score
    try:
        hf = read_served(source, field, config.generation.vllm.teacher.server)
        check_served_weights(config, directory)
        options = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
        tokenizer = _read(AutoTokenizer, directory, f"{field} (tokenizer)", options)
    except ConfigError as error:
        problems.append(error)
        return None
    return Model(field, directory, hf, tokenizer)


def _read(reader: Any, directory: Path, field: str, options: dict[str, bool]) -> Any:
    try:
        return reader.from_pretrained(str(directory), **options)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise rule_broken(
            field,
            str(directory),
            f"transformers cannot read it: {str(error).splitlines()[0] if str(error) else error!r}",
            "give a complete Hugging Face directory",
        ) from error


def _layout_problems(field: str, layout: Layout, model: Model) -> Iterator[ConfigError]:
    """Whether the layout divides the model; only the first size that it does not is told."""
    try:
        check_layout(model.hf, layout, field)
    except ConfigError as error:
        yield error


def _tokenizer_problems(model: Model) -> Iterator[ConfigError]:
    """What prompts, labels and the embedding need of a tokenizer."""
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
    """The teacher knows the student's tokens, by the same ids, and ends as the student does.

    It may know more of them: it never samples those (`generation.eos.read_vocabulary`).
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    from nemo_trd.generation.eos import stop_ids

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
    """The longest sequences against the positions that the models know."""
    answer = longest_answer(config)
    contexts = _longest_contexts(config)
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
