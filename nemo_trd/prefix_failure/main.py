"""Teacher and student along rollouts and rewrites, before and after an answer went wrong.

python -m nemo_trd.prefix_failure runs/quickstart
python -m nemo_trd.prefix_failure runs/mine --student runs/mine/export data.train.path=moved.jsonl

Reads RUN_DIR/samples/*.jsonl and the models that the run began with, computes the distributions
at every token in this process, and writes RUN_DIR/prefix_failure.json, which `nemo_trd.report`
shows. KEY=VALUE changes settings of RUN_DIR/config.yaml. Exit code 2: a setting or a record is
wrong, 1: a model's output is not finite. The figures are explained in docs/prefix_failure.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils.logging import disable_progress_bar

from nemo_trd.algorithm.refinement import fitting_prompts
from nemo_trd.config.arguments import path
from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.load import validate
from nemo_trd.config.schema import (
    Config,
    DivergenceName,
    FullDivergenceName,
    Models,
    ModelSource,
)
from nemo_trd.data.prompts import load_prompts
from nemo_trd.generation.local import load_model
from nemo_trd.loss.divergences import DIVERGENCES
from nemo_trd.models.dtypes import torch_dtype
from nemo_trd.models.family import shared_vocab_size
from nemo_trd.models.read import Model
from nemo_trd.prefix_failure.answers import Answers, read_answers
from nemo_trd.prefix_failure.positions import measure
from nemo_trd.prefix_failure.summary import Measured, curves, groups
from nemo_trd.prefix_failure.words import choice_table, divergence_table, for_terminal, sentences
from nemo_trd.preflight.models import check_models, real_vocab_size
from nemo_trd.records.prefix_failure import FILE, Counts, PrefixFailure
from nemo_trd.records.read import read_runs
from nemo_trd.records.step_lines import write_atomically

CONFIDENCE = 0.95
BATCH_TOKENS = 4096  # where the run counts sequences


def prefix_failure(
    config: Config, samples: Sequence[dict[str, Any]], student: str | None, resamples: int
) -> PrefixFailure:
    """Measure along the rollouts and rewrites of `samples`.

    Args:
        samples: lines of samples/*.jsonl.
        student: a Hugging Face directory in the place of the one that the run began with.

    Raises:
        ConfigError: models, data or samples that do not fit each other; before a model is loaded.
    """
    models = Models(
        student=config.model.student.model_copy(update={"path": student} if student else {}),
        teacher=config.teacher_source,  # in opsd the run's own start, whatever is measured
    )
    of_student, of_teacher = check_models(config.model_copy(update={"model": models}))
    answers = _answers(config, samples, of_student, of_teacher)
    columns = shared_vocab_size(of_student.hf, of_teacher.hf)
    vocab_size = real_vocab_size(columns, of_student.tokenizer)
    figures = measure(
        _load(of_student, models.student, config),
        _load(of_teacher, config.teacher_source, config),
        answers.answers,
        config.loss,
        vocab_size,
        config.train.max_tokens_per_micro_batch or BATCH_TOKENS,
        config.logging.progress,
    )
    measured = [Measured(*pair) for pair in zip(answers.answers, figures, strict=True)]
    bootstrap = (resamples, CONFIDENCE, config.run.seed)
    return PrefixFailure(
        student=str(of_student.directory),
        teacher=str(of_teacher.directory),
        mode=config.algorithm.mode,
        teacher_context=config.algorithm.teacher_context,
        divergence=_divergence(config.loss.divergence),
        beta=config.loss.beta,
        temperature=config.loss.temperature,
        locator=answers.locator,
        confidence=CONFIDENCE,
        resamples=resamples,
        counts=Counts(**answers.counts),
        groups=groups(measured, *bootstrap),
        curves=curves(measured, *bootstrap),
    )


def _divergence(name: DivergenceName) -> FullDivergenceName:
    """The divergence over the vocabulary that a run trains with, or by an estimate of it."""
    return DIVERGENCES[name].estimates or name  # type: ignore[return-value]


def _answers(
    config: Config, samples: Sequence[dict[str, Any]], student: Model, teacher: Model
) -> Answers:
    loaded = load_prompts(
        config.data.train,
        "data.train",
        config.data,
        student.tokenizer,
        needs_reference=config.algorithm.mode == "opsd",
    )
    prompts = fitting_prompts(loaded, config, teacher.tokenizer).prompts
    answers = read_answers(samples, prompts, config, teacher.tokenizer)
    if not answers.answers:
        raise rule_broken(
            "samples",
            dict(answers.counts),
            "no rollout has a verdict",
            "measure a run with data.verifier and answers, and logging.samples_interval set",
        )
    return answers


def _load(model: Model, source: ModelSource, config: Config) -> Any:
    """On all GPUs, where there are any; never on the disk."""
    if not config.logging.progress:
        disable_progress_bar()  # transformers' own, of loading weights
    device_map = "auto" if torch.cuda.is_available() else None
    dtype = torch_dtype(config.precision.dtype)
    loaded = load_model(str(model.directory), dtype, source.trust_remote_code, device_map)
    if any(parameter.is_meta for parameter in loaded.parameters()):
        raise rule_broken(
            model.field,
            str(model.directory),
            "it does not fit in the memory of this machine's GPUs beside the other model",
            "use more GPUs",
        )
    return loaded


def read_config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The settings of a run, changed by KEY=VALUE.

    Raises:
        ConfigError
    """
    for override in overrides:
        if "=" not in override:
            raise rule_broken("KEY=VALUE", override, "it has no =", "write setting=value")
    path = run_dir / "config.yaml"
    try:
        settings = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise rule_broken(
            "RUN_DIR",
            str(run_dir),
            f"config.yaml cannot be read: {str(error).splitlines()[0]}",
            "give a run.dir",
        ) from error
    assert OmegaConf.is_dict(settings)
    return validate(settings)  # type: ignore[arg-type]


def write(run_dir: Path, options: argparse.Namespace) -> tuple[PrefixFailure, Path]:
    """Measure a run, and write the result.

    Raises:
        ConfigError
    """
    (run,) = read_runs([run_dir])
    for what in run.missing:
        if what.startswith(("samples", "no samples")):
            print(f"nemo_trd: {what}", file=sys.stderr)
    if not run.samples:
        raise rule_broken(
            "RUN_DIR",
            str(run_dir),
            "it has no samples with token ids",
            "run with logging.samples_interval",
        )
    config = read_config(run_dir, options.overrides)
    samples = run.samples[: options.limit]  # newest first
    result = prefix_failure(config, samples, options.student, options.resamples)
    left_out = {"not_measured": len(run.samples) - len(samples)}
    result = result.model_copy(update={"counts": result.counts.model_copy(update=left_out)})
    output = options.output or run_dir / FILE
    write_atomically(output, result.model_dump_json() + "\n")
    return result, output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.prefix_failure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="a run.dir")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument(
        "--student", metavar="DIR", help="(default: the one that the run began with)"
    )
    parser.add_argument(
        "--limit", type=_positive, default=256, metavar="N", help="the newest samples (%(default)s)"
    )
    parser.add_argument(
        "--resamples",
        type=_positive,
        default=1000,
        metavar="N",
        help="of the bootstrap (%(default)s)",
    )
    parser.add_argument("--output", type=path, metavar="FILE", help=f"(default: RUN_DIR/{FILE})")
    options = parser.parse_intermixed_args(arguments)
    try:
        result, output = write(options.run_dir, options)
    except (ConfigError, OSError) as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 1
    tables = [table for table in (divergence_table(result), choice_table(result)) if len(table) > 1]
    print("\n\n".join(["\n".join(sentences(result)), *map(for_terminal, tables)]))
    print(
        f"\nNats and shares; in brackets the {result.confidence:.0%} bootstrap interval over "
        f"problems. Written to {output}"
    )
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number
