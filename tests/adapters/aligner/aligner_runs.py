"""What the runs in NeMo-Aligner's environment begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import make_model

STEPS, PROMPTS = 5, 4


def make_inputs(root: Path) -> Path:
    """Two models that share a tokenizer, and problems."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "llama", seed=seed, tokenizer=True, **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(24)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def settings(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Of the refinements, about half end within their limit."""
    sampling = [
        f"generation.{which}.{setting}"
        for which, limit in (("rollout", 12), ("refinement", 150))
        for setting in (f"max_tokens={limit}", "temperature=1.0", "top_k=0", "top_p=1.0")
    ]
    columns = "{problem: question, messages: null, reference_solution: answer, answer: null}"
    rest = rf"name: null, split: train, answer_pattern: '####\s*(.+)', limit: {PROMPTS}"
    return [
        *("model=local", "data=gsm8k", "data.max_prompt_tokens=64", "data.verifier=exact"),
        *(f"model.{role}.path={inputs / role}" for role in ("student", "teacher")),
        *(f"data.train.path={inputs / 'data.jsonl'}", f"run.dir={run_dir}"),
        f"data.validation={{path: {inputs / 'data.jsonl'}, columns: {columns}, {rest}}}",
        *("refinement.templates.opd='{problem} {rollout}'", "refinement.max_context_tokens=200"),
        *("refinement.on_failure=rollout", *sampling, "generation.local.dtype=fp32"),
        *(f"train.num_steps={STEPS}", f"train.prompts_per_step={PROMPTS}", "precision.dtype=fp32"),
        *("optimizer.lr=1e-3", "optimizer.schedule=constant", "logging.progress=false"),
        *("checkpoint.export_hf=false", "evaluation.samples_per_problem=1"),
        *overrides,
    ]
