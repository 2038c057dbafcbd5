"""What the fused divergence does not keep and does not compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_inputs import VOCAB, make_inputs, run
from oracles import DIVERGENCES, ESTIMATORS, TAILS, make_loss
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_trd.config.schema import Loss
from nemo_trd.loss import fused as losses
from nemo_trd.loss.divergences import logit_bytes
from nemo_trd.loss.fused import METRICS, fused_divergence

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", TAILS)
FLOAT = 4  # bytes
STATISTICS = len(METRICS) + 1  # per token


class Operations(TorchDispatchMode):
    """Notes which operations run, and the number of elements of the largest tensor they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out

    @property
    def matmuls(self) -> int:
        kinds = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "linear"}
        return sum(name.rstrip("_") in kinds for name in self.names)


def allocations(function: Callable[[], Any], directory: Path) -> tuple[int, int]:
    """Bytes from PyTorch's allocator while `function` runs: the most at a time, and those left
    when it is done and what it returns is still held. Buffers inside operations count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = function()
    trace = directory / "trace.json"
    profiler.export_chrome_trace(str(trace))
    del held
    now = most = 0
    events = json.loads(trace.read_text())["traceEvents"]
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most, now


@every_divergence
@every_tail
@pytest.mark.parametrize("clip", [None, 0.01])
def test_no_tensor_is_larger_than_a_chunk_of_logits(
    name: str, tail: str, clip: float | None
) -> None:
    inputs = make_inputs(150)
    with Operations() as seen:
        run(inputs, make_loss(name, tail, entry_clip=clip, chunk_size=33))
    assert seen.largest == 33 * VOCAB


@every_divergence
@every_tail
def test_twice_the_tokens_add_no_more_than_hidden_states_and_their_gradient(
    name: str, tail: str, tmp_path: Path
) -> None:
    n, loss = 120, make_loss(name, tail, chunk_size=20)

    def peak(tokens: int) -> int:
        inputs = make_inputs(tokens)
        return allocations(lambda: run(inputs, loss), tmp_path)[0]

    size = make_inputs().student_hidden.shape[1]
    peak(n)  # what is allocated once and for all
    added = peak(2 * n) - peak(n)
    assert 0 < added <= n * (size + STATISTICS) * FLOAT  # beside the hidden states themselves
    assert n * VOCAB * FLOAT > 2 * added  # what logits of all tokens would add


@every_divergence
@every_tail
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_of_a_chunk_takes_28_to_33_bytes(
    name: str, tail: str, temperature: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of student and teacher together, and of all that is computed from it."""
    loss = make_loss(name, tail, temperature=temperature)
    # The top k and the statistics are what is beyond 33.
    assert 28 <= bytes_per_logit(loss, dtype, tmp_path) < 33.1


@pytest.mark.parametrize("name", [*DIVERGENCES, *ESTIMATORS])
def test_so_it_does_with_a_clip_of_entries_and_for_estimates(name: str, tmp_path: Path) -> None:
    loss = make_loss(name, entry_clip=0.01 if name in DIVERGENCES else None)
    counted = logit_bytes(loss)
    assert counted - 1 <= bytes_per_logit(loss, torch.float32, tmp_path) < counted + 0.1


def bytes_per_logit(loss: Loss, dtype: torch.dtype, directory: Path) -> float:
    vocab, chunk = 1000, 20

    def peak(chunk_size: int) -> int:
        inputs = make_inputs(2 * chunk, dtype, vocab=vocab, padded=vocab)
        chunked = loss.model_copy(update={"chunk_size": chunk_size})
        return allocations(lambda: run(inputs, chunked, vocab=vocab), directory)[0]

    peak(chunk)
    return (peak(2 * chunk) - peak(chunk)) / (chunk * vocab)


@every_divergence
@every_tail
def test_between_forward_and_backward_there_are_gradients_and_no_logits(
    name: str, tail: str, tmp_path: Path
) -> None:
    inputs, loss = make_inputs(120), make_loss(name, tail, chunk_size=20)

    def forward() -> Any:
        return fused_divergence(*inputs, loss, VOCAB)

    allocations(forward, tmp_path)
    left = allocations(forward, tmp_path)[1]
    gradients = inputs.student_hidden.numel() + inputs.student_weight.numel()
    scalars = 2 * STATISTICS
    assert left <= (gradients + 120 * STATISTICS + scalars) * FLOAT


def test_a_gradient_that_is_added_at_once_needs_no_buffer(tmp_path: Path) -> None:
    inputs, loss = make_inputs(padded=4096), make_loss(chunk_size=5)
    buffer = torch.zeros(inputs.student_weight.shape)

    def peak(**options: Any) -> int:
        def step() -> None:
            fused_divergence(*inputs, loss, VOCAB, **options).loss_sum.backward()
            inputs.student_weight.grad = None

        step()
        return allocations(step, tmp_path)[0]

    assert peak() - peak(weight_gradient=buffer) >= buffer.nbytes


@every_divergence
@every_tail
def test_a_chunk_takes_two_matmuls_for_its_logits_and_two_for_the_gradients(
    name: str, tail: str
) -> None:
    """So all metrics come without one of their own."""
    inputs, loss = make_inputs(12), make_loss(name, tail, chunk_size=4, token_clip=1.0)
    with Operations() as seen:
        out = run(inputs, loss)
    assert set(out.metrics) == set(METRICS)
    assert seen.matmuls == 3 * 4
    with Operations() as seen, torch.no_grad():
        fused_divergence(*inputs, loss, VOCAB)
    assert seen.matmuls == 3 * 2


def test_no_gradient_work_is_done_for_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, loss = make_inputs(), make_loss()
    full = run(inputs, loss)
    monkeypatch.setattr(losses, "_add_outer", lambda *_: pytest.fail("formed a gradient"))
    with torch.no_grad():
        out = fused_divergence(*inputs, loss, VOCAB)
    assert torch.equal(out.loss_sum, full.loss_sum) and not out.loss_sum.requires_grad
    frozen = inputs._replace(student_weight=inputs.student_weight.detach())
    gradient = inputs.student_hidden.grad
    run(frozen, loss)
    assert torch.equal(frozen.student_hidden.grad, gradient)
    fixed = frozen._replace(student_hidden=inputs.student_hidden.detach())
    assert not fused_divergence(*fixed, loss, VOCAB).loss_sum.requires_grad


def test_gradients_are_handed_out_once() -> None:
    inputs = make_inputs()
    loss_sum = fused_divergence(*inputs, make_loss(), VOCAB).loss_sum
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss_sum.backward()
