"""The local layers' attention within segments: which calls it makes, and what it never forms."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_trd.megatron import attention
from nemo_trd.megatron.attention import OverRanks, WithinSegments, shared_calls
from nemo_trd.megatron.context_parallel import places_of_rank

HEADS, GROUPS, WIDTH = 6, 2, 8
LENGTHS = (40, 36, 12, 4, 4)


def qkv(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, heads, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All segments' attention from a mask of the whole pack."""
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    sees = (owner[:, None] == owner).tril()
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, k) / WIDTH**0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def within_segments() -> WithinSegments:
    return WithinSegments(LENGTHS, torch.tensor([0, *accumulate(LENGTHS)]), HEADS * WIDTH)


def over_ranks(monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype) -> list[Any]:
    """Attention of each of `size` ranks, to which keys and values of all ranks are given."""
    gathered = SimpleNamespace(apply=lambda x, *_: x)
    monkeypatch.setattr(attention, "GatherTokens", gathered)
    groups = [SimpleNamespace(size=lambda: size, rank=lambda r=rank: r) for rank in range(size)]
    return [OverRanks(LENGTHS, group, dtype) for group in groups]  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", [-1, 0, 10_000, 10**9])
def test_calls_for_several_segments_are_those_of_each(
    cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CALL_COST", cost)
    check([within_segments()], [torch.arange(sum(LENGTHS))])


@pytest.mark.parametrize("block", [3, 256])
def test_parts_of_ranks_attend_to_all_that_comes_before(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    places = [places_of_rank(LENGTHS, 2, rank) for rank in range(2)]
    check(over_ranks(monkeypatch, 2, torch.float64), places)


def check(ranks: list[Any], places: list[Tensor]) -> None:
    """Values and gradients of queries, keys and values, those of all ranks together."""
    results = []
    for own in (False, True):
        q, k, v = qkv(sum(LENGTHS))
        if own:
            whole = torch.cat(
                [attend(q[at], k, v, None) for attend, at in zip(ranks, places, strict=True)]
            )
            whole = whole[torch.cat(places).argsort()]
        else:
            whole = dense(q, k, v)
        whole.square().sum().backward()
        results.append((whole, q.grad, k.grad, v.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_no_tensor_grows_with_the_square_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Tensor):
                    self.elements = max(self.elements, part.numel())
            return result

    n = 4096
    monkeypatch.setattr(f"{__name__}.LENGTHS", (n,))
    seen = []
    for rank in (None, 1):
        q, k, v = qkv(n)
        with Largest() as largest:
            attend = (
                within_segments()
                if rank is None
                else over_ranks(monkeypatch, 2, torch.float64)[rank]
            )
            part = q if rank is None else q[: n // 2]
            attend(part, k, v, None).sum().backward()
        seen.append(largest.elements)
    assert seen[0] == n * HEADS * WIDTH
    assert seen[1] == attention.BLOCK * (n + attention.BLOCK)


def test_similar_neighbours_share_a_call() -> None:
    # 50 beside 49 computes 2 x 50^2 scores: 99 more than both alone.
    assert shared_calls((50, 49, 9, 9), 99) == [(2, 50), (2, 9)]
    assert shared_calls((50, 49, 9, 9), 98) == [(1, 50), (1, 49), (2, 9)]
    assert shared_calls((9, 50), 50**2 - 9**2) == [(2, 50)]
    assert shared_calls((9, 9), -1) == [(1, 9), (1, 9)]
