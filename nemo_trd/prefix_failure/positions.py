"""Figures of student and teacher at every label of a trajectory.

No more than `loss.chunk_size` positions have logits at one time, a few copies of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nemo_trd.algorithm.trajectories import sequence_lengths
from nemo_trd.config.schema import Loss
from nemo_trd.data.types import TokenIds
from nemo_trd.loss.divergences import chunk_size
from nemo_trd.loss.formulas import closed_form
from nemo_trd.loss.logits import logits_of
from nemo_trd.prefix_failure.answers import Answer
from nemo_trd.records.prefix_failure import DIVERGENCES

TWO_PEAKS = 0.1  # of both choices the teacher must think at least so much to be of two minds
# Of each label, in nats or probabilities, everything at the loss's temperature.
FIGURES = (
    "teacher_entropy",
    "student_entropy",
    "teacher_nll",  # of the label
    "student_nll",
    "top2_gap",  # probability of the teacher's most likely token over that of its second
    *DIVERGENCES,
    *(f"{name}_gradient" for name in DIVERGENCES),  # norm of d divergence / d student logits
    *(f"{name}_hidden_gradient" for name in DIVERGENCES),  # norm of d divergence / d student hidden
    # Of the teacher, where the answer has a choice; not a number elsewhere.
    "go_on",
    "turn_back",
    "other",
    "split_entropy",  # of these three
    "two_peaked",  # 1 where both choices have at least `TWO_PEAKS`
    "student_go_on",
    "student_turn_back",
)
_CHOICE_FIGURES = 7


@torch.inference_mode()
def measure(
    student: Any,
    teacher: Any,
    answers: Sequence[Answer],
    loss: Loss,
    vocab_size: int,
    max_tokens: int,
    progress: bool,
) -> list[np.ndarray]:
    """[labels, len(FIGURES)] for every answer, over the full vocabulary.

    Args:
        student, teacher: Hugging Face models.
        loss: `beta` of the JSD, temperature and chunk size. Top-k and clips play no part.
        max_tokens: of one batch, padding included; a longer trajectory is a batch of its own.

    Raises:
        FloatingPointError: a model's logits are not finite.
    """
    figures_of: list[np.ndarray] = [np.empty(0)] * len(answers)
    total = sum(len(answer.trajectory.labels) for answer in answers)
    with tqdm(total=total, unit="tok", desc="positions", disable=not progress) as bar:
        for batch in _batches(answers, max_tokens):
            trajectories = [answers[i].trajectory for i in batch]
            hidden_s = _hidden(student, [(t.student_context, t.labels) for t in trajectories])
            hidden_t = _hidden(teacher, [(t.teacher_context, t.labels) for t in trajectories])
            label_ids = torch.tensor([token for t in trajectories for token in t.labels])
            weight_s, weight_t = (
                model.get_output_embeddings().weight[:vocab_size] for model in (student, teacher)
            )
            choices = torch.cat([_choice_ids(answers[i]) for i in batch])
            rows, longest = [], chunk_size(loss, len(weight_s), weight_s.is_cuda)
            for start in range(0, len(choices), longest):
                chunk = slice(start, start + longest)
                log_s = _log_probs(hidden_s[chunk], weight_s, loss)
                log_t = _log_probs(hidden_t[chunk], weight_t, loss)
                labels = label_ids[chunk]
                rows.append(_figures(log_s, log_t, labels, choices[chunk], weight_s, loss))
                bar.update(len(labels))
            lengths = [len(answers[i].trajectory.labels) for i in batch]
            figures = np.concatenate(rows)
            if not np.isfinite(figures[:, :-_CHOICE_FIGURES]).all():
                names = ", ".join(answers[i].trajectory.name for i in batch)
                raise FloatingPointError(f"logits or figures are not finite, in one of: {names}")
            parts = np.split(figures, np.cumsum(lengths)[:-1])
            for i, part in zip(batch, parts, strict=True):
                figures_of[i] = part
    return figures_of


def _batches(answers: Sequence[Answer], max_tokens: int) -> Iterator[list[int]]:
    """Positions of answers, the longest first, so that little is padded."""
    lengths = [max(sequence_lengths(answer.trajectory)) for answer in answers]
    batch: list[int] = []
    for i in sorted(range(len(answers)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _hidden(model: Any, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> Tensor:
    """[labels, H]: final hidden states that predict the labels of (context, labels) pairs.

    A sequence is a row, and padding to its right changes nothing.
    """
    rows = [torch.tensor((*context, *labels[:-1])) for context, labels in sequences]
    tokens = pad_sequence(rows, batch_first=True).to(model.device)
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    chosen = [
        row[len(context) - 1 :][: len(labels)]
        for row, (context, labels) in zip(hidden, sequences, strict=True)
    ]
    return torch.cat(chosen).to(model.get_output_embeddings().weight.device)


def _choice_ids(answer: Answer) -> Tensor:
    """int64 [labels, 2]: ids of (go on, turn back), -1 where there is no choice."""
    ids = torch.full((len(answer.trajectory.labels), 2), -1)
    for position, choice in answer.choices.items():
        ids[position] = torch.tensor(choice)
    return ids


def _figures(
    log_s: Tensor, log_t: Tensor, labels: Tensor, choices: Tensor, weight_s: Tensor, loss: Loss
) -> np.ndarray:
    """[n, len(FIGURES)] from log-probabilities [n, V] of student and teacher.

    The gradient in a logit is the closed form's; that in the student's hidden state is it times
    the student's output weight.
    """
    log_t, choices = log_t.to(log_s.device), choices.to(log_s.device)
    labels = labels.to(log_s.device)[:, None]
    s, t = log_s.exp(), log_t.exp()
    top = t.topk(2).values
    columns = {
        "teacher_entropy": torch.special.entr(t).sum(-1),
        "student_entropy": torch.special.entr(s).sum(-1),
        "teacher_nll": -log_t.gather(-1, labels)[:, 0],
        "student_nll": -log_s.gather(-1, labels)[:, 0],
        "top2_gap": top[:, 0] - top[:, 1],
    }
    for name in DIVERGENCES:
        formula = closed_form(loss.model_copy(update={"divergence": name, "entry_clip": None}))
        inputs = (log_s.clone(), log_t.clone(), s.clone(), t.clone())
        compared = formula(*inputs, lambda *sums: sums)
        columns[name] = compared.value
        gradient = compared.gradient.div_(loss.temperature)  # from tempered logits to logits
        columns[f"{name}_gradient"] = _norm(gradient)
        columns[f"{name}_hidden_gradient"] = _norm(gradient.to(weight_s.dtype) @ weight_s)
    columns |= _choice_figures(s, t, choices)
    return torch.stack([columns[name] for name in FIGURES], -1).double().cpu().numpy()


def _log_probs(hidden: Tensor, weight: Tensor, loss: Loss) -> Tensor:
    return torch.log_softmax(logits_of(hidden, weight, loss.temperature), -1)


def _norm(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).norm(dim=-1)


def _choice_figures(s: Tensor, t: Tensor, choices: Tensor) -> dict[str, Tensor]:
    none = (choices < 0).any(-1, keepdim=True)
    of_t, of_s = (p.gather(-1, choices.clamp(min=0)).masked_fill(none, torch.nan) for p in (t, s))
    other = (1 - of_t.sum(-1)).clamp(min=0)
    split = torch.cat([of_t, other[:, None]], -1)
    two = (of_t >= TWO_PEAKS).all(-1).to(t.dtype).masked_fill(none[:, 0], torch.nan)
    return {
        "go_on": of_t[:, 0],
        "turn_back": of_t[:, 1],
        "other": other,
        "split_entropy": torch.special.entr(split).sum(-1),
        "two_peaked": two,
        "student_go_on": of_s[:, 0],
        "student_turn_back": of_s[:, 1],
    }
