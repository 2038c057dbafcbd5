"""The fused divergence with its vocabulary sharded over ranks."""

from __future__ import annotations

import importlib.util
from itertools import product

import oracles
import pytest
import torch
import torch.distributed as dist
from launch import launch
from oracles import DIVERGENCES, TAILS, make_loss
from torch import Tensor

from nemo_trd.divergences import dense_divergence
from nemo_trd.losses import divergence, token_nll

pytestmark = pytest.mark.distributed
PADDED, TOKENS = 64, 10


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_vocabulary_gives_values_and_gradients_of_float64_dense_autograd(
    ranks: int,
) -> None:
    output = launch(ranks, check_all, timeout=300)
    assert output.count("all checks passed") == ranks


def check_all() -> None:
    dist.init_process_group("gloo")
    # 50 of 64 ids are real: with 4 ranks the last shard holds 2 of them. 20: it holds none.
    cases = product(DIVERGENCES, TAILS, ((1.0, 5), (1.7, 3)), (50, 20))
    for name, tail, (temperature, chunk_size), vocab in cases:
        settings = {"temperature": temperature, "chunk_size": chunk_size}
        check_against_dense(make_loss(name, tail, **settings), vocab)
    check_against_dense(make_loss(token_clip=2.0), 50)
    for name in DIVERGENCES:
        check_plain_oracle(make_loss(name, temperature=1.7))
    if importlib.util.find_spec("modelopt"):
        check_modelopt()
    for tail in TAILS:
        check_no_token(tail)
    check_same_support_as_unsharded()
    check_group_of_one()
    check_junk_in_padding()
    check_token_nll()
    print("all checks passed", flush=True)
    dist.destroy_process_group()


def make_inputs(n: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Student hidden states and weight, teacher hidden states and weight: the same on all ranks."""
    g = torch.Generator().manual_seed(n)
    shapes = ((n, 8), (PADDED, 8), (n, 6), (PADDED, 6))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


def own(x: Tensor, dim: int = 0) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def check_against_dense(loss, vocab: int) -> None:  # type: ignore[no-untyped-def]
    hs, ws, ht, wt = make_inputs()
    labels = torch.arange(TOKENS) * 2 % vocab
    hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
    out = divergence(hidden, weight, ht, own(wt), labels, loss, vocab, dist.group.WORLD)
    (0.5 * out.loss_sum).backward()
    dist.all_reduce(hidden.grad)

    hs, ws = hs.double().requires_grad_(), ws.double().requires_grad_()
    value = dense_divergence(hs @ ws[:vocab].t(), ht.double() @ wt.double()[:vocab].t(), loss)
    (0.5 * value.sum()).backward()
    where = f"{loss}, {vocab} ids"
    assert distance(out.loss_sum.detach(), value.sum().detach()) < 1e-5, where
    assert distance(hidden.grad, hs.grad) < 1e-5, where
    expected = own(ws.grad)
    assert (weight.grad - expected).norm() < 1e-5 * ws.grad.norm(), where

    alone = divergence(*make_inputs(), labels, loss, vocab)
    for key, expected in alone.metrics.items():
        torch.testing.assert_close(out.metrics[key], expected, rtol=1e-5, atol=1e-6, msg=where)
    values = [torch.empty_like(out.token_divergence) for _ in range(dist.get_world_size())]
    dist.all_gather(values, out.token_divergence)
    assert all(torch.equal(v, values[0]) for v in values), where


def check_plain_oracle(loss) -> None:  # type: ignore[no-untyped-def]
    """Logits of a chunk in memory, autograd and all-reduces in both directions."""
    gradients = []
    hs, ws, ht, wt = make_inputs(dtype=torch.float64)
    for fused in (True, False):
        hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
        if fused:
            labels = torch.zeros(TOKENS, dtype=torch.int64)
            group = dist.group.WORLD
            total = divergence(hidden, weight, ht, own(wt), labels, loss, PADDED, group).loss_sum
        else:
            logits = hidden @ weight.t(), ht @ own(wt).t()
            total = oracles.vocab_parallel(*logits, loss, dist.group.WORLD).sum()
        total.backward()
        gradients.append((total.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_modelopt() -> None:
    """NVIDIA's vocabulary-parallel losses: values and gradients."""
    from megatron.core import parallel_state

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    hs, ws, ht, wt = make_inputs()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    for name, tail in product(("forward_kl", "reverse_kl"), ("full", "renormalize")):
        loss = make_loss(name, tail, temperature=1.7)
        hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
        logits = hidden @ weight.t(), ht @ own(wt).t()
        value = oracles.modelopt(*logits, loss, ranks)
        total = value.detach().clone()
        if tail == "full":
            value.sum().backward()
            dist.all_reduce(total)
        else:  # each rank has the whole value, and gradients sum over the copies of all ranks
            (value.sum() / ranks).backward()
        theirs = total, hidden.grad, weight.grad
        hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
        out = divergence(hidden, weight, ht, own(wt), labels, loss, PADDED, dist.group.WORLD)
        out.loss_sum.backward()
        ours = out.token_divergence, hidden.grad, weight.grad
        for a, b in zip(ours, theirs, strict=True):
            assert distance(a, b) < 1e-5, f"{name} {tail}"
    parallel_state.destroy_model_parallel()


def check_no_token(tail: str) -> None:
    hs, ws, ht, wt = make_inputs(0)
    hs, weight = hs.requires_grad_(), own(ws).requires_grad_()
    labels = torch.zeros(0, dtype=torch.int64)
    out = divergence(hs, weight, ht, own(wt), labels, make_loss("jsd", tail), 50, dist.group.WORLD)
    out.loss_sum.backward()
    assert out.loss_sum == 0 and out.count == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def check_same_support_as_unsharded() -> None:
    """Rounded teacher states make ties, within a shard and between shards."""
    hs, ws, ht, wt = make_inputs()
    ht, wt = ht.round(), wt.round()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    for k in range(1, 50, 4):
        loss = make_loss("forward_kl", "renormalize", top_k=k)
        alone = divergence(hs, ws, ht, wt, labels, loss, 50)
        out = divergence(hs, own(ws), ht, own(wt), labels, loss, 50, dist.group.WORLD)
        torch.testing.assert_close(out.token_divergence, alone.token_divergence)


def check_group_of_one() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    labels, loss = torch.zeros(TOKENS, dtype=torch.int64), make_loss()
    alone = divergence(*make_inputs(), labels, loss, 50)
    out = divergence(*make_inputs(), labels, loss, 50, groups[dist.get_rank()])
    assert torch.equal(out.token_divergence, alone.token_divergence)


def check_junk_in_padding() -> None:
    hs, ws, ht, wt = make_inputs()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    for vocab, tail in product((50, 20), TAILS):
        results = []
        for junk in (0.0, float("nan")):
            ws[vocab:], wt[vocab:] = junk, junk
            weight = own(ws).requires_grad_()
            loss = make_loss("jsd", tail)
            out = divergence(hs, weight, ht, own(wt), labels, loss, vocab, dist.group.WORLD)
            out.loss_sum.backward()
            results.append([out.token_divergence, weight.grad, *out.metrics.values()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), (vocab, tail)


def check_token_nll() -> None:
    hs, ws, *_ = make_inputs()
    labels = torch.arange(TOKENS) * 2
    settings = {"temperature": 0.6, "vocab_size": 20, "chunk_size": 3}
    alone = token_nll(hs, ws, labels, **settings)
    sharded = token_nll(hs, own(ws), labels, **settings, group=dist.group.WORLD)
    torch.testing.assert_close(sharded, alone)
