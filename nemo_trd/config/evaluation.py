"""The schema of `conf/evaluate.yaml`: every setting of `nemo_trd.evaluate`, and its rule."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemo_trd.config.dataset_rules import check_dataset
from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import (
    Dataset,
    LocalGeneration,
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptRules,
    Sampling,
    Sandbox,
    Section,
    ServedPool,
    VllmSettings,
)
from nemo_trd.config.server_rules import check_drafts, check_pool


class EvaluatedModel(Section):
    # A Hugging Face directory, a run directory (its newest checkpoint), or a checkpoint of a run.
    path: Name
    hf_path: Name | None  # of a checkpoint: the directory that its run began with, where it moved
    trust_remote_code: bool  # run Python code that the directory brings


class Benchmark(Dataset, PromptRules):
    """Problems with answers, and how they are asked and judged. See conf/benchmark/."""

    # Figures over fewer problems are not those of the benchmark.
    on_bad_row: Literal["error", "skip"] = "error"


class Servers(ServedPool, VllmSettings):
    """vLLM servers: running ones by their URLs, or so many replicas that are started."""


class EvaluationGeneration(Section):
    # local: Hugging Face `generate` in this process; vllm: servers
    backend: Literal["local", "vllm"]
    local: LocalGeneration  # of backend local
    vllm: Servers  # of backend vllm


class Verification(Section):
    workers: PositiveInt  # answers that are checked at one time
    math_timeout_seconds: PositiveFloat  # of processor time, of one comparison


class Bootstrap(Section):
    resamples: PositiveInt  # of the problems, with replacement
    # share of resampled scores inside the interval, 0.95 for 95 %
    confidence: Annotated[float, Field(gt=0, lt=1)]


class EvaluationConfig(Section):
    output: Name  # samples.jsonl, results.json; a second start with the same directory resumes
    model: EvaluatedModel  # who is evaluated
    benchmarks: dict[str, Benchmark]  # by name; conf/benchmark/ has the known ones
    samples_per_problem: PositiveInt  # the k of avg@k and pass@k
    sampling: Sampling  # the same for all benchmarks
    seed: NonNegativeInt  # of samples and of the bootstrap
    generation: EvaluationGeneration  # who draws samples
    verification: Verification  # how answers are judged
    bootstrap: Bootstrap  # the intervals of the scores
    sandbox: Sandbox  # limits of generated programs
    progress: bool  # progress bars on stderr

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        if not self.benchmarks:
            raise rule_broken(
                "benchmark",
                None,
                "there is nothing to evaluate on",
                "choose some, as in benchmark=[gsm8k,aime24], or your own file with "
                "benchmark=jsonl benchmarks.jsonl.path=FILE",
            )
        for name, benchmark in self.benchmarks.items():
            field = f"benchmarks.{name}"
            if not re.fullmatch(r"[\w.-]+", name):
                raise rule_broken(field, name, "names are letters, digits, _, - and .", "rename it")
            check_dataset(field, benchmark, benchmark.verifier)
            if benchmark.verifier == "none":
                raise rule_broken(
                    f"{field}.verifier", "none", "it judges nothing", "set math, exact or code"
                )
        if self.generation.backend == "vllm":
            vllm = self.generation.vllm
            check_pool("generation.vllm", vllm)
            check_drafts("generation.vllm.server.speculation", vllm.server.speculation)
        return self
