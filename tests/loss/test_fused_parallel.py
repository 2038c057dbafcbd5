"""The fused divergence with its vocabulary sharded over ranks."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import oracles
import pytest
import torch
import torch.distributed as dist
from launch import launch
from oracles import DIVERGENCES, ESTIMATORS, TAILS, make_loss
from torch import Tensor

from nemo_trd.config.schema import Loss
from nemo_trd.data.types import ContextBatch
from nemo_trd.loss.formulas import dense_divergence
from nemo_trd.loss.fused import fused_divergence, token_nll

pytestmark = pytest.mark.distributed
PADDED, TOKENS = 64, 10


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_vocabulary_gives_values_and_gradients_of_float64_dense_autograd(
    ranks: int,
) -> None:
    output = launch(ranks, check_all, timeout=400)
    assert output.count("all checks passed") == ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_vocabulary_gives_values_and_gradients_of_modelopt(ranks: int) -> None:
    oracles.need(oracles.MODELOPT)
    output = launch(ranks, check_modelopt, timeout=200)
    assert output.count("agrees with ModelOpt") == ranks


def check_all() -> None:
    dist.init_process_group("gloo")
    cases = product(DIVERGENCES, TAILS, (1.0, 1.7), (5, 3), (False, True), (False, True))
    for number, (name, tail, temperature, chunk_size, sequence_parallel, tied) in enumerate(cases):
        loss = make_loss(name, tail, temperature=temperature, chunk_size=chunk_size)
        # 50 of 64 ids are real: with 4 ranks the last shard holds 2 of them. 20: it holds none.
        check_against_dense(loss, (50, 20)[number % 2], sequence_parallel, tied)
    check_against_dense(make_loss(token_clip=5.0), 50, False, False)
    for name, tail, vocab in product(DIVERGENCES, TAILS, (50, 20)):
        loss = make_loss(name, tail, temperature=1.7, entry_clip=0.1)
        check_against_dense(loss, vocab, vocab == 20, tied=False)
    for name, vocab in product(ESTIMATORS, (50, 20)):
        check_against_dense(make_loss(name, temperature=1.7), vocab, True, tied=False)
    for name, tail in product(DIVERGENCES, TAILS):
        check_bf16(make_loss(name, tail, chunk_size=8))
        check_equal_models(make_loss(name, tail))
    for name in DIVERGENCES:
        check_plain_oracle(make_loss(name, temperature=1.7))
        check_plain_oracle(make_loss(name, entry_clip=0.1))
        check_peaked_teacher(make_loss(name))
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


def gather(x: Tensor) -> Tensor:
    """[...] of every rank -> [ranks, ...]"""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def check_against_dense(loss: Loss, vocab: int, sequence_parallel: bool, tied: bool) -> None:
    """From hidden states [s, b, h] as a model leaves them on its ranks. Tied: they come from the
    output weight, which gets the gradient of both uses."""
    from nemo_trd.megatron.schedule import label_rows

    s, b = 16, 1
    states, ws, *_ = make_inputs(s * b)
    _, _, ht, wt = make_inputs()
    tokens, positions = torch.arange(s * b).view(s, b) % vocab, torch.arange(TOKENS) + 3
    labels = torch.arange(TOKENS) * 2 % vocab
    group = dist.group.WORLD
    weight = own(ws).requires_grad_()
    if tied:
        hidden = embed(tokens, weight, sequence_parallel).tanh()
        hidden.retain_grad()
    else:
        hidden = states.view(s, b, -1)
        hidden = (own(hidden) if sequence_parallel else hidden.clone()).requires_grad_()
    borders = torch.tensor([0, s], dtype=torch.int32)
    batch = ContextBatch(tokens.t(), tokens.t(), positions, (s,), borders)
    rows = label_rows(hidden, batch, SimpleNamespace(tp=group), sequence_parallel)
    out = fused_divergence(rows, weight, ht, own(wt), labels, loss, vocab, group)
    (0.5 * out.loss_sum).backward()

    exact = ws.double().requires_grad_()
    exact_hidden = exact[tokens].tanh() if tied else states.double().view(s, b, -1)
    exact_hidden = exact_hidden if tied else exact_hidden.requires_grad_()
    if tied:
        exact_hidden.retain_grad()
    exact_rows = exact_hidden.transpose(0, 1).flatten(0, 1)[positions]
    teacher_logits = ht.double() @ wt.double()[:vocab].t()
    value = dense_divergence(exact_rows @ exact[:vocab].t(), teacher_logits, loss, labels)
    (0.5 * value.sum()).backward()
    where = f"{loss}, {vocab} ids, {sequence_parallel=}, {tied=}"
    assert distance(out.loss_sum.detach(), value.sum().detach()) < 1e-5, where
    expected = own(exact_hidden.grad) if sequence_parallel else exact_hidden.grad
    assert (hidden.grad - expected).norm() < 1e-5 * exact_hidden.grad.norm(), where
    assert (weight.grad - own(exact.grad)).norm() < 1e-5 * exact.grad.norm(), where

    alone = fused_divergence(exact_rows.float().detach(), ws, ht, wt, labels, loss, vocab)
    for key, expected in alone.metrics.items():
        torch.testing.assert_close(out.metrics[key], expected, rtol=1e-5, atol=1e-6, msg=where)
    values = gather(out.token_divergence)
    assert all(torch.equal(v, values[0]) for v in values), where


def embed(tokens: Tensor, weight: Tensor, sequence_parallel: bool) -> Tensor:
    """[s, b] ids -> [s (/ ranks), b, h] rows of the sharded weight, by Megatron's collectives."""
    from megatron.core.tensor_parallel import mappings

    local = tokens - dist.get_rank() * len(weight)
    mine = (local >= 0) & (local < len(weight))
    found = weight[local.clamp(0, len(weight) - 1)] * mine[..., None]
    if sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(found, group=dist.group.WORLD)
    return mappings.reduce_from_tensor_model_parallel_region(found, group=dist.group.WORLD)


def check_bf16(loss: Loss) -> None:
    """No worse than dense bf16 logits of the same shards with an fp32 softmax."""
    n, vocab = 64, 50
    inputs = make_inputs(n, torch.bfloat16)
    labels = torch.arange(n) % vocab
    hidden, weight = inputs[0].clone().requires_grad_(), own(inputs[1]).requires_grad_()
    group = dist.group.WORLD
    out = fused_divergence(hidden, weight, inputs[2], own(inputs[3]), labels, loss, vocab, group)
    out.loss_sum.backward()
    d_hidden, d_weight = gather(hidden.grad).sum(0), gather(weight.grad).flatten(0, 1)
    ours = out.token_divergence, d_hidden, d_weight

    def dense(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        hs, ws, ht, wt = (x.to(dtype) for x in inputs)
        ranks, softmax = dist.get_world_size(), torch.promote_types(dtype, torch.float32)
        copies = [hs.clone().requires_grad_() for _ in range(ranks)]
        whole = ws.clone().requires_grad_()
        parts = [h @ w.t() for h, w in zip(copies, whole.chunk(ranks), strict=True)]
        logits = torch.cat(parts, -1)[:, :vocab].to(softmax)
        value = dense_divergence(logits, (ht @ wt[:vocab].t()).to(softmax), loss)
        *d_copies, d_whole = torch.autograd.grad(value.sum(), (*copies, whole))
        return value.detach(), torch.stack(d_copies).sum(0), d_whole

    for mine, theirs, true in zip(ours, dense(torch.bfloat16), dense(torch.float64), strict=True):
        assert (mine - true).norm() <= 1.02 * (theirs - true).norm(), loss


def check_equal_models(loss: Loss) -> None:
    hs, ws, *_ = make_inputs()
    hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    out = fused_divergence(hidden, weight, hs, own(ws), labels, loss, 50, dist.group.WORLD)
    out.loss_sum.backward()
    assert out.token_divergence.abs().max() < 2e-7, loss
    assert hidden.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-6, loss


def check_peaked_teacher(loss: Loss) -> None:
    """One id of the last shard with real columns has probability 1 - 1e-7."""
    student = torch.linspace(-4, 4, PADDED, dtype=torch.float64).expand(2, -1).contiguous()
    teacher = torch.full((2, PADDED), math.log(1e-7 / 49), dtype=torch.float64)
    teacher[:, 49] = 0
    exact = student.clone().requires_grad_()
    value = dense_divergence(exact[:, :50], teacher[:, :50], loss)
    value.sum().backward()
    eye, labels = torch.eye(PADDED), torch.zeros(2, dtype=torch.int64)
    hidden = student.float().requires_grad_()
    group = dist.group.WORLD
    out = fused_divergence(hidden, own(eye), teacher.float(), own(eye), labels, loss, 50, group)
    out.loss_sum.backward()
    dist.all_reduce(hidden.grad)
    assert distance(out.token_divergence, value.detach()) < 1e-5, loss
    assert distance(hidden.grad, exact.grad) < 1e-5, loss
    assert (hidden.grad[:, :50] != 0).all() and (hidden.grad[:, 50:] == 0).all(), loss


def check_plain_oracle(loss: Loss) -> None:
    """Logits of a chunk in memory, autograd and all-reduces in both directions."""
    gradients = []
    hs, ws, ht, wt = make_inputs(dtype=torch.float64)
    for fused in (True, False):
        hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
        if fused:
            labels = torch.zeros(TOKENS, dtype=torch.int64)
            group = dist.group.WORLD
            total = fused_divergence(
                hidden, weight, ht, own(wt), labels, loss, PADDED, group
            ).loss_sum
        else:
            logits = hidden @ weight.t(), ht @ own(wt).t()
            total = oracles.vocab_parallel(*logits, loss, dist.group.WORLD).sum()
        total.backward()
        gradients.append((total.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_modelopt() -> None:
    """NVIDIA's vocabulary-parallel losses: values and gradients."""
    oracles.need(oracles.MODELOPT)
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
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
        out = fused_divergence(hidden, weight, ht, own(wt), labels, loss, PADDED, dist.group.WORLD)
        out.loss_sum.backward()
        ours = out.token_divergence, hidden.grad, weight.grad
        for a, b in zip(ours, theirs, strict=True):
            assert distance(a, b) < 1e-5, f"{name} {tail}"
    print("agrees with ModelOpt", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def check_no_token(tail: str) -> None:
    hs, ws, ht, wt = make_inputs(0)
    hs, weight = hs.requires_grad_(), own(ws).requires_grad_()
    labels = torch.zeros(0, dtype=torch.int64)
    out = fused_divergence(
        hs, weight, ht, own(wt), labels, make_loss("jsd", tail), 50, dist.group.WORLD
    )
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
        alone = fused_divergence(hs, ws, ht, wt, labels, loss, 50)
        out = fused_divergence(hs, own(ws), ht, own(wt), labels, loss, 50, dist.group.WORLD)
        torch.testing.assert_close(out.token_divergence, alone.token_divergence)


def check_group_of_one() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    labels, loss = torch.zeros(TOKENS, dtype=torch.int64), make_loss()
    alone = fused_divergence(*make_inputs(), labels, loss, 50)
    out = fused_divergence(*make_inputs(), labels, loss, 50, groups[dist.get_rank()])
    assert torch.equal(out.token_divergence, alone.token_divergence)


def check_junk_in_padding() -> None:
    hs, ws, ht, wt = make_inputs()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    for vocab, name, tail in product((50, 20), DIVERGENCES, TAILS):
        results = []
        for junk in (0.0, float("nan")):
            ws[vocab:], wt[vocab:] = junk, junk
            hidden, weight = hs.clone().requires_grad_(), own(ws).requires_grad_()
            loss = make_loss(name, tail)
            out = fused_divergence(
                hidden, weight, ht, own(wt), labels, loss, vocab, dist.group.WORLD
            )
            out.loss_sum.backward()
            results.append([out.token_divergence, hidden.grad, weight.grad, *out.metrics.values()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), (vocab, name, tail)


def check_token_nll() -> None:
    hs, ws, *_ = make_inputs()
    labels = torch.arange(TOKENS) * 2
    settings = {"temperature": 0.6, "vocab_size": 20, "chunk_size": 3}
    alone = token_nll(hs, ws, labels, **settings)
    sharded = token_nll(hs, own(ws), labels, **settings, group=dist.group.WORLD)
    torch.testing.assert_close(sharded, alone)
