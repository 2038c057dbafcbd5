"""Rules on world size, global batch and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.lengths import longest_trajectory, parts_of_longest
from nemo_trd.config.schema import Config, Layout


def megatron_layouts(config: Config) -> list[tuple[str, Layout]]:
    """Role and layout of each model that Megatron holds: a teacher on servers is left out."""
    layouts = [("student", config.parallel.student)]
    if config.teacher.scoring == "megatron":
        layouts.append(("teacher", config.parallel.teacher))
    return layouts


def batch_problems(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Yield the rules that `world_size` ranks and the batch sizes break."""
    train = config.train
    for role, layout in megatron_layouts(config):
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
        elif world_size % layout.expert_holders:
            yield rule_broken(
                f"parallel.{role}.expert_model_parallel_size",
                layout.expert_model_parallel_size,
                "expert tensor x expert x pipeline = "
                f"{layout.expert_tensor_parallel_size} x {layout.expert_model_parallel_size} x "
                f"{layout.pipeline_model_parallel_size} ranks hold the {role}'s experts, and they "
                f"must divide the world size, {world_size}",
                f"start a multiple of {layout.expert_holders} ranks, or lower it",
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
            f"the longest trajectory that these settings allow has {longest} tokens: "
            + " + ".join(f"{name} = {tokens}" for name, tokens in parts_of_longest(config)),
            f"raise it to {longest}, or lower one of those",
        )
