"""avg@k and pass@k of a checkpoint, a Hugging Face directory or servers, on benchmarks.

python -m nemo_trd.evaluate model.path=runs/mine benchmark=[math500,aime24] output=runs/mine/eval
python -m nemo_trd.evaluate model.path=DIR benchmark=jsonl benchmarks.jsonl.path=problems.jsonl

A second start with the same settings and output goes on where the first one stopped. Exit code: 0
when all samples are judged, 1 when generation failed, 2 for a wrong setting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.evaluation import EvaluationConfig
from nemo_trd.config.load import compose_as, composed, conf_dir
from nemo_trd.data.chat import text_to_judge
from nemo_trd.data.prompts import LoadedPrompts, load_prompts
from nemo_trd.data.types import Completion, GenerationRequest, Prompt
from nemo_trd.evaluate.figures import figures, table
from nemo_trd.evaluate.judging import JudgePool
from nemo_trd.evaluate.sample_store import Sample, SampleStore
from nemo_trd.evaluate.source import Source, find_source
from nemo_trd.generation.protocol import GenerationFailed, Generator, request_seed
from nemo_trd.models.read import read_tokenizer
from nemo_trd.records.step_lines import write_atomically
from nemo_trd.serve.open import (
    ServedModel,
    generator_on_servers,
    local_generator,
    open_servers,
)
from nemo_trd.serve.server import ServerError
from nemo_trd.verifiers.judgement import Judgement
from nemo_trd.verifiers.sandbox import check_sandbox

log = logging.getLogger("nemo_trd.evaluate")  # under `python -m` the name of this module differs


@dataclass(frozen=True)
class Task:
    """One sample to be drawn."""

    benchmark: str
    prompt: Prompt
    sample: int
    seed: int

    @property
    def request(self) -> GenerationRequest:
        return GenerationRequest(self.prompt.token_ids, self.seed, affinity=self.prompt.index)


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Draw and judge what is missing, and write OUTPUT/results.json.

    Returns the figures of each benchmark by name.

    Raises:
        ConfigError: before any model is loaded.
        GenerationFailed, ServerError: what has been judged is kept.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise rule_broken(
            "WORLD_SIZE",
            os.environ["WORLD_SIZE"],
            "an evaluation is one process",
            "start it without torchrun; several GPUs are for servers (generation.backend=vllm)",
        )
    source = find_source(config.model)
    hf = source.hf
    tokenizer = read_tokenizer(hf.path, hf.trust_remote_code, "model.path (tokenizer)")
    problems = load_problems(config, tokenizer)
    check_lengths(config, source, problems)
    output = Path(config.output)
    store = SampleStore(output, what_samples_depend_on(config, source, problems))
    tasks = [
        Task(name, p, i, request_seed(config.seed, "evaluation", name, p.index, i))
        for name, loaded in problems.items()
        for p in loaded.prompts
        for i in range(config.samples_per_problem)
    ]
    missing = [t for t in tasks if (t.benchmark, t.prompt.index, t.sample) not in store.samples]
    log.info("%d samples of %d are there, in %s", len(tasks) - len(missing), len(tasks), output)
    if missing:
        with generator(config, source, output) as drawn:
            draw_and_judge(missing, drawn, tokenizer, store, config)
    results = {
        name: figures(
            [sample for sample in store.samples.values() if sample.benchmark == name],
            loaded.skipped,
            config,
        )
        for name, loaded in problems.items()
    }
    report = {"model": config.model.path, "output": str(output), "benchmarks": results}
    text = json.dumps(report, indent=1, allow_nan=False)
    write_atomically(output / "results.json", text + "\n")
    return results


def load_problems(config: EvaluationConfig, tokenizer: Any) -> dict[str, LoadedPrompts]:
    """The problems of every benchmark by its name.

    Raises:
        ConfigError: a row that breaks a rule, data that are not there, or programs to be run
            where the sandbox does not work.
    """
    problems = {}
    for name, benchmark in config.benchmarks.items():
        field = f"benchmarks.{name}"
        if benchmark.verifier == "code":
            check_sandbox(f"{field}.verifier", config.sandbox)
        problems[name] = load_prompts(benchmark, field, benchmark, tokenizer)
    return problems


def check_lengths(
    config: EvaluationConfig, source: Source, problems: dict[str, LoadedPrompts]
) -> None:
    """Raises ConfigError: prompts and answers exceed the positions that the model knows."""
    settings = json.loads((Path(source.hf.path) / "config.json").read_text(encoding="utf-8"))
    limit = settings.get("max_position_embeddings")
    prompts = [prompt for loaded in problems.values() for prompt in loaded.prompts]
    longest, max_tokens = max(len(p.token_ids) for p in prompts), config.sampling.max_tokens
    if isinstance(limit, int) and longest + max_tokens > limit:
        raise rule_broken(
            "sampling.max_tokens",
            max_tokens,
            f"with a prompt of {longest} tokens it exceeds max_position_embeddings = {limit} of "
            f"{source.hf.path}",
            f"set it to {max(1, limit - longest)} or less, or lower max_prompt_tokens",
        )


def what_samples_depend_on(
    config: EvaluationConfig, source: Source, problems: dict[str, LoadedPrompts]
) -> dict[str, Any]:
    """The settings that change samples or verdicts, the weights, and the problems themselves."""
    settings = config.model_dump(mode="json")
    for name in ("output", "model", "bootstrap", "progress"):
        del settings[name]
    del settings["verification"]["workers"], settings["generation"]["local"]["batch_size"]
    # Servers may be other ones, of the same model.
    settings["generation"]["vllm"] = {
        name: getattr(config.generation.vllm.server, name) for name in ("dtype", "quantization")
    }
    del settings["generation"]["local" if config.generation.backend == "vllm" else "vllm"]
    settings["model"] = {"weights": source.fingerprint()}
    for name, loaded in problems.items():
        problem_set = [[p.index, p.token_ids, p.answer] for p in loaded.prompts]
        read = json.dumps(problem_set, default=asdict)
        settings["benchmarks"][name]["problems"] = hashlib.sha256(read.encode()).hexdigest()[:16]
        del settings["benchmarks"][name]["path"]  # the file may move
    return settings


@contextmanager
def generator(config: EvaluationConfig, source: Source, output: Path) -> Iterator[Generator]:
    """Generates with the model: in this process, on servers that run, or on some started here."""
    settings, vllm = config.generation, config.generation.vllm
    running = settings.backend == "vllm" and vllm.urls
    directory = Path(source.hf.path) if running else source.directory(output)
    model = source.hf.model_copy(update={"path": str(directory)})
    if settings.backend == "local":
        yield local_generator(model, settings.local, progress=config.progress)
        return
    served = ServedModel(model, vllm, "generation.vllm", output / "servers" / "server")
    with open_servers({"model": served}, vllm) as servers:
        drafts = vllm.server.speculation is not None
        yield generator_on_servers(
            model, servers["model"], vllm.client, drafts=drafts, progress=config.progress
        )


def draw_and_judge(
    tasks: Sequence[Task],
    drawn: Generator,
    tokenizer: Any,
    store: SampleStore,
    config: EvaluationConfig,
) -> None:
    """Every sample goes to the judges as soon as it is drawn, and to the disk once judged."""
    with JudgePool(config) as judges:

        def judge(position: int, completion: Completion) -> None:
            task = tasks[position]
            text = completion.text(tokenizer)

            def keep(judgement: Judgement) -> None:
                store.append(_sample(task, completion, text, judgement))

            if completion.finish_reason == "abort":
                keep(Judgement(None, "aborted"))
                return
            answer = task.prompt.answer
            assert answer is not None  # no benchmark is without a verifier
            said = text_to_judge(text, task.request.prompt_token_ids, completion, tokenizer)
            judges.submit(config.benchmarks[task.benchmark].verifier, said, answer, keep)

        drawn.generate([t.request for t in tasks], config.sampling, "samples", done=judge)
        judges.finish(config.progress)


def _sample(task: Task, completion: Completion, text: str, judgement: Judgement) -> Sample:
    return Sample(
        benchmark=task.benchmark,
        problem=task.prompt.index,
        sample=task.sample,
        seed=task.seed,
        finish_reason=completion.finish_reason,
        tokens=len(completion.token_ids),
        weight_version=completion.weight_version,
        correct=judgement.correct,
        reason=judgement.reason,
        text=text,
    )


def main(arguments: list[str] | None = None) -> int:
    available = sorted(path.stem for path in (conf_dir() / "benchmark").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"benchmarks: {', '.join(available)}\n\nsettings and their defaults:\n\n"
        + OmegaConf.to_yaml(composed([], "evaluate", EvaluationConfig)),
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, see below")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nemo_trd").setLevel(logging.INFO)
    config = None
    try:
        config = compose_as(EvaluationConfig, parsed.overrides, "evaluate")
        results = evaluate(config)
    except ConfigError as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    except (GenerationFailed, ServerError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print(f"nemo_trd: {'interrupted' if stopped else error}", file=sys.stderr)
        if config is not None:
            print(f"nemo_trd: {config.output} is kept; start again to go on", file=sys.stderr)
        return 130 if stopped else 1
    print(table(results, config.samples_per_problem, config.bootstrap.confidence))
    print(f"written to {Path(config.output) / 'results.json'}")
    return 0
