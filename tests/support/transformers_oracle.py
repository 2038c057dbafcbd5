"""The loss of a step as transformers computes it: model, logits, divergence; nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def mean_kl(student_path: Path, teacher_path: Path, trajectories: list[Any]) -> float:
    """KL(teacher || student) per label token, from the logits of transformers in fp32.

    Over the tokens that there are: columns beyond the tokenizer's largest id pad the models.
    """
    tokens = max(AutoTokenizer.from_pretrained(student_path).get_vocab().values()) + 1

    def log_probs(model: Any, context: list[int], labels: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([context + labels])).logits[0, len(context) - 1 : -1]
        return logits[:, :tokens].double().log_softmax(1)

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (student_path, teacher_path)
    )
    total, count = 0.0, 0
    for trajectory in trajectories:
        labels = trajectory["labels"]
        p = log_probs(teacher, trajectory["teacher_context"], labels)
        q = log_probs(student, trajectory["student_context"], labels)
        total += float((p.exp() * (p - q)).sum())
        count += len(labels)
    return total / count
