"""The losses of a step as transformers computes them; nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


def load_balancing(model: Any, trajectories: list[Any]) -> tuple[torch.Tensor, float]:
    """Load-balancing loss of a model with experts, by layer and trajectory, and its largest load.

    Returns: mean over trajectories, summed over sparse layers; what the expert with most tokens has
        over the mean of its layer.
    """
    settings = model.config
    experts, chosen = settings.num_experts, settings.num_experts_per_tok
    total, counts = torch.zeros(()), []
    for t in trajectories:
        read = torch.tensor([t.student_context + t.labels[:-1]])
        layers = model(input_ids=read, output_router_logits=True).router_logits
        for logits in layers:  # given several layers it would take them for one
            total = total + load_balancing_loss_func((logits,), experts, chosen) / chosen
        best = torch.stack([logits.softmax(-1).float().topk(chosen).indices for logits in layers])
        counts.append(torch.nn.functional.one_hot(best, experts).sum((1, 2)))
    of_step = torch.stack(counts).sum(0).double()
    return total / len(trajectories), (of_step.amax(1) / of_step.mean(1)).max().item()


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
