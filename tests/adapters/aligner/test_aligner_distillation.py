"""NeMo-Aligner's knowledge distillation: its data and its loss beside ours, at TP=2."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from aligner_runs import PROMPTS, make_inputs, settings
from launch import launch

pytestmark = pytest.mark.distributed

TOP_K, VOCABULARY, HIDDEN = 8, 96, 16
PARTS = ("train", "validation", "test")
NAMES = {"forward_kl": False, "reverse_kl": True}  # of ours; Aligner's `bwd_kl`


def same_divergence() -> None:
    """On each of two ranks that share a vocabulary: value and gradients of both."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from nemo_aligner.utils.distributed import _TopKLogitsCrossEntropy

    from nemo_trd.config.load import compose
    from nemo_trd.loss.fused import divergence_from_top_k
    from nemo_trd.loss.top_k import TopK

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    rows = slice(*(VOCABULARY // 2 * (dist.get_rank() + i) for i in (0, 1)))
    draw = torch.Generator().manual_seed(0)
    # Aligner's gradient is float32 whatever it is given, whose rounding is relative.
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    for (name, backward), sharpness in product(NAMES.items(), (0.3, 3.0)):
        # [batch, sequence, ...]: Aligner's layout; the same numbers on both ranks.
        hidden = torch.randn(3, 7, HIDDEN, generator=draw)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=draw)[rows]
        weight = (weight * sharpness / HIDDEN**0.5).contiguous()
        teacher = sharpness * torch.randn(3, 7, VOCABULARY, generator=draw)
        log_probs = teacher.log_softmax(-1)
        labels = torch.randint(VOCABULARY, (3, 7), generator=draw)
        top, ids = log_probs.topk(TOP_K)
        of_labels = log_probs.gather(-1, labels[..., None])[..., 0]

        theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = theirs[0] @ theirs[1].t()
        loss, kd, _ = _TopKLogitsCrossEntropy.apply(logits, top, ids, labels, 1.0, 0.0, backward)
        loss.mean().backward()

        ours = hidden.flatten(0, 1).requires_grad_(), weight.clone().requires_grad_()
        settings = ["loss.top_k_tail=renormalize", f"loss.top_k={TOP_K}", f"loss.divergence={name}"]
        known = TopK(ids.flatten(0, 1), top.flatten(0, 1), of_labels.flatten())
        out = divergence_from_top_k(
            *ours, known, labels.flatten(), compose(settings).loss, VOCABULARY, group
        )
        (out.loss_sum / out.count).backward()
        close(out.token_divergence, kd.flatten())
        assert kd.min() > 1e-4  # equal is not zero
        gradients = [part.grad for part in (*ours, *theirs)]
        close(gradients[0], gradients[2].flatten(0, 1))
        close(gradients[1], gradients[3])
        assert min(gradient.abs().max() for gradient in gradients) > 1e-4
    dist.destroy_process_group()


def test_renormalised_top_k_divergence_is_aligners_with_its_gradients() -> None:
    launch(2, same_divergence, timeout=300)


def written_and_read(directory: str, overrides: list[str]) -> None:
    """Write the trajectories of two steps, read them as Aligner's script does, and compare its
    loss on them with the one that our student has on the same trajectories."""
    import torch
    import torch.distributed as dist
    from model_checks import packed
    from nemo_aligner.data.nlp.builders import (
        build_train_valid_test_knowledge_distillation_datasets as build_datasets,
    )
    from nemo_aligner.utils.distributed import _TopKLogitsCrossEntropy
    from omegaconf import OmegaConf

    from nemo_trd.adapters.aligner_kd import write_kd_jsonl
    from nemo_trd.adapters.nemo_aligner import TRDStudent
    from nemo_trd.config.load import compose
    from nemo_trd.megatron.schedule import run_model
    from nemo_trd.run.run import Run
    from nemo_trd.train import launch as launch_run
    from nemo_trd.train import sample

    path = Path(directory, "kd.jsonl")

    def aligners_loss(run: Run, rows: list[dict[str, Any]]) -> float:
        (model,) = run.student.models
        total, count = 0.0, 0
        for row in rows:
            hidden = run_model(model, packed(row["tokens"][None]))
            logits = (hidden @ model.output_weight().t()).transpose(0, 1).contiguous()
            top, ids = row["topk_logits"][None], row["topk_token_ids"][None]
            loss, *_ = _TopKLogitsCrossEntropy.apply(logits, top, ids, row["labels"][None])
            mask = row["loss_mask"].bool()
            total, count = total + float(loss[0, mask].sum()), count + int(mask.sum())
        return total / count

    @torch.no_grad()
    def work(run: Run) -> int:
        written = write_kd_jsonl(run, path, range(2), TOP_K)
        dist.barrier()
        student = TRDStudent(run)  # Megatron's global state, which Aligner's loss asks
        run.student.models[0].eval()
        cfg = OmegaConf.create({"data": {"top_k": None, "splits_string": None}})
        dataset, _, _ = build_datasets(
            cfg=cfg,
            data_prefix=OmegaConf.create({part: [str(path)] for part in PARTS}),
            data_impl="jsonl",
            splits_string=None,
            train_valid_test_num_samples=[-1] * 3,
            seq_length=400,
            seed=1,
            tokenizer=None,
        )
        assert len(dataset) == written == 2 * PROMPTS
        rows = [dict(dataset[i]) for i in range(written)]
        for step in range(2):
            own = student.compare(sample(run, run.inputs.prompts(step), step, run.timers))[0]
            theirs = aligners_loss(run, rows[step * PROMPTS : (step + 1) * PROMPTS])
            assert abs(own - theirs) < 1e-6, (own, theirs)
            assert own > 1e-3
        return 0

    assert launch_run(compose(overrides), work) == 0


def test_aligner_reads_our_jsonl_and_has_our_loss_on_it(tmp_path: Path) -> None:
    overrides = settings(
        make_inputs(tmp_path / "inputs"),
        tmp_path / "run",
        *("parallel.student.tensor_model_parallel_size=2", "evaluation.at_end=false"),
        *(f"loss.top_k={TOP_K}", "loss.top_k_tail=renormalize", "train.micro_batch_size=2"),
        *(
            "train.max_tokens_per_micro_batch=null",
            "parallel.teacher.pipeline_model_parallel_size=2",
        ),
    )
    launch(2, written_and_read, str(tmp_path), overrides, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "kd.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["tokens"][1:] == row["labels"][:-1]
        logits, normaliser = row["topk_logits"][-1], row["log_sum_exp_logits"][-1]
        assert logits[0] == 0 and sorted(logits, reverse=True) == logits and normaliser > 0
    assert len({len(row["tokens"]) for row in rows}) > 2
