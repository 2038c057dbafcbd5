"""The rules between settings, where those of one setting alone stand in `schema.py`."""

from __future__ import annotations

from typing import get_args

from nemo_trd.config.dataset_rules import check_dataset, has_reference
from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config, EstimatorName, Layout, StoredPairs
from nemo_trd.config.server_rules import check_colocated, check_pool, check_servers
from nemo_trd.config.teacher_rules import (
    check_moving_teacher,
    check_scoring_by_generation,
    check_server_scoring,
    check_shared_modules,
)


def check_consistent(config: Config) -> None:
    """Rules between fields.

    Raises:
        ConfigError: naming the first rule that is broken.
    """
    _check_models_and_data(config)
    _check_refinement(config)
    _check_training(config)
    _check_loss(config)
    if config.generation.stored is not None:
        _check_stored(config, config.generation.stored)
    _check_precision(config)
    _check_adapter(config)
    check_moving_teacher(config)
    if config.teacher_is_student:
        check_shared_modules(config)
    _check_layouts_and_servers(config)


def _check_models_and_data(config: Config) -> None:
    mode, teacher = config.algorithm.mode, config.model.teacher
    if mode == "opd" and teacher is None:
        raise rule_broken(
            "model.teacher",
            None,
            "algorithm.mode=opd distils a separate teacher",
            "set model.teacher.path, or algorithm.mode=opsd",
        )
    if mode == "opsd" and teacher is not None:
        raise rule_broken(
            "model.teacher.path",
            teacher.path,
            "in algorithm.mode=opsd the teacher is the frozen step-0 student",
            "set model.teacher=null, or algorithm.mode=opd",
        )
    train = config.data.train
    if mode == "opsd" and not has_reference(train):
        raise rule_broken(
            "data.train.columns.reference_solution",
            None,
            "algorithm.mode=opsd shows the reference solution to the teacher",
            "name the column that holds worked solutions; where they are the last turns of "
            "columns.messages, set data.train.last_assistant_turn=reference_solution",
        )
    for split, dataset in (("train", config.data.train), ("validation", config.data.validation)):
        if dataset is not None:
            check_dataset(f"data.{split}", dataset, config.data.verifier)


def _check_refinement(config: Config) -> None:
    refinement = config.refinement
    if refinement.subset != "all" and config.data.verifier == "none":
        raise rule_broken(
            "refinement.subset",
            refinement.subset,
            "choosing wrong or right rollouts needs a verifier",
            "set data.verifier=math, code or exact, or refinement.subset=all",
        )
    if config.algorithm.trajectory == "rollout" and refinement.subset != "all":
        raise rule_broken(
            "refinement.subset",
            refinement.subset,
            "algorithm.trajectory=rollout refines nothing",
            "set refinement.subset=all",
        )


def _check_training(config: Config) -> None:
    train = config.train
    if (train.micro_batch_size is None) == (train.max_tokens_per_micro_batch is None):
        raise rule_broken(
            "train.micro_batch_size",
            train.micro_batch_size,
            "exactly one of train.micro_batch_size and train.max_tokens_per_micro_batch is set",
            "set the other one to null",
        )
    data = config.data
    if config.evaluation.wanted and (data.validation is None or data.verifier == "none"):
        missing = "validation" if data.validation is None else "verifier"
        raise rule_broken(
            f"data.{missing}",
            getattr(data, missing),
            "evaluation.at_start, at_end and interval need problems to solve and a verifier",
            f"set data.{missing}, or switch evaluation off (at_start=false, at_end=false, "
            "interval=null)",
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise rule_broken(
            "optimizer.min_lr",
            config.optimizer.min_lr,
            f"it may not exceed optimizer.lr = {config.optimizer.lr}",
            "lower it",
        )


def _check_loss(config: Config) -> None:
    loss = config.loss
    if loss.divergence != "jsd" and loss.beta != 0.5:
        raise rule_broken(
            "loss.beta",
            loss.beta,
            f"loss.divergence={loss.divergence} does not use it",
            "remove it, or set loss.divergence=jsd",
        )
    if loss.divergence not in get_args(EstimatorName):
        return
    for field, value in (("top_k", loss.top_k), ("entry_clip", loss.entry_clip)):
        if value is not None:
            raise rule_broken(
                f"loss.{field}",
                value,
                f"loss.divergence={loss.divergence} looks at the sampled token alone",
                "set it to null, or loss.divergence=reverse_kl",
            )
    samples = f"loss.divergence={loss.divergence} is an estimate where labels are samples of the "
    if config.algorithm.trajectory != "rollout":
        raise rule_broken(
            "algorithm.trajectory",
            config.algorithm.trajectory,
            f"{samples}student, and a rewrite is one of the teacher",
            "set it to rollout, or loss.divergence=reverse_kl",
        )
    if config.generation.stored is not None:
        raise rule_broken(
            "generation.stored",
            config.generation.stored.rollout,
            f"{samples}student that is trained, and stored rollouts are of the one before training",
            "set it to null, or loss.divergence=reverse_kl",
        )


def _check_stored(config: Config, stored: StoredPairs) -> None:
    """Rules for samples that are read: each row of data.train is one pair, of the step-0 models."""
    drawn = "set generation.stored=null to draw samples"
    if stored.refinement is None and config.algorithm.trajectory == "refinement":
        raise rule_broken(
            "generation.stored.refinement",
            None,
            "algorithm.trajectory=refinement trains on rewrites",
            f"name their column, set algorithm.trajectory=rollout, or {drawn}",
        )
    if config.train.rollouts_per_prompt != 1:
        raise rule_broken(
            "train.rollouts_per_prompt",
            config.train.rollouts_per_prompt,
            "with generation.stored each row of data.train holds one rollout",
            f"set it to 1 (several rollouts of a problem are several rows), or {drawn}",
        )
    if config.generation.max_staleness:
        raise rule_broken(
            "generation.max_staleness",
            config.generation.max_staleness,
            "with generation.stored nothing is drawn that could be drawn ahead",
            f"set it to 0, or {drawn}",
        )


def _check_precision(config: Config) -> None:
    """Rules for delayed scaling, which takes a tensor's scale from its history.

    TransformerEngine exchanges the maxima of all tensors over all ranks whenever a forward pass
    ends, since megatron-core names no group: with pipeline stages some ranks are elsewhere then.
    """
    precision = config.precision
    if precision.fp8_recipe != "delayed":
        return
    if precision.teacher_fp8 is not None:
        raise rule_broken(
            "precision.fp8_recipe",
            "delayed",
            "scales follow from backward passes, and the teacher (precision.teacher_fp8 = "
            f"{precision.teacher_fp8}) has none",
            "set it to tensorwise, or precision.teacher_fp8=null",
        )
    stages = config.parallel.student.pipeline_model_parallel_size
    if precision.fp8 is not None and stages > 1:
        raise rule_broken(
            "precision.fp8_recipe",
            "delayed",
            "all ranks exchange maxima after each forward pass, and the stages of a pipeline "
            f"(parallel.student.pipeline_model_parallel_size = {stages}) would wait for each other",
            "set it to tensorwise",
        )


def _check_adapter(config: Config) -> None:
    adapter, precision = config.student.adapter, config.precision
    if adapter is None:
        if config.checkpoint.export_merged:
            raise rule_broken(
                "checkpoint.export_merged",
                True,
                "student.adapter=null trains the weights themselves: export/ has them",
                "set it to false",
            )
        return
    twice = [target for target in adapter.targets if adapter.targets.count(target) > 1]
    if twice:
        raise rule_broken(
            "student.adapter.targets",
            adapter.targets,
            f"a linear layer has one A and one B, and {twice[0]} is named twice",
            "name it once",
        )
    if precision.fp8 is not None and precision.fp8_recipe == "delayed":
        raise rule_broken(
            "precision.fp8_recipe",
            "delayed",
            "checkpoints of an adapter hold nothing of the weights, nor the scales that follow "
            "from their history",
            "set it to tensorwise",
        )
    own_teacher = config.model.teacher is None and config.teacher.ema is None
    if own_teacher and adapter.init not in ("kaiming", "gaussian"):
        raise rule_broken(
            "student.adapter.init",
            adapter.init,
            "in algorithm.mode=opsd the teacher is the step-0 student, and that must be the model "
            "without its adapter",
            "merge the adapter into model.student.path, and set student.adapter.init=kaiming",
        )


def _check_layouts_and_servers(config: Config) -> None:
    if config.scores_on_servers:
        check_server_scoring(config)
    if config.teacher.scoring == "generation":
        check_scoring_by_generation(config)
    for role in ("student", "teacher"):
        forward_only = role == "teacher" and not config.teacher_is_student
        layout = getattr(config.parallel, role)
        _check_layout(f"parallel.{role}", layout, forward_only=forward_only)
        if config.generation.vllm is not None and not (
            role == "teacher" and config.teacher_on_student_servers
        ):
            vllm = config.generation.vllm
            check_pool(f"generation.vllm.{role}", getattr(vllm, role))
    if config.generation.colocate:
        check_colocated(config)
    if config.generation.vllm is not None:
        check_servers(config, config.generation.vllm)


def _check_layout(field: str, layout: Layout, *, forward_only: bool) -> None:
    virtual = layout.virtual_pipeline_model_parallel_size
    if forward_only and virtual is not None:
        raise rule_broken(
            f"{field}.virtual_pipeline_model_parallel_size",
            virtual,
            "the teacher runs forward only and gains nothing from interleaving",
            "set it to null",
        )
    if virtual is not None and layout.pipeline_model_parallel_size < 2:
        raise rule_broken(
            f"{field}.virtual_pipeline_model_parallel_size",
            virtual,
            "the interleaved schedule needs pipeline_model_parallel_size of 2 or more",
            "set it to null, or raise pipeline_model_parallel_size",
        )
    if virtual is not None and layout.pipeline_model_parallel_size == 2 and layout.batch_p2p_comm:
        raise rule_broken(
            f"{field}.batch_p2p_comm",
            True,
            "megatron-core computes silently wrong gradients with the interleaved schedule at "
            "pipeline_model_parallel_size=2 and batched p2p",
            "set it to false",
        )
    if layout.sequence_parallel and layout.tensor_model_parallel_size == 1:
        raise rule_broken(
            f"{field}.sequence_parallel",
            True,
            "it splits sequences over tensor parallel ranks and there is one",
            "set it to false, or raise tensor_model_parallel_size",
        )
