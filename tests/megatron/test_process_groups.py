"""The process groups of a model are those that megatron-core makes of the same sizes."""

from __future__ import annotations

import pytest
from launch import launch

pytestmark = pytest.mark.distributed

SIZES = [(1, 2, 2, 2), (2, 2, 1, 2), (2, 1, 3, 2), (1, 4, 1, 3), (2, 2, 2, 1)]  # tp, cp, dp, pp
# Beside tp, cp and pp of 8 ranks: parts of an expert, ranks that share out the experts of a layer.
EXPERTS = [(1, 1, 1, 1, 8), (2, 1, 1, 2, 4), (2, 2, 1, 1, 2), (2, 1, 2, 1, 4), (1, 2, 2, 2, 2)]
EXPERT_NAMES = {"expt_tp": "tp", "ep": "ep", "expt_dp": "dp", "tp_ep": "tp-ep"}
EXPERT_NAMES |= {"tp_ep_pp": "tp-ep-pp"}
NAMES = {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "dp_cp": "dp-cp", "tp_cp": "tp-cp"}
NAMES |= {"mp": "tp-pp", "tp_dp_cp": "tp-dp-cp"}


def test_members_of_the_groups_are_those_of_megatron() -> None:
    launch(1, check_groups)


def check_groups() -> None:
    import torch.distributed as dist
    from fake_world import rank_of
    from megatron.core.parallel_state import RankGenerator

    from nemo_trd.config.schema import Layout
    from nemo_trd.megatron.process_groups import process_groups

    for tp, cp, dp, pp in SIZES:
        layout = Layout(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
        )
        theirs = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
        world = tp * cp * dp * pp
        for rank in range(world):
            with rank_of(rank, world):
                groups = process_groups(layout)
                for ours, name in NAMES.items():
                    (members,) = (r for r in theirs.get_ranks(name) if rank in r)
                    assert dist.get_process_group_ranks(getattr(groups, ours)) == members, ours
    for tp, cp, pp, etp, ep in EXPERTS:
        layout = Layout(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            expert_tensor_parallel_size=etp,
            expert_model_parallel_size=ep,
        )
        of_experts = RankGenerator(
            tp=etp, ep=ep, dp=8 // (etp * ep * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp"
        )
        for rank in range(8):
            with rank_of(rank, 8):
                groups = process_groups(layout)
                for ours, name in EXPERT_NAMES.items():
                    (members,) = (r for r in of_experts.get_ranks(name) if rank in r)
                    assert dist.get_process_group_ranks(getattr(groups, ours)) == members, ours
