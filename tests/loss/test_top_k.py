"""A teacher of which only the top k is known: the loss is that of the same top k of its logits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from loss_inputs import VOCAB, Inputs, distance, make_inputs, reference, run
from oracles import DIVERGENCES, ESTIMATORS, make_loss

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Loss
from nemo_trd.loss.fused import DivergenceOutput, divergence_from_top_k, top_k_of
from nemo_trd.loss.top_k import TopK


def known_of(inputs: Inputs, k: int) -> TopK:
    """What a server would say: of the dense teacher's logits, in float64."""
    logits = inputs.teacher_hidden.double() @ inputs.teacher_weight.double()[:VOCAB].t()
    log_probs = logits.log_softmax(-1)
    top = log_probs.sort(dim=-1, descending=True, stable=True)
    labels = log_probs.gather(-1, inputs.labels[:, None])[:, 0]
    return TopK(top.indices[:, :k], top.values[:, :k].float(), labels.float())


def run_known(inputs: Inputs, teacher: TopK, loss: Loss, upstream: float = 0.5) -> DivergenceOutput:
    for x in inputs[:2]:
        x.grad = None
    out = divergence_from_top_k(*inputs[:2], teacher, inputs.labels, loss, VOCAB)
    (upstream * out.loss_sum).backward()
    return out


@pytest.mark.parametrize(("clip", "entry_clip"), [(None, None), (3.0, None), (None, 0.1)])
@pytest.mark.parametrize(("name", "tail"), list(product(DIVERGENCES, ("bucket", "renormalize"))))
def test_values_and_gradients_are_those_of_float64_autograd_and_of_the_dense_teachers_top_k(
    name: str, tail: str, clip: float | None, entry_clip: float | None
) -> None:
    inputs = make_inputs()
    loss = make_loss(name, tail, token_clip=clip, entry_clip=entry_clip)
    dense = run(inputs, loss)
    dense_gradients = [x.grad for x in inputs[:2]]
    out = run_known(inputs, known_of(inputs, 7), loss)
    value, *exact = reference(inputs, loss)
    assert distance(out.loss_sum.detach(), value.sum()) < 1e-6
    torch.testing.assert_close(out.token_divergence, dense.token_divergence, rtol=1e-5, atol=1e-6)
    for x, dense_gradient, gradient in zip(inputs[:2], dense_gradients, exact, strict=True):
        assert distance(x.grad, gradient) < 1e-6
        assert distance(x.grad, dense_gradient) < 1e-6
    # The entropy of the whole distribution is all that is not known.
    assert set(dense.metrics) - set(out.metrics) == {"teacher_entropy"}
    for key, metric in out.metrics.items():
        torch.testing.assert_close(metric, dense.metrics[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_need_the_labels_log_probability_alone(name: str) -> None:
    inputs, loss = make_inputs(), make_loss(name)
    dense = run(inputs, loss)
    gradients = [x.grad for x in inputs[:2]]
    out = run_known(inputs, known_of(inputs, 1), loss)
    torch.testing.assert_close(out.token_divergence, dense.token_divergence, rtol=1e-5, atol=1e-6)
    for x, expected in zip(inputs[:2], gradients, strict=True):
        assert distance(x.grad, expected) < 1e-6
    for key, metric in out.metrics.items():
        torch.testing.assert_close(metric, dense.metrics[key], rtol=1e-5, atol=1e-6, msg=key)


def test_a_top_k_of_the_whole_vocabulary_is_the_full_divergence() -> None:
    inputs = make_inputs()
    full = run(inputs, make_loss(top_k=None))
    out = run_known(inputs, known_of(inputs, VOCAB), make_loss(top_k=VOCAB))
    torch.testing.assert_close(out.loss_sum, full.loss_sum)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_is_sure_leaves_values_and_gradients_finite(name: str) -> None:
    """The sum of its k probabilities is rounded to 1, or above it."""
    inputs = make_inputs()
    teacher = known_of(inputs, 7)
    log_probs = torch.full_like(teacher.log_probs, -40)
    log_probs[:, 0] = torch.tensor([0.0, 1e-7]).repeat(5)
    sure = TopK(teacher.ids, log_probs, teacher.label_log_probs)
    out = run_known(inputs, sure, make_loss(name, "bucket"))
    assert torch.isfinite(out.token_divergence).all()
    assert (out.token_divergence > 0).all()
    assert torch.isfinite(inputs.student_hidden.grad).all()
    assert out.metrics["teacher_tail_mass"] / out.count < 2e-7


def test_no_label_contributes_an_exact_zero() -> None:
    inputs = make_inputs(0)
    out = run_known(inputs, known_of(inputs, 7), make_loss(tail="bucket"))
    assert out.loss_sum == 0 and out.count == 0
    assert torch.equal(inputs.student_weight.grad, torch.zeros_like(inputs.student_weight))


def test_an_id_that_pads_the_teachers_vocabulary_is_refused() -> None:
    inputs = make_inputs()
    teacher = known_of(inputs, 7)
    teacher.ids[3, 6] = VOCAB
    with pytest.raises(ConfigError, match=f"top-k ids .* = {VOCAB}: .*lower loss.top_k"):
        run_known(inputs, teacher, make_loss(tail="bucket"))


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_top_k_of_hidden_states_is_that_of_their_float64_logits(chunk: int) -> None:
    inputs = make_inputs()
    expected = known_of(inputs, 7)
    hidden, weight = inputs.teacher_hidden, inputs.teacher_weight
    found = top_k_of(hidden, weight, inputs.labels, 7, vocab_size=VOCAB, chunk_size=chunk)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.label_log_probs, expected.label_log_probs, rtol=1e-5, atol=1e-5
    )
