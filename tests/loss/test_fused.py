"""The fused divergence on one process: values, gradients, metrics and hard inputs."""

from __future__ import annotations

import math
from typing import get_args

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_inputs import PADDED, VOCAB, Inputs, as_inputs, distance, make_inputs, reference, run
from oracles import DIVERGENCES, ESTIMATORS, TAILS, make_loss

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import DivergenceName, EstimatorName, FullDivergenceName
from nemo_trd.loss import divergences, formulas
from nemo_trd.loss import fused as losses
from nemo_trd.loss.formulas import dense_divergence
from nemo_trd.loss.fused import fused_divergence, token_nll

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", TAILS)


@every_divergence
@every_tail
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 64])
def test_value_and_gradients_are_those_of_float64_dense_autograd(
    name: str, tail: str, temperature: float, chunk_size: int
) -> None:
    loss = make_loss(name, tail, temperature=temperature, chunk_size=chunk_size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        inputs = make_inputs(dtype=dtype)
        out = run(inputs, loss)
        value, d_hidden, d_weight = reference(inputs, loss)
        torch.testing.assert_close(
            out.token_divergence.double(), value, rtol=tolerance, atol=tolerance * 0.01
        )
        assert out.loss_sum.item() == pytest.approx(value.sum().item(), rel=tolerance)
        assert distance(inputs.student_hidden.grad, d_hidden) < tolerance
        assert distance(inputs.student_weight.grad, d_weight) < tolerance
        assert out.count == len(inputs.labels)


@every_divergence
@every_tail
def test_gradient_is_the_slope_of_the_value(name: str, tail: str) -> None:
    """Central differences in float64: no autograd on either side."""
    inputs, loss = make_inputs(3, torch.float64), make_loss(name, tail, temperature=1.3)
    run(inputs, loss, upstream=1)
    generator = torch.Generator().manual_seed(0)
    for x in inputs[:2]:
        assert x.grad is not None
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                x.add_(direction, alpha=step)
                values.append(fused_divergence(*inputs, loss, VOCAB).loss_sum.item())
                x.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((x.grad * direction).sum().item(), rel=1e-6)


@every_divergence
@every_tail
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_bf16_is_no_worse_than_dense_bf16_with_fp32_softmax(
    name: str, tail: str, chunk_size: int
) -> None:
    inputs, loss = make_inputs(64, torch.bfloat16), make_loss(name, tail, chunk_size=chunk_size)
    out = run(inputs, loss)
    exact = reference(inputs, loss)
    dense = reference(inputs, loss, dtype=torch.bfloat16)
    ours = (out.token_divergence, inputs.student_hidden.grad, inputs.student_weight.grad)
    assert inputs.student_hidden.grad.dtype == inputs.student_weight.grad.dtype == torch.bfloat16
    for mine, theirs, true in zip(ours, dense, exact, strict=True):
        assert distance(mine, true) <= 1.02 * distance(theirs, true)


@every_divergence
def test_dense_reference_is_the_definition(name: str) -> None:
    student, teacher = torch.randn(2, 10, VOCAB, dtype=torch.float64)
    value = dense_divergence(student, teacher, make_loss(name))
    torch.testing.assert_close(value, oracles.by_definition(student, teacher, name))


@every_divergence
def test_value_and_gradient_are_those_of_trl(name: str) -> None:
    oracles.need(oracles.TRL)
    student, teacher = torch.randn(2, 10, VOCAB, dtype=torch.float64)
    inputs, loss = as_inputs(student, teacher), make_loss(name, temperature=1.7)
    out = run(inputs, loss, upstream=1)
    student.requires_grad_()
    theirs = oracles.trl(student, teacher, loss)
    theirs.backward()
    torch.testing.assert_close(out.loss_sum, theirs)
    torch.testing.assert_close(inputs.student_hidden.grad, student.grad)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", ["full", "renormalize"])
def test_value_and_gradient_are_those_of_modelopt(name: str, tail: str) -> None:
    oracles.need(oracles.MODELOPT)
    student, teacher = torch.randn(2, 10, VOCAB)  # it has no float64
    inputs, loss = as_inputs(student, teacher), make_loss(name, tail, temperature=1.7)
    out = run(inputs, loss, upstream=1)
    student.requires_grad_()
    theirs = oracles.modelopt(student, teacher, loss)
    theirs.sum().backward()
    torch.testing.assert_close(out.token_divergence, theirs.detach())
    assert distance(inputs.student_hidden.grad, student.grad) < 1e-5


@every_tail
def test_jsd_ends_are_forward_and_reverse_kl(tail: str) -> None:
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        inputs = make_inputs()
        results = []
        for loss in (make_loss(name, tail), make_loss("jsd", tail, beta=beta)):
            value = run(inputs, loss).loss_sum
            results.append((value, inputs.student_hidden.grad, inputs.student_weight.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@every_divergence
@every_tail
def test_equal_models_have_no_divergence_and_no_gradient(name: str, tail: str) -> None:
    student_hidden, student_weight, *_, labels = make_inputs()
    same = Inputs(
        student_hidden, student_weight, student_hidden.detach(), student_weight.detach(), labels
    )
    out = run(same, make_loss(name, tail))
    assert out.token_divergence.abs().max() < 1e-7
    assert same.student_hidden.grad.abs().max() < 1e-6
    assert same.student_weight.grad.abs().max() < 1e-6
    assert out.metrics["top1_agreement"] == out.count


@given(
    st.sampled_from(list(DIVERGENCES)),
    st.sampled_from(list(TAILS)),
    st.floats(-6, 2),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 10**6),
)
def test_divergences_are_never_negative(
    name: str, tail: str, exponent: float, temperature: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(4, 6, generator=g), torch.randn(PADDED, 6, generator=g) * 2
    other = hidden + 10**exponent * torch.randn(4, 6, generator=g)
    labels = torch.zeros(4, dtype=torch.int64)
    loss = make_loss(name, tail, temperature=temperature)
    out = fused_divergence(hidden, weight, other, weight, labels, loss, VOCAB)
    assert (out.token_divergence >= -2e-7).all()


@every_divergence
@every_tail
def test_tiny_divergences_do_not_drown_in_the_rounding_of_normalisers(name: str, tail: str) -> None:
    g = torch.Generator().manual_seed(0)
    student = 12 * torch.randn(20, VOCAB, generator=g)
    teacher = student + 1e-3 * torch.randn(20, VOCAB, generator=g)
    loss = make_loss(name, tail)
    value = run(as_inputs(student, teacher), loss).token_divergence
    exact = dense_divergence(student.double(), teacher.double(), loss)
    assert (value - exact).abs().max() < 7e-8  # the last bit of a probability near 1


@given(st.sampled_from(list(DIVERGENCES)), st.integers(1, VOCAB + 5), st.integers(0, 10**6))
def test_bucket_is_a_lower_bound_of_the_full_divergence(name: str, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    inputs = Inputs(
        torch.randn(4, 8, generator=g),
        torch.randn(PADDED, 8, generator=g),
        torch.randn(4, 6, generator=g),
        torch.randn(PADDED, 6, generator=g),
        torch.zeros(4, dtype=torch.int64),
    )
    bucket = fused_divergence(*inputs, make_loss(name, "bucket", top_k=k), VOCAB).token_divergence
    full = fused_divergence(*inputs, make_loss(name), VOCAB).token_divergence
    assert (bucket <= full * (1 + 1e-5) + 1e-6).all()
    if k >= VOCAB:
        assert torch.equal(bucket, full)


@every_divergence
@pytest.mark.parametrize("tail", ["full", "bucket"])
@pytest.mark.parametrize("missing", [1e-7, 1e-12, 1e-30])
def test_peaked_teachers_keep_value_and_gradient(name: str, tail: str, missing: float) -> None:
    """One id has probability 1 - missing; the student still finds it unlikely, or agrees."""
    teacher = torch.full((2, VOCAB), math.log(missing / (VOCAB - 1)))
    teacher[:, 3] = 0
    student = torch.stack([torch.linspace(-4, 4, VOCAB), teacher[0] * 0.9])
    inputs = as_inputs(student, teacher)
    loss = make_loss(name, tail, **({"top_k": 1} if tail == "bucket" else {}))
    out = run(inputs, loss, upstream=1)
    value, d_hidden, _ = reference(inputs, loss, upstream=1)
    torch.testing.assert_close(out.token_divergence.double(), value, rtol=1e-5, atol=1e-7)
    # Here fp32 itself runs out of bits: s - t of an id that both find certain, and reverse KL
    # where log s - log t is nearly constant. Nobody does better there than dense fp32.
    _, dense, _ = reference(inputs, loss, upstream=1, dtype=torch.float32)
    gradient = inputs.student_hidden.grad
    for mine, theirs, true in zip(gradient, dense, d_hidden, strict=True):
        allowed = max(1e-5 * true.norm(), 3 * (theirs - true).norm(), torch.tensor(1.2e-7))
        assert (mine - true).norm() < allowed
    unlikely = torch.arange(VOCAB) != 3
    assert (gradient[0, unlikely] != 0).all() and gradient[0, 3] != 0


@every_divergence
@every_tail
@pytest.mark.parametrize("gap", [30.0, 90.0, 1e3, 1e4])
@pytest.mark.parametrize("surprised", ["student", "teacher"])
def test_no_clamp_kills_a_gradient(name: str, tail: str, gap: float, surprised: str) -> None:
    """One of the two finds the other's tokens exp(gap) times less likely than its own."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, VOCAB, generator=g)
    (student if surprised == "student" else teacher)[:, : VOCAB // 2] -= gap
    (teacher if surprised == "student" else student)[:, VOCAB // 2 :] -= gap
    inputs, loss = as_inputs(student, teacher), make_loss(name, tail)
    out = run(inputs, loss, upstream=1)
    value, d_hidden, _ = reference(inputs, loss, upstream=1)
    torch.testing.assert_close(out.token_divergence.double(), value, rtol=1e-5, atol=1e-6)
    _, dense, _ = reference(inputs, loss, upstream=1, dtype=torch.float32)  # has the same logits
    for mine, theirs, true in zip(inputs.student_hidden.grad, dense, d_hidden, strict=True):
        allowed = max(1e-5 * true.norm(), 3 * (theirs - true).norm(), torch.tensor(1.2e-7))
        assert (mine - true).norm() < allowed


@every_tail
def test_log_normalisers_are_fp32_whatever_the_weights(tail: str) -> None:
    """bf16 weights that give logits without rounding: all that is left is the loss's own error."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 2048, generator=g).bfloat16()
    loss = make_loss("jsd", tail, chunk_size=3)
    out = run(as_inputs(student, teacher), loss, vocab=2048)
    exact = dense_divergence(student.double(), teacher.double(), loss)
    nll = -student.double().log_softmax(-1)[:, 0].sum()
    assert out.token_divergence.dtype == torch.float32
    torch.testing.assert_close(out.token_divergence.double(), exact, rtol=1e-5, atol=1e-6)
    assert out.metrics["student_nll"].item() == pytest.approx(nll.item(), rel=1e-6)


@every_divergence
@every_tail
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_models_in_bf16_that_are_close_to_each_other_are_told_apart(
    name: str, tail: str, temperature: float
) -> None:
    """Logits of size 4 that differ by 0.03: as much as bf16 would round them by."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 64, generator=g).bfloat16()
    weight = torch.randn(600, 64, generator=g).div(2).bfloat16()
    other = (weight + 0.03 / 8 * torch.randn(600, 64, generator=g)).bfloat16()
    labels = torch.zeros(20, dtype=torch.int64)
    inputs = Inputs(hidden.clone(), weight.requires_grad_(), hidden, other, labels)
    inputs.student_hidden.requires_grad_()
    loss = make_loss(name, tail, temperature=temperature, chunk_size=12)
    value, d_hidden, d_weight = reference(inputs, loss, vocab=600)
    out = run(inputs, loss, vocab=600)
    assert distance(out.token_divergence, value) < 3e-4
    # The gradients themselves are bf16, 2^-9 at most from any number.
    assert distance(inputs.student_hidden.grad, d_hidden) < 4e-3
    assert distance(inputs.student_weight.grad, d_weight) < 4e-3


@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
@every_tail
@every_divergence
def test_junk_in_padding_rows_changes_nothing(junk: float, tail: str, name: str) -> None:
    loss = make_loss(name, tail)
    results = []
    for fill in (0.0, junk):
        inputs = make_inputs()
        with torch.no_grad():
            inputs.student_weight[VOCAB:] = fill
            inputs.teacher_weight[VOCAB:] = fill
        out = run(inputs, loss)
        assert (inputs.student_weight.grad[VOCAB:] == 0).all()
        results.append([out.loss_sum, *out.metrics.values(), *(x.grad for x in inputs[:2])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_student_and_teacher_may_be_padded_differently() -> None:
    inputs = make_inputs()
    longer = torch.cat([inputs.teacher_weight, torch.ones(64, 6)])
    loss = make_loss()
    a, b = (
        fused_divergence(*x, loss, VOCAB) for x in (inputs, inputs._replace(teacher_weight=longer))
    )
    assert torch.equal(a.token_divergence, b.token_divergence)


def test_one_token() -> None:
    inputs, loss = make_inputs(1), make_loss()
    out = run(inputs, loss)
    value, d_hidden, _ = reference(inputs, loss)
    assert out.loss_sum.item() == pytest.approx(value.item(), rel=1e-5)
    assert distance(inputs.student_hidden.grad, d_hidden) < 1e-5


@every_tail
def test_no_token_is_an_exact_zero_with_zero_gradients(tail: str) -> None:
    inputs = make_inputs(0)
    out = run(inputs, make_loss("jsd", tail, token_clip=0.1))
    assert out.loss_sum == 0 and out.count == 0
    assert set(out.metrics) == set(losses.METRICS)
    assert all(value == 0 for value in out.metrics.values())
    assert inputs.student_hidden.grad.shape == (0, 8)
    assert torch.equal(inputs.student_weight.grad, torch.zeros(PADDED, 8))


def test_a_batch_is_the_sum_of_its_parts() -> None:
    inputs, loss = make_inputs(), make_loss("reverse_kl")
    whole = run(inputs, loss)
    gradient = inputs.student_weight.grad
    parts = [
        inputs._replace(
            student_hidden=inputs.student_hidden.detach()[rows].requires_grad_(),
            teacher_hidden=inputs.teacher_hidden[rows],
            labels=inputs.labels[rows],
        )
        for rows in (slice(0, 3), slice(3, 3), slice(3, 10))
    ]
    inputs.student_weight.grad = None
    outs = [fused_divergence(*part, loss, VOCAB) for part in parts]
    for out in outs:
        (0.5 * out.loss_sum).backward()  # gradients accumulate, as over micro-batches
    assert sum(out.loss_sum.item() for out in outs) == pytest.approx(whole.loss_sum.item())
    assert distance(inputs.student_weight.grad, gradient) < 1e-6


def test_tied_embedding_gets_the_gradient_of_both_uses() -> None:
    inputs, loss = make_inputs(), make_loss(chunk_size=3)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        weight = inputs.student_weight.detach().to(dtype).requires_grad_()
        hidden = weight[inputs.labels].tanh()
        teacher = (inputs.teacher_hidden.to(dtype), inputs.teacher_weight.to(dtype))
        if dtype == torch.float32:
            fused_divergence(
                hidden, weight, *teacher, inputs.labels, loss, VOCAB
            ).loss_sum.backward()
        else:
            logits = (hidden @ weight[:VOCAB].t(), (teacher[0] @ teacher[1].t())[:, :VOCAB])
            dense_divergence(*logits, loss).sum().backward()
        gradients.append(weight.grad)
    assert distance(*gradients) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_added_at_once_is_what_autograd_hands_out(dtype: torch.dtype) -> None:
    inputs, loss = make_inputs(dtype=dtype), make_loss(temperature=1.7, chunk_size=3)
    run(inputs, loss, upstream=1.0)
    d_hidden, d_weight = inputs.student_hidden.grad, inputs.student_weight.grad
    inputs.student_hidden.grad = inputs.student_weight.grad = None
    added = torch.ones(d_weight.shape)
    fused_divergence(*inputs, loss, VOCAB, weight_gradient=added).loss_sum.backward()
    assert inputs.student_weight.grad is None
    assert torch.equal(inputs.student_hidden.grad, d_hidden)
    # The sum is in fp32; autograd's is rounded to the weight's dtype.
    torch.testing.assert_close((added - 1).to(dtype), d_weight, atol=1e-6, rtol=1e-2)
    with torch.no_grad():
        fused_divergence(*inputs, loss, VOCAB, weight_gradient=added)
    torch.testing.assert_close((added - 1).to(dtype), d_weight, atol=1e-6, rtol=1e-2)
    twice = 2 * fused_divergence(*inputs, loss, VOCAB, weight_gradient=added).loss_sum
    with pytest.raises(RuntimeError, match="gradient of a sum of divergences is not one"):
        twice.backward()


@every_divergence
def test_clip_caps_tokens_and_their_gradient(name: str) -> None:
    inputs = make_inputs()
    unclipped = run(inputs, make_loss(name)).token_divergence
    cap = unclipped.sort().values[4:6].mean().item()
    loss = make_loss(name, token_clip=cap, chunk_size=3)
    out = run(inputs, loss)
    value, d_hidden, d_weight = reference(inputs, loss)
    assert out.loss_sum.item() == pytest.approx(value.sum().item(), rel=1e-5)
    assert out.metrics["clipped"] == (unclipped > cap).sum() == 5
    torch.testing.assert_close(out.token_divergence, unclipped)
    assert (inputs.student_hidden.grad[unclipped > cap] == 0).all()
    assert distance(inputs.student_hidden.grad, d_hidden) < 1e-5
    assert distance(inputs.student_weight.grad, d_weight) < 1e-5


@every_divergence
@every_tail
@pytest.mark.parametrize("clip", [0.003, 0.05, 50.0])
def test_entries_are_clipped_as_float64_dense_autograd_does(
    name: str, tail: str, clip: float
) -> None:
    """Most of those that are positive, some, and none."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        inputs = make_inputs(dtype=dtype)
        plain = run(inputs, make_loss(name, tail, temperature=1.7))
        whole = plain.token_divergence, inputs.student_hidden.grad, inputs.student_weight.grad
        loss = make_loss(name, tail, temperature=1.7, entry_clip=clip)
        out = run(inputs, loss)
        value, d_hidden, d_weight = reference(inputs, loss)
        assert out.loss_sum.item() == pytest.approx(value.sum().item(), rel=tolerance)
        assert distance(inputs.student_hidden.grad, d_hidden) < tolerance
        assert distance(inputs.student_weight.grad, d_weight) < tolerance
        torch.testing.assert_close(out.token_divergence, whole[0])  # before the clip
        beyond = out.metrics["clipped_entries"] / out.count
        if clip == 50:
            assert beyond == 0
            assert distance(inputs.student_hidden.grad, whole[1]) < 1e-6
            assert distance(inputs.student_weight.grad, whole[2]) < 1e-6
        else:
            assert beyond > (0.5 if tail == "full" else 0.05)
            assert distance(inputs.student_hidden.grad, whole[1]) > 0.01


@every_divergence
def test_number_of_clipped_entries_is_counted(name: str) -> None:
    inputs, loss = make_inputs(), make_loss(name, entry_clip=0.01, token_clip=0.2)
    logits = [
        (hidden.double() @ weight.double()[:VOCAB].t()).log_softmax(-1)
        for hidden, weight in (inputs[:2], inputs[2:4])
    ]
    entries = formulas.DEFINITIONS[loss.divergence](*logits, loss)
    out = run(inputs, loss)
    assert out.metrics["clipped_entries"] == (entries > 0.01).sum() > 0
    limited = entries.clamp(max=0.01).sum(-1)  # the clip of tokens is that of what is left
    assert out.metrics["clipped"] == (limited > 0.2).sum()
    assert out.loss_sum.item() == pytest.approx(limited.clamp(max=0.2).sum().item(), rel=1e-5)


@every_divergence
def test_where_models_agree_the_clip_of_entries_leaves_no_gradient(name: str) -> None:
    student_hidden, student_weight, *_, labels = make_inputs()
    same = student_hidden.detach(), student_weight.detach()
    inputs = Inputs(student_hidden, student_weight, *same, labels)
    out = run(inputs, make_loss(name, entry_clip=0.05))
    assert out.token_divergence.abs().max() < 1e-7 and out.metrics["clipped_entries"] == 0
    assert inputs.student_hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("temperature", "clip"), [(1.0, None), (1.7, None), (1.0, 1.0)])
def test_estimates_and_their_gradients_are_those_of_float64_dense_autograd(
    name: str, temperature: float, clip: float | None
) -> None:
    loss = make_loss(name, temperature=temperature, token_clip=clip)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        inputs = make_inputs(dtype=dtype)
        out = run(inputs, loss)
        value, d_hidden, d_weight = reference(inputs, loss)
        assert out.loss_sum.item() == pytest.approx(value.sum().item(), rel=tolerance)
        assert distance(inputs.student_hidden.grad, d_hidden) < tolerance
        assert distance(inputs.student_weight.grad, d_weight) < tolerance
        assert (out.metrics["clipped"] > 0) == (clip is not None)


@pytest.mark.parametrize(("name", "followed"), [("k1", "reverse_kl"), ("k3", "forward_kl")])
def test_over_samples_of_the_student_estimates_have_the_mean_of_reverse_kl_and_a_known_slope(
    name: str, followed: str
) -> None:
    """Every token once, with the student's probability of it."""
    student, teacher = torch.randn(2, VOCAB, dtype=torch.float64)
    every_label = torch.arange(VOCAB)
    rows = as_inputs(student.expand(VOCAB, -1), teacher.expand(VOCAB, -1))
    rows = rows._replace(labels=every_label)
    estimates = run(rows, make_loss(name), upstream=1.0).token_divergence
    s = student.softmax(-1)
    one = as_inputs(student[None], teacher[None])
    exact = run(one, make_loss("reverse_kl")).token_divergence[0]
    torch.testing.assert_close(s @ estimates, exact)
    run(one, make_loss(followed), upstream=1.0)
    torch.testing.assert_close(s @ rows.student_hidden.grad, one.student_hidden.grad[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student_hidden", "teacher_hidden"])
@every_divergence
@every_tail
def test_non_finite_states_show_in_their_token(bad: float, side: str, name: str, tail: str) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        getattr(inputs, side)[6, 2] = bad
    out = run(inputs, make_loss(name, tail, token_clip=1.0, entry_clip=0.5))
    finite = out.token_divergence.isfinite()
    assert not finite[6] and finite.sum() == 9


@every_tail
def test_metrics_are_those_of_the_full_distributions(tail: str) -> None:
    inputs, temperature = make_inputs(), 1.7
    out = run(inputs, make_loss(tail=tail, temperature=temperature, chunk_size=3))
    hs, ws, ht, wt = (x.detach().double() for x in inputs[:4])
    z_s, z_t = hs @ ws[:VOCAB].t() / temperature, ht @ wt[:VOCAB].t() / temperature
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    nll = -torch.stack([log.gather(-1, inputs.labels[:, None])[:, 0] for log in (log_s, log_t)])
    torch.testing.assert_close(out.token_nll.double(), nll, rtol=1e-5, atol=1e-6)
    top = log_t.exp().sort(descending=True).values
    expected = {
        "divergence": out.token_divergence.sum(),
        "student_nll": nll[0].sum(),
        "teacher_nll": nll[1].sum(),
        "student_entropy": -(log_s.exp() * log_s).sum(),
        "teacher_entropy": -(log_t.exp() * log_t).sum(),
        "top1_agreement": (log_s.argmax(-1) == log_t.argmax(-1)).sum(),
        "clipped": 0,
        "clipped_entries": 0,
        "teacher_tail_mass": 0 if tail == "full" else top[:, 7:].sum(),
    }
    assert set(out.metrics) == set(expected)
    for key, value in expected.items():
        assert out.metrics[key].item() == pytest.approx(float(value), rel=1e-5), key
        assert not out.metrics[key].requires_grad


def test_equal_teacher_logits_enter_the_top_k_by_id() -> None:
    teacher = torch.zeros(2, VOCAB)
    teacher[0, [40, 10, 30]] = 2  # two above, then ties
    teacher[1, 7:] = 1
    inputs = as_inputs(torch.randn(2, VOCAB), teacher)
    loss = make_loss("forward_kl", "renormalize", top_k=5)
    run(inputs, loss)
    support = [set(row.nonzero()[:, 0].tolist()) for row in inputs.student_hidden.grad]
    assert support == [{40, 10, 30, 0, 1}, {7, 8, 9, 10, 11}]


def test_label_outside_the_vocabulary_is_refused() -> None:
    for label in (-1, VOCAB):
        inputs = make_inputs()
        inputs.labels[4] = label
        with pytest.raises(ConfigError, match=f"labels = {label}.*vocabulary of {VOCAB}"):
            fused_divergence(*inputs, make_loss(), VOCAB)


@pytest.mark.parametrize("n", [0, 1, 10])
def test_token_nll_is_cross_entropy(n: int) -> None:
    hidden, weight, *_, labels = make_inputs(n)
    nll = token_nll(hidden, weight, labels, temperature=0.6, vocab_size=VOCAB, chunk_size=3)
    logits = hidden.double() @ weight.double()[:VOCAB].t() / 0.6
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert not nll.requires_grad


def test_chunk_size_follows_device_and_shard_of_the_vocabulary() -> None:
    loss = make_loss(chunk_size=None)
    assert divergences.chunk_size(loss, 151_936, on_gpu=False) == 256
    on_gpu = {
        rows: divergences.chunk_size(loss, rows, on_gpu=True) for rows in (16_032, 151_936, 10**6)
    }
    assert on_gpu == {16_032: 2048, 151_936: 2**32 // (28 * 151_936), 10**6: 256}
    assert divergences.chunk_size(make_loss("jsd", chunk_size=None), 151_936, on_gpu=True) < 900
    assert divergences.chunk_size(make_loss(chunk_size=5), 151_936, on_gpu=True) == 5


def test_every_divergence_has_a_record_and_both_formulas() -> None:
    assert set(get_args(DivergenceName)) == divergences.DIVERGENCES.keys()
    full, estimators = set(get_args(FullDivergenceName)), set(get_args(EstimatorName))
    assert full == formulas.CLOSED_FORMS.keys() == formulas.DEFINITIONS.keys()
    assert estimators == formulas.ESTIMATORS.keys() == formulas.ESTIMATES.keys()
