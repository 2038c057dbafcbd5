"""The recipes at their true shapes on fake tensors: each rank's bytes, tensors, and exchanges.

With TransformerEngine's layers, as on a cluster. What the same code computes with real tensors, and
with the local layers, is shown by test_plan_parallel.py and test_hf_weights_parallel.py, on models
that fit into a test.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from exchanges import Exchanges, check_no_circle
from launch import launch

pytestmark = pytest.mark.distributed

RECIPES = {  # experiment -> what makes it larger than it ships
    "trd_70b": ["cluster.training_nodes=8"],  # TP 8, PP 4: 64 ranks, two replicas
    "trd_70b_32k": [],  # TP 8, CP 2, PP 4: 64 ranks that divide each sequence
    # The student's data parallel ranks meet a teacher of two stages.
    "trd_8b": [
        *("cluster.training_nodes=2", "parallel.teacher.pipeline_model_parallel_size=2"),
        *("parallel=tp8", "teacher.scoring=megatron", "loss.top_k=null"),
    ],
    "trd_70b_lora": [],  # TP 8: its teacher is the student
    "trd_30b_a3b": [],  # TP 4, PP 2, EP 8: no two ranks hold the same experts
    "paper_qwen3_8b": [],
    # Without a teacher of its own each student has the same shape and layout.
    "paper_qwen3_4b_opd": [],
    "paper_qwen3_1p7b_opd": [],
}
# 640 layers to be built of each, or 18,432 tensors of experts.
LARGE = {"trd_70b", "trd_70b_32k", "trd_70b_lora", "trd_30b_a3b"}
PADDING = 64 + 256  # elements before a parameter and after a bucket, of a distributed optimizer


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[pytest.mark.slow] if r in LARGE else []) for r in RECIPES],
)
def test_every_rank_holds_what_is_planned_and_together_every_tensor_once(recipe: str) -> None:
    arguments = (recipe, RECIPES[recipe])
    output = launch(1, check_recipe, *arguments, timeout=400, transformer_engine=True)
    assert "student whole" in output


def check_recipe(recipe: str, overrides: list[str]) -> None:
    from transformers import AutoConfig

    from nemo_trd.config.load import compose
    from nemo_trd.plan.shapes import SHIPPED

    config = compose([f"experiment={recipe}", *overrides])
    seen = []
    for role, source in (("student", config.model.student), ("teacher", config.teacher_source)):
        shape = json.loads((SHIPPED / f"{Path(source.path).name}.json").read_text())
        case = (shape, getattr(config.parallel, role))
        served = role == "teacher" and config.scores_on_servers
        if case not in seen and not served:
            check_model(config, role, AutoConfig.for_model(**shape))
        seen.append(case)


def check_model(config: Any, role: str, hf: Any) -> None:
    """Build each rank's share of a model, and compare it with the plan and with config.json."""
    from fake_world import rank_of

    from nemo_trd.megatron.hf_weights import _parts
    from nemo_trd.megatron.lora import add_adapters
    from nemo_trd.megatron.model import build_model
    from nemo_trd.megatron.process_groups import process_groups
    from nemo_trd.models.family import expected_tensors, experts_of
    from nemo_trd.plan.shapes import stage_parameters

    layout, world = getattr(config.parallel, role), config.cluster.world_size
    exports, sparse = [], experts_of(hf) is not None
    planned = [stage.total for stage in stage_parameters(hf, layout)]
    places = []
    holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
    elements: Counter[str] = Counter()
    for rank in range(world):
        with rank_of(rank, world):
            groups = process_groups(layout)
            place = (groups.pp.rank(), groups.tp.rank(), groups.cp.rank(), groups.dp.rank())
            places.append(place)
            of_first = groups.dp_cp.rank() == 0  # else another holds the same outside experts
            experts_of_first = groups.expt_dp.rank() == 0
            if not of_first and not (sparse and experts_of_first):
                continue
            models = build_model(hf, layout, groups, config.precision)
            assert models[0].config.transformer_impl == "transformer_engine"
            held = sum(p.numel() for model in models for p in model.parameters())
            assert held == planned[place[0]], (rank, place)
            for part in (part for model in models for part in _parts(model, hf, groups)):
                of_expert = part.whole.expert is not None
                if experts_of_first if of_expert else of_first:
                    number = groups.expt_tp.rank() if of_expert else place[1]
                    holders[part.name].append((place[0], number))
                    elements[part.name] += math.prod(part.shape)
            if role == "student":
                exports.append(exchanges_of_export(models, hf, groups))
            if role == "student" and place[1] == 0:
                if config.student.adapter is not None:
                    add_adapters(models, hf, config.student.adapter, groups, seed=0)
                check_bytes(config, models, groups)
    expected = expected_tensors(hf)
    assert holders.keys() == expected.keys()
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    cp, dp = layout.context_parallel_size, world // layout.model_parallel_size
    assert sorted(places) == list(product(range(pp), range(tp), range(cp), range(dp)))
    for name, whole in expected.items():
        stages = sorted({stage for stage, _ in holders[name]})
        twice = hf.tie_word_embeddings and pp > 1 and whole.layer is None and len(whole.shape) == 2
        assert stages == ([0, pp - 1] if twice else stages[:1]), name
        split = tp if whole.expert is None else layout.expert_tensor_parallel_size
        assert sorted(holders[name]) == [(s, t) for s in stages for t in range(split)], name
        copies = len(stages) * (1 if whole.split_axis is not None else split)
        padding = elements[name] - copies * math.prod(whole.shape)
        rows = 128 * tp if whole.layer is None and whole.split_axis == 0 else 1
        assert 0 <= padding < copies * rows * whole.shape[-1], name
    check_no_circle(exports, "export")
    print(f"{role} whole: {len(expected)} tensors on {world} ranks", flush=True)


def exchanges_of_export(models: list[Any], hf: Any, groups: Any) -> list[list[Any]]:
    """What a rank asks of its communicators to get every tensor of the model whole."""
    from unittest import mock

    from nemo_trd.megatron.hf_weights import export_hf_weights
    from nemo_trd.models.family import expected_tensors

    expected, exchanges = expected_tensors(hf), Exchanges()
    names = names_by_stage(hf, groups.pp.size())

    def answer(answers: list[Any], own: Any, group: Any) -> None:
        assert own == names[groups.pp.rank()]
        answers[:] = names

    with mock.patch("torch.distributed.all_gather_object", answer), exchanges.followed():
        exported = export_hf_weights(models, hf, groups)
        shapes = {name: tuple(tensor.shape) for name, tensor in exported}
    assert shapes == {name: tuple(whole.shape) for name, whole in expected.items()}
    return exchanges.asked


def names_by_stage(hf: Any, stages: int) -> list[set[str | int]]:
    """Numbers of each stage's layers, and names of its tensors outside them."""
    from nemo_trd.models.family import expected_tensors, family_of

    names: list[set[str | int]] = [set() for _ in range(stages)]
    for name, whole in expected_tensors(hf).items():
        if whole.layer is not None:
            holders = {whole.layer * stages // hf.num_hidden_layers}
        elif name == family_of(hf).embedding:
            holders = {0, stages - 1} if hf.tie_word_embeddings else {0}
        else:
            holders = {stages - 1}
        for stage in holders:
            names[stage].add(name if whole.layer is None else whole.layer)
    return names


def check_bytes(config: Any, models: list[Any], groups: Any) -> None:
    """Weights; gradients, main weights and Adam's two moments of what is trained of them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from nemo_trd.megatron.optimizer import make_optimizer
    from nemo_trd.plan.memory import model_state_bytes

    distributed = config.optimizer.distributed
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    chunks = [DistributedDataParallel(m.config, settings, m, pg_collection=groups) for m in models]
    optimizer = make_optimizer(config, chunks, groups)
    buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    gradients = sum(b.grad_data.numel() * 4 for b in buffers)
    main = [
        parameter
        for single in optimizer.chained_optimizers
        for group in single.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert {parameter.element_size() for parameter in main} == {4}
    states = sum(parameter.numel() * (4 + 8) for parameter in main)
    planned = model_state_bytes(config, config_shape(config), groups.pp.rank())
    parameters = [p for model in models for p in model.parameters()]
    assert planned["weights"] == sum(p.numel() * p.element_size() for p in parameters)
    slack = 0
    if distributed:  # buckets are padded, and divided by their length
        slack = PADDING * (sum(p.requires_grad for p in parameters) + 2) * 12
    assert planned["gradients"] <= gradients <= planned["gradients"] + slack
    assert abs(states - planned["optimizer"]) <= slack


def config_shape(config: Any) -> Any:
    """The student's config.json as the plan reads it."""
    from nemo_trd.plan.shapes import read_model

    return read_model(config.model.student, "model.student.path")[0].hf


def test_states_reach_every_rank_that_computes_the_loss_once() -> None:
    launch(1, check_all_routes, timeout=300, transformer_engine=True)


def check_all_routes() -> None:
    for recipe, overrides in RECIPES.items():
        check_routes(recipe, overrides)


def check_routes(recipe: str, overrides: list[str]) -> None:
    from unittest import mock

    import torch.distributed as dist
    from fake_world import rank_of

    from nemo_trd.config.load import compose
    from nemo_trd.megatron.hand_over import last_stage_ranks, routes
    from nemo_trd.megatron.process_groups import process_groups
    from nemo_trd.megatron.schedule import is_last_stage

    config = compose([f"experiment={recipe}", *overrides])
    world = config.cluster.world_size
    last_stages = {}
    for role in ("student", "teacher"):
        layout = getattr(config.parallel, role)
        everyone = []
        for rank in range(world):
            with rank_of(rank, world):
                groups = process_groups(layout)
                everyone.append((groups.dp.rank(), groups.cp.rank(), is_last_stage(groups)))
                own = {g for g in vars(groups).values() if isinstance(g, dist.ProcessGroup)}
                members = {tuple(dist.get_process_group_ranks(group)) for group in own}
                assert len(members) == len(own)  # none connects the same ranks again

        def answer(answers: list[Any], own: Any, everyone: Any = everyone) -> None:
            assert own == everyone[-1]
            answers[:] = everyone

        with rank_of(world - 1, world), mock.patch("torch.distributed.all_gather_object", answer):
            last_stages[role] = last_stage_ranks(process_groups(layout))
        sizes = {(len(parts), *map(len, parts)) for parts in last_stages[role]}
        cp = layout.context_parallel_size
        assert sizes == {(cp, *[layout.tensor_model_parallel_size] * cp)}
    for sources in last_stages["teacher"]:
        for destinations in last_stages["student"]:
            given = routes(sources, destinations)
            assert all(source in sources[part] for (part, source), _ in given)
            # Each rank gets each part of the teacher once; what it has itself, from itself.
            assert sorted((part, wanted, rank) for (part, _), (wanted, rank) in given) == sorted(
                (part, wanted, rank)
                for part in range(len(sources))
                for wanted, ranks in enumerate(destinations)
                for rank in ranks
            )
            assert all(
                source == rank or rank not in sources[part] for (part, source), (_, rank) in given
            )
