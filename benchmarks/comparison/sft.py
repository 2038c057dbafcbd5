"""Supervised fine-tuning on samples of the teacher: the same student, data, settings and records.

    python benchmarks/comparison/sft.py experiment=quickstart run.dir=runs/sft ...

Each step the teacher answers the prompts of the step once, and the student's cross-entropy on these
answers is minimised: the tokens of the teacher without its distribution. Everything else is as in
nemo_trd.train, but for Megatron: one process of transformers and PyTorch's AdamW.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.data.prompts import load_prompts, prompts_of_step
from nemo_trd.data.types import GenerationRequest
from nemo_trd.evaluate.in_run import evaluate
from nemo_trd.generation.local import LocalGenerator
from nemo_trd.generation.protocol import request_seed
from nemo_trd.records.run_logger import RunLogger
from nemo_trd.records.timers import Timers
from nemo_trd.toy.rows import Row
from nemo_trd.toy.warm_start import token_losses
from nemo_trd.verifiers.select import verifier


def fine_tune(config: Config) -> None:
    generation, settings = config.generation, config.optimizer
    assert generation.local is not None
    tokenizer = AutoTokenizer.from_pretrained(config.model.student.path)
    student, teacher = (
        LocalGenerator(source.path, generation.local, False, progress=False)
        for source in (config.model.student, config.teacher_source)
    )
    model = student.model.requires_grad_(True)
    prompts = load_prompts(config.data.train, "data.train", config.data, tokenizer).prompts
    assert config.data.validation is not None
    validation = load_prompts(config.data.validation, "data.validation", config.data, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    warm_up = max(1, round(settings.warmup_fraction * config.train.num_steps))
    timers = Timers()
    with RunLogger(config, writer=True) as logger:

        def measure(step: int) -> None:
            accuracy = evaluate(
                student.generate,
                validation.prompts,
                config.evaluation,
                config.run.seed,
                verifier(config.data.verifier),
                tokenizer,
            )
            logger.evaluation(step, accuracy.summary(), str(accuracy))

        if config.evaluation.at_start:
            measure(0)
        timers.take()
        for step in range(config.train.num_steps):
            asked = prompts_of_step(prompts, step, config.train.prompts_per_step, config.run.seed)
            requests = [
                GenerationRequest(
                    prompt.token_ids, request_seed(config.run.seed, "teacher", step, prompt.index)
                )
                for prompt in asked
            ]
            with timers("rollout"):
                answers = teacher.generate(requests, generation.refinement, "answers")
            with timers("student"):
                rows = [
                    Row([*prompt.token_ids], [*answer.token_ids])
                    for prompt, answer in zip(asked, answers, strict=True)
                ]
                count = sum(len(row.labels) for row in rows)
                loss = token_losses(model, rows).sum() / count
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
                optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / warm_up)
                optimizer.step()
                optimizer.zero_grad()
            figures = {
                "rollouts": len(answers),
                "generated_tokens": count,
                "loss": loss.item(),
                "label_tokens": count,
                "grad_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
            }
            logger.step(step + 1, figures, timers.take())
            if config.evaluation.interval and (step + 1) % config.evaluation.interval == 0:
                measure(step + 1)
                timers.take()
        logger.summary({"steps": config.train.num_steps})


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for nemo_trd.train")
    fine_tune(compose(parser.parse_args().overrides))
