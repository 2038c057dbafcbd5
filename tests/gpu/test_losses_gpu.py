"""The fused divergence on CUDA, against dense float64 on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from loss_inputs import VOCAB, Inputs, distance, make_inputs, reference, run
from oracles import DIVERGENCES, TAILS, make_loss

from nemo_trd.loss.fused import fused_divergence

pytestmark = pytest.mark.gpu
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", TAILS)


def on(device: str, inputs: Inputs) -> Inputs:
    moved = [x.detach().to(device) for x in inputs]
    return Inputs(moved[0].requires_grad_(), moved[1].requires_grad_(), *moved[2:])


@pytest.fixture(autouse=True)
def exact_matmuls() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@every_divergence
@every_tail
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk_size", [4, 5, 64])
def test_fp32_is_float64_dense_autograd(
    name: str, tail: str, temperature: float, chunk_size: int
) -> None:
    loss = make_loss(name, tail, temperature=temperature, chunk_size=chunk_size)
    inputs = make_inputs()
    value, d_hidden, d_weight = reference(inputs, loss)
    there = on("cuda", inputs)
    out = run(there, loss)
    assert distance(out.token_divergence.cpu(), value) < 1e-5
    assert distance(there.student_hidden.grad.cpu(), d_hidden) < 1e-5
    assert distance(there.student_weight.grad.cpu(), d_weight) < 1e-5


@every_divergence
@every_tail
def test_bf16_is_no_worse_than_dense_bf16_with_fp32_softmax(name: str, tail: str) -> None:
    loss = make_loss(name, tail, chunk_size=8)
    inputs = make_inputs(64, torch.bfloat16)
    exact = reference(inputs, loss)
    there = on("cuda", inputs)
    dense = reference(there, loss, dtype=torch.bfloat16)
    out = run(there, loss)
    ours = out.token_divergence, there.student_hidden.grad, there.student_weight.grad
    for mine, theirs, true in zip(ours, dense, exact, strict=True):
        assert distance(mine.cpu(), true) <= 1.02 * distance(theirs.cpu(), true)


def test_memory_does_not_grow_with_the_logits_of_all_tokens() -> None:
    loss = make_loss(chunk_size=64)

    def peak(tokens: int) -> int:
        inputs = on("cuda", make_inputs(tokens, vocab=30_000, padded=30_016))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs, loss, vocab=30_000)
        return torch.cuda.max_memory_allocated() - before

    peak(256)
    assert peak(2048) - peak(1024) < 1024 * 30_000 * 4 / 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_over_nccl_are_float64_dense_autograd() -> None:
    torch.multiprocessing.spawn(_one_of_two, nprocs=2)


def _one_of_two(rank: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    group = dist.group.WORLD
    for name in DIVERGENCES:
        for tail in TAILS:
            inputs, loss = make_inputs(), make_loss(name, tail, temperature=1.7)
            value, d_hidden, d_weight = reference(inputs, loss, upstream=1)
            there = on("cuda", inputs)
            weight = there.student_weight.detach().chunk(2)[rank].clone().requires_grad_()
            shard = there._replace(
                student_weight=weight, teacher_weight=there.teacher_weight.chunk(2)[rank]
            )
            out = fused_divergence(*shard, loss, VOCAB, group)
            out.loss_sum.backward()
            dist.all_reduce(there.student_hidden.grad)
            assert distance(out.token_divergence.cpu(), value) < 1e-5
            assert distance(there.student_hidden.grad.cpu(), d_hidden) < 1e-5
            own = d_weight.chunk(2)[rank]
            assert (weight.grad.cpu() - own).norm() < 1e-5 * d_weight.norm()
    dist.destroy_process_group()
