"""Which part of a pack, and which labels, a context parallel rank has."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from nemo_trd.algorithm.micro_batches import make_micro_batch
from nemo_trd.config.schema import Layout
from nemo_trd.data.types import Trajectory
from nemo_trd.megatron.context_parallel import label_holders, own_context, places_of_rank
from nemo_trd.models.family import pack_alignment


def test_parts_are_dealt_out_in_a_zig_zag_within_each_sequence() -> None:
    lengths = (8, 4)
    assert places_of_rank(lengths, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert places_of_rank(lengths, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert places_of_rank(lengths, 1, 0).tolist() == list(range(12))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_together_hold_every_token_once_and_attend_to_equally_many_keys(size: int) -> None:
    lengths = tuple(2 * size * n for n in (1, 5, 2, 40))
    places = [places_of_rank(lengths, size, rank) for rank in range(size)]
    assert torch.cat(places).sort().values.tolist() == list(range(sum(lengths)))
    position = torch.cat([torch.arange(n) for n in lengths])
    assert len({int((position[held] + 1).sum()) for held in places}) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_each_label_is_at_the_rank_that_holds_its_position(size: int) -> None:
    """Also of sequences shorter than 2 CP, and where a rank has no label."""
    lengths = [(1, 1), (3, 2), (9, 30), (2, 1)]  # of context and answer
    trajectories = [
        Trajectory(i, 0, "refinement", tuple(range(1, c + 1)), (7,), tuple(range(50, 50 + n)), 0)
        for i, (c, n) in enumerate(lengths)
    ]
    layout = Layout(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=size
    )
    alignment = pack_alignment(layout, None, "tensorwise")
    for taken in (trajectories, trajectories[:1]):
        batch = make_micro_batch(taken, student=alignment)
        assert all(n % (2 * size) == 0 for n in batch.student.lengths)
        ranks, numbers = label_holders([batch.student], size)
        parts = [own_context(batch.student, size, rank) for rank in range(size)]
        counts = [len(part.label_positions) for part in parts]
        assert sum(counts) == len(batch.labels)
        if len(taken) == 1:
            assert 0 in counts
        starts = [0, *accumulate(batch.student.lengths)]
        for label, (rank, number) in enumerate(zip(ranks, numbers, strict=True)):
            part, owner = parts[rank], int(batch.trajectory_index[label])
            predicts = part.label_positions[number]
            context = len(taken[owner].student_context)
            expected = context - 1 + int(batch.label_index[label])
            assert part.position_ids[0, predicts] == expected
            assert part.places is not None
            assert part.places[predicts] == starts[owner] + expected
            token = (taken[owner].student_context + taken[owner].labels)[expected]
            assert part.tokens[0, predicts] == token
