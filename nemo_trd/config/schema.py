"""The schema of `conf/`: every setting of a run, its type, its rule and its meaning.

Unknown keys, wrong types and settings that contradict each other are refused here, before
torch is imported. Rules between settings are in `rules.py`; what needs the model directories or the
data is checked in the room `preflight`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from nemo_trd.config.errors import rule_broken

# The resolvers of NeMo's recipes, so that their YAML means the same without NeMo.
OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
VerifierName = Literal["math", "code", "exact", "none"]
Share = Annotated[float, Field(gt=0, le=1)]


def _not_blank(text: str) -> str:
    if not text.strip():  # as a path it would be the current directory
        raise PydanticCustomError("blank", "it may not be empty")
    return text


Name = Annotated[str, AfterValidator(_not_blank)]  # of a file, a directory, a host, ...


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    dir: Name  # everything the run writes is below it
    seed: NonNegativeInt


class Sandbox(Section):
    """What a generated program may use when data.verifier=code runs it; see sandbox.py."""

    case_seconds: PositiveFloat  # wall clock, of one test case
    total_seconds: PositiveFloat  # wall clock, of all test cases of one program
    cpu_seconds: PositiveInt  # of one process
    memory_mib: PositiveInt  # of all its processes together
    files_mib: PositiveInt  # everything below its /tmp
    output_mib: PositiveInt
    processes: PositiveInt  # threads count too
    open_files: PositiveInt


class Algorithm(Section):
    mode: Literal["opd", "opsd"]
    trajectory: Literal["refinement", "rollout"]
    teacher_context: Literal["refine", "prompt"]


class ModelSource(Section):
    path: Name  # a local Hugging Face directory: config.json, tokenizer, safetensors
    trust_remote_code: bool = False


class Models(Section):
    student: ModelSource
    teacher: ModelSource | None  # null in opsd: the teacher is the frozen step-0 student

    @model_validator(mode="before")
    @classmethod
    def _no_path_is_no_teacher(cls, values: Any) -> Any:
        """So that `model.teacher.path=...` can be set where the default is no teacher."""
        if isinstance(values, dict) and isinstance(values.get("teacher"), dict):
            teacher = values["teacher"]
            return values | {"teacher": None if teacher.get("path", "") is None else teacher}
        return values


class Layout(Section):
    """How one model is split. Data parallelism takes the ranks that are left over."""

    tensor_model_parallel_size: PositiveInt
    pipeline_model_parallel_size: PositiveInt
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    context_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    batch_p2p_comm: bool = False

    @property
    def model_parallel_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


class Parallel(Section):
    student: Layout
    teacher: Layout
    timeout_minutes: PositiveFloat  # of a collective; a rank that waits longer ends the run


class Teacher(Section):
    # Where its distribution comes from. megatron: the whole one, from a model held by the ranks
    # that train. server: the loss.top_k most likely tokens, from generation.vllm.teacher.
    scoring: Literal["megatron", "server"]
    offload_weights: bool  # keep the teacher's weights on the host between steps
    offload_states: bool  # keep its hidden states on the host until the student needs them
    # Arguments of its chat template where it scores. null: those of the refinement prompt for that
    # one, data.chat_template_kwargs for a context without a rollout.
    chat_template_kwargs: dict[str, Any] | None = None


class Loss(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: Fraction  # of jsd only: 0 is forward_kl, 1 is reverse_kl
    top_k: PositiveInt | None
    top_k_tail: Literal["bucket", "renormalize"]
    token_clip: PositiveFloat | None
    temperature: PositiveFloat
    chunk_size: PositiveInt  # label positions whose logits exist at one time


class RefinementTemplates(Section):
    """Texts with placeholders {problem}, {rollout}, {reference_solution}; see conf/refinement."""

    system: str | None
    opd: str  # {problem} {rollout}
    opsd: str  # {problem} {reference_solution} {rollout}
    privileged_prompt: str  # {problem} {reference_solution}: opsd's teacher_context=prompt


class RefinementConfig(Section):
    templates: RefinementTemplates
    max_context_tokens: PositiveInt  # of the refinement prompt, chat template included
    on_overflow: Literal["shorten", "refuse"]
    on_failure: Literal["drop", "rollout", "error"]
    subset: Literal["all", "wrong", "right"]
    others: Literal["rollout", "drop"]
    max_student_nll_gap: PositiveFloat | None
    # Arguments of the teacher's chat template where it rewrites. null: data.chat_template_kwargs.
    chat_template_kwargs: dict[str, Any] | None = None


class Columns(Section):
    """Which column of the data holds what. Exactly one of `problem` and `messages` is set.

    A name with dots is a path: `reward_model.ground_truth`, `solutions.0`.
    """

    problem: str | None
    # A conversation: a list of {role, content}, or of {from, value}.
    messages: str | None
    reference_solution: str | None  # a text, or a list of which the first is taken
    # Of verifier code: its tests, where they are in several columns a list of these.
    answer: str | list[str] | None
    system: str | None = None  # system prompts, for rows whose messages begin with none


class Dataset(Section):
    path: Name  # a file, a directory, or the name of a `datasets` dataset: see docs/data.md
    name: Name | None  # the configuration of a `datasets` dataset
    split: Name
    columns: Columns
    # Regular expression: group 1 of its last match is the answer. Or: boxed, for what stands in the
    # last \boxed{...}. Searched in columns.answer, else in the reference solution.
    answer_pattern: str | None
    limit: PositiveInt | None  # use the first so many rows
    # The user's turn: {problem}, and {NAME} of any other column of texts. null: the problem alone.
    template: str | None = None
    # Where a row has a list of answers: any of them is right, or only all together.
    answer_list: Literal["any", "all"] = "any"
    # What a conversation that ends with the assistant's turn means: it is a bad row, or that turn
    # is taken away and is the reference solution.
    last_assistant_turn: Literal["refuse", "reference_solution"] = "refuse"


class PromptRules(Section):
    """What the problems of a dataset become, and how answers to them are judged."""

    system_prompt: str | None
    chat_template_kwargs: dict[str, Any]  # of the chat template: variables that it reads
    max_prompt_tokens: PositiveInt
    verifier: VerifierName
    on_bad_row: Literal["error", "skip"] = "skip"  # skip: left out, counted and reported
    max_bad_share: Fraction = 0.05  # of the rows; more bad ones than that are refused

    @field_validator("chat_template_kwargs")
    @classmethod
    def _finite(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A template may be given anything that JSON has words for."""
        try:
            json.dumps(values, allow_nan=False)
        except ValueError as error:
            raise PydanticCustomError("not_finite", "it holds nan or inf") from error
        return values


class Data(PromptRules):
    train: Dataset
    validation: Dataset | None


# What switches a setting of `Sampling` off.
_OFF: dict[str, Any] = {
    **{"top_p": 1, "top_k": 0, "min_p": 0, "presence_penalty": 0, "repetition_penalty": 1},
    "stop": [],
}


class Sampling(Section):
    """How tokens are drawn: the same on servers and in this process, in the order of vLLM.

    Penalties act on the logits, then temperature, min_p, top_k, top_p.
    """

    temperature: NonNegativeFloat  # 0: the most likely token
    top_p: Annotated[float, Field(gt=0, le=1)]  # 1: off
    top_k: NonNegativeInt  # 0: off
    max_tokens: PositiveInt
    # Least probability of a token, as a share of that of the most likely one. 0: off.
    min_p: Fraction = 0.0
    # Taken off the logit of every token that the completion has already. 0: off.
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    # Logits of tokens that prompt or completion have: divided by it, where negative multiplied
    # with it. 1: off.
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    # Texts that end a completion and are cut from it; see generation/stop_strings.py.
    stop: list[Annotated[str, Field(min_length=1)]] = []

    @field_validator("*", mode="before")
    @classmethod
    def _say_what_is_off(cls, value: Any, info: ValidationInfo) -> Any:
        """Elsewhere -1 or null mean "off"; the words of a number's range do not tell what does."""
        name = info.field_name or ""
        if name == "stop" and isinstance(value, str):
            return [value]  # as OpenAI's API takes it
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A penalty below 0 is one: it favours what is there.
        too_low = number and name != "presence_penalty" and value <= 0 and value != _OFF.get(name)
        if name in _OFF and (value is None or too_low):
            off = {"off": json.dumps(_OFF[name])}
            raise PydanticCustomError("off", "there is no such value, {off} is off", off)
        return value


class LocalGeneration(Section):
    batch_size: PositiveInt  # sequences per call of Hugging Face `generate`
    dtype: Literal["fp32", "bf16"]


class WeightSync(Section):
    """How the student's weights reach its servers; see generation/weight_sync.py."""

    backend: Literal["nccl", "gloo", "file"]
    # What happens to requests that a server is working on. finish: it finishes them with the old
    # weights first. keep: they go on afterwards with the new weights. abort: they end at once with
    # what they have, finish reason "abort".
    in_flight: Literal["finish", "keep", "abort"]
    directory: Name  # of `file`: trainer and servers see it under this path
    bucket_bytes: PositiveInt  # tensors that the sending rank holds at one time
    pause_timeout_seconds: PositiveFloat  # until requests in flight have ended, per server
    call_timeout_seconds: PositiveFloat  # of every other call to a server
    timeout_seconds: PositiveFloat  # of a whole sync, once the servers are paused


class VllmPool(Section):
    """The servers of one model. Exactly one of `urls` and `replicas` is given."""

    urls: list[str]  # http://HOST:PORT of servers that run already
    replicas: NonNegativeInt  # servers that the run starts, on the host of its first rank
    devices: list[NonNegativeInt]  # GPUs of those, tensor_parallel_size each; empty: all visible


class VllmServer(Section):
    """How a server is started; see serve/server.py."""

    python: Name | None  # an interpreter that has vLLM; null: $NEMO_TRD_VLLM_PYTHON or .venv-vllm
    dtype: Literal["auto", "fp32", "bf16"]  # auto: as the model is stored
    # A method of vLLM, such as fp8; null: as the model is stored. Not for a student.
    quantization: Annotated[str, Field(min_length=1)] | None = None
    tensor_parallel_size: PositiveInt
    max_model_len: PositiveInt | None  # null: what the model allows
    max_num_seqs: PositiveInt  # sequences that a server works on at one time
    arguments: list[str]  # further ones of vLLM's API server
    start_timeout_seconds: PositiveFloat
    stop_timeout_seconds: PositiveFloat  # afterwards it is killed


class ServedPool(VllmPool):
    """With how its servers are started. conf/ takes what is not set from generation.vllm.server."""

    server: VllmServer


class TeacherPool(ServedPool):
    """The teacher's servers."""

    # The name that servers at `urls` report of their model, where it is another than that of the
    # teacher's directory; null: that one. See generation/identity.py.
    served_name: Annotated[str, Field(min_length=1)] | None
    # Mean |difference|, in nats, that the servers' log-probabilities may have to those of the
    # teacher's weights, where they are at hand. null: what their precision explains.
    max_difference: PositiveFloat | None


class VllmClient(Section):
    """How servers are asked; see generation/vllm.py."""

    max_concurrency: PositiveInt  # requests of one rank at one server at one time
    request_timeout_seconds: PositiveFloat  # of one attempt
    max_attempts: PositiveInt  # of one request, over all servers
    backoff_seconds: PositiveFloat  # before the second attempt; doubles, with jitter
    max_backoff_seconds: PositiveFloat
    recovery_timeout_seconds: NonNegativeFloat  # without any usable server for so long: give up
    stale_weights: Literal["retry", "keep", "error"]  # completions of other than current weights


class VllmSettings(Section):
    """What holds for all servers that somebody asks, and for those that he starts.

    Of a training run `server` is only what those of a role, which are read, inherit.
    """

    server: VllmServer
    client: VllmClient
    host: Name  # address that servers of the run bind; ranks on other hosts must reach it
    api_key_env: Name  # the environment variable that holds the servers' key
    api_key_file: Name | None  # or a file that does


class Vllm(VllmSettings):
    """Generation on vLLM servers."""

    student: ServedPool
    teacher: TeacherPool
    weight_sync: WeightSync
    compared_rollouts: PositiveInt  # so many, at the start and in every step, are scored by both


class Generation(Section):
    backend: Literal["local", "vllm"]
    # 0: strictly on-policy. 1: the samples of a step are drawn while the step before it trains.
    max_staleness: Annotated[int, Field(ge=0, le=1)]
    rollout: Sampling
    refinement: Sampling
    local: LocalGeneration
    vllm: Vllm | None  # of backend vllm

    @model_validator(mode="after")
    def _settings_of_backend(self) -> Generation:
        if (self.backend == "vllm") != (self.vllm is not None):
            raise rule_broken(
                "generation.backend",
                self.backend,
                "backend vllm, and only that one, has settings in generation.vllm",
                f"choose the whole group: generation={self.backend}",
            )
        if self.max_staleness and self.backend == "local":
            raise rule_broken(
                "generation.max_staleness",
                self.max_staleness,
                "backend local samples with the processors that train: nothing can overlap",
                "set it to 0, or choose generation=vllm",
            )
        return self


class Optimizer(Section):
    lr: PositiveFloat
    min_lr: NonNegativeFloat
    schedule: Literal["cosine", "linear", "constant"]
    warmup_fraction: Fraction
    weight_decay: NonNegativeFloat
    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat
    clip_grad: NonNegativeFloat  # 0 switches it off
    distributed: bool  # shard optimizer states over data parallel ranks
    overlap_grad_reduce: bool  # reduce gradients while the backward pass still runs

    @model_validator(mode="before")
    @classmethod
    def _betas_as_tuple(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values


class Precision(Section):
    dtype: Literal["fp32", "bf16"]
    fp8: Literal["e4m3", "hybrid"] | None  # student, TransformerEngine only
    teacher_fp8: Literal["e4m3", "hybrid"] | None
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


class Train(Section):
    num_steps: PositiveInt
    prompts_per_step: PositiveInt
    rollouts_per_prompt: PositiveInt
    micro_batch_size: PositiveInt | None  # exactly one of these two
    max_tokens_per_micro_batch: PositiveInt | None
    recompute: Literal["none", "selective", "full"]
    max_failed_steps: PositiveInt  # so many steps in a row without a trajectory stop the run

    @property
    def trajectories_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


class Checkpoint(Section):
    save_interval: PositiveInt
    keep_last: PositiveInt
    resume: Name  # auto, never, or the directory of one checkpoint
    accept_changed_data: bool  # go on although data.train gives other prompts than before
    async_save: bool
    export_hf: bool  # write a Hugging Face directory when the run ends


class WandB(Section):
    project: Name
    entity: str | None = None
    name: str | None = None


class MLflow(Section):
    experiment: Name
    tracking_uri: Name | None = None


class Logging(Section):
    tensorboard: bool
    wandb: WandB | None
    mlflow: MLflow | None
    samples_interval: PositiveInt
    samples_count: PositiveInt
    progress: bool  # progress bars on stderr


class Assumptions(Section):
    """What `nemo_trd.plan` multiplies FLOPs and bytes with; a run does not read it."""

    bf16_tflops: PositiveFloat  # peak of one GPU
    fp8_tflops: PositiveFloat
    mfu: Share  # share of the peak that training reaches, recomputation included
    fp8_mfu: Share
    memory_bandwidth_tb: PositiveFloat  # TB/s of one GPU
    memory_utilization: Share  # share of the bandwidth that decoding reaches
    mean_length: Share  # mean length of prompts and answers over the longest allowed
    student_tokens_per_second: PositiveFloat | None  # measured, of one GPU; null: estimated
    teacher_tokens_per_second: PositiveFloat | None


class Cluster(Section):
    """The machines that a run is meant for; a run does not read it."""

    training_nodes: PositiveInt
    student_server_nodes: NonNegativeInt
    teacher_server_nodes: NonNegativeInt
    student_server_tp: PositiveInt  # GPUs of one server
    teacher_server_tp: PositiveInt
    gpus_per_node: PositiveInt
    gpu_memory_gib: PositiveFloat
    reserved_gib: NonNegativeFloat  # of each GPU: CUDA context, NCCL buffers, fragmentation
    disk_gib: PositiveFloat | None  # for run.dir; null: what is free there
    assumptions: Assumptions

    @property
    def world_size(self) -> int:
        """Ranks of the training job."""
        return self.training_nodes * self.gpus_per_node


class Evaluation(Section):
    at_start: bool
    at_end: bool
    interval: PositiveInt | None
    samples_per_problem: PositiveInt
    sampling: Sampling


class Config(Section):
    run: Run
    algorithm: Algorithm
    model: Models
    parallel: Parallel
    teacher: Teacher
    precision: Precision
    loss: Loss
    refinement: RefinementConfig
    data: Data
    sandbox: Sandbox
    generation: Generation
    optimizer: Optimizer
    train: Train
    checkpoint: Checkpoint
    logging: Logging
    evaluation: Evaluation
    cluster: Cluster

    @property
    def teacher_source(self) -> ModelSource:
        """Where the teacher's weights are; in opsd those are the student's at step 0."""
        return self.model.teacher or self.model.student

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher has work outside Megatron: to rewrite, or to score."""
        return self.algorithm.trajectory == "refinement" or self.teacher.scoring == "server"

    @property
    def shows_prompt_to_teacher(self) -> bool:
        """Whether it may score without the refinement prompt; see `batching.pair`."""
        refinement = self.refinement
        rollouts = refinement.on_failure, refinement.others if refinement.subset != "all" else ""
        vanilla = self.algorithm.trajectory == "rollout"
        return vanilla or self.algorithm.teacher_context == "prompt" or "rollout" in rollouts

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir)

    def digest(self) -> str:
        """Identifies what a checkpoint belongs to: the settings that change the numbers."""
        settings = self.model_dump(mode="json")
        for section in ("parallel", "checkpoint", "logging", "evaluation", "teacher", "cluster"):
            del settings[section]
        del settings["sandbox"], settings["run"]["dir"], settings["train"]["num_steps"]
        del settings["generation"]["local"], settings["generation"]["vllm"]
        if self.teacher.chat_template_kwargs is not None:  # the rest of the section is only speed
            settings["teacher"] = {"chat_template_kwargs": self.teacher.chat_template_kwargs}
        if self.refinement.chat_template_kwargs is None:  # as before there was this setting
            del settings["refinement"]["chat_template_kwargs"]
        for knob in ("micro_batch_size", "max_tokens_per_micro_batch", "recompute"):
            del settings["train"][knob]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
