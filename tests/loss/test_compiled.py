"""The comparison as a GPU runs it: compiled, here for the CPU, against float64 dense PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from launch import launch
from loss_inputs import VOCAB, Inputs, distance, make_inputs, reference, run
from oracles import DIVERGENCES, ESTIMATORS, make_loss

from nemo_trd.config.schema import Loss
from nemo_trd.loss import comparison
from nemo_trd.loss.fused import divergence_from_top_k, fused_divergence, top_k_of

CHUNK = 4  # of 10 labels: the last chunk has another number of positions
TRACED = partial(torch.compile, backend="eager")  # one graph, but no kernels: these take long


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every comparison is compiled; a second time, for another number of positions, is refused."""
    monkeypatch.setattr(comparison, "_in_blocks", comparison._compiled)
    with torch._dynamo.config.patch(recompile_limit=1):
        yield
    comparison._own_code.cache_clear()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_kernels_of_inductor_give_value_and_gradients(name: str, compiled: None) -> None:
    check(make_inputs(), make_loss(name, temperature=1.7, token_clip=2.0, chunk_size=CHUNK))


def test_kernels_of_inductor_clip_entries(compiled: None) -> None:
    check(make_inputs(), make_loss("forward_kl", entry_clip=0.05, chunk_size=CHUNK))


@pytest.mark.parametrize("name", ["k1", "k3", "reverse_kl", "jsd"])
def test_estimates_and_clips_of_entries_are_one_graph(
    name: str, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", TRACED)
    clip = None if name in ESTIMATORS else 0.05
    check(make_inputs(), make_loss(name, entry_clip=clip, chunk_size=CHUNK))


def test_top_k_is_one_graph(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", TRACED)
    check(make_inputs(), make_loss("forward_kl", "bucket", chunk_size=CHUNK))


def test_a_teacher_known_by_its_top_k_is_one_graph(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", TRACED)
    inputs, loss = make_inputs(), make_loss("forward_kl", "bucket", chunk_size=CHUNK)
    teacher = top_k_of(*inputs[2:], 7, vocab_size=VOCAB, chunk_size=CHUNK)
    out = divergence_from_top_k(*inputs[:2], teacher, inputs.labels, loss, VOCAB)
    assert distance(out.token_divergence, reference(inputs, loss)[0]) < 1e-5


@pytest.mark.distributed
def test_a_sharded_vocabulary_is_one_graph_with_its_exchanges() -> None:
    assert launch(2, check_sharded, timeout=400).count("agrees") == 2


def check(inputs: Inputs, loss: Loss) -> None:
    out = run(inputs, loss)
    value, d_hidden, d_weight = reference(inputs, loss)
    assert out.loss_sum.item() == pytest.approx(value.sum().item(), rel=1e-5)
    assert distance(inputs.student_hidden.grad, d_hidden) < 1e-5
    assert distance(inputs.student_weight.grad, d_weight) < 1e-5


def check_sharded() -> None:
    """On each rank. The last one has padding."""
    dist.init_process_group("gloo")
    torch.compile = TRACED  # type: ignore[assignment]
    comparison._in_blocks = comparison._compiled
    inputs, loss = make_inputs(), make_loss("jsd", temperature=1.7, chunk_size=CHUNK)

    def own(x: torch.Tensor) -> torch.Tensor:
        return x.detach().chunk(2)[dist.get_rank()].clone()

    hidden = inputs.student_hidden.detach().clone().requires_grad_()
    weight = own(inputs.student_weight).requires_grad_()
    teacher = inputs.teacher_hidden, own(inputs.teacher_weight)
    group = dist.group.WORLD
    with torch._dynamo.config.patch(recompile_limit=1):
        out = fused_divergence(hidden, weight, *teacher, inputs.labels, loss, VOCAB, group)
    (0.5 * out.loss_sum).backward()
    dist.all_reduce(hidden.grad)
    value, d_hidden, d_weight = reference(inputs, loss)
    assert distance(out.token_divergence, value) < 1e-5
    assert distance(hidden.grad, d_hidden) < 1e-5
    assert distance(weight.grad, own(d_weight)) < 1e-5
    print("agrees", flush=True)
    dist.destroy_process_group()
