"""The schema of `conf/`: every setting of a run, its type, its rule and its meaning.

Unknown keys, wrong types and settings that contradict each other are refused here, before torch is
imported. Rules between settings are in `rules.py` and the files that it calls; what needs
the model directories or the data is checked in the room `preflight`.
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


FullDivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]  # over all of the vocabulary
EstimatorName = Literal["k1", "k3"]  # of a divergence, from the label's token alone
DivergenceName = Literal[FullDivergenceName, EstimatorName]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    dir: Name  # everything the run writes is below it
    seed: NonNegativeInt  # of samples, of the order of prompts and of every rank's generators


class Sandbox(Section):
    """Limits of a generated program that data.verifier=code runs, in verifiers/sandbox.py."""

    case_seconds: PositiveFloat  # wall clock, of one test case
    total_seconds: PositiveFloat  # wall clock, of all test cases of one program
    cpu_seconds: PositiveInt  # of one process
    memory_mib: PositiveInt  # of all its processes together
    files_mib: PositiveInt  # everything below its /tmp
    output_mib: PositiveInt  # what it prints to stdout
    processes: PositiveInt  # threads count too
    open_files: PositiveInt  # of one process


class Algorithm(Section):
    # Who the teacher is. opd: a separate, stronger model (model.teacher), which sees no reference
    # solution. opsd: the frozen step-0 student, which also sees the reference solution y*.
    mode: Literal["opd", "opsd"]
    # The y of a trajectory x + y. refinement: y_r, the teacher's rewrite of the rollout (TRD).
    # rollout: y_o itself, nothing is rewritten (vanilla on-policy distillation, the baseline).
    trajectory: Literal["refinement", "rollout"]
    # The context c_T in which the teacher scores y_r. refine: the refinement prompt that y_r was
    # sampled from (the paper's recipe). prompt: x, in opsd (x, y*), as if y_r were its first
    # answer. A trajectory that is a rollout is always scored as with prompt.
    teacher_context: Literal["refine", "prompt"]


class ModelSource(Section):
    path: Name  # a local Hugging Face directory: config.json, tokenizer, safetensors
    trust_remote_code: bool = False  # run Python code that the directory brings


class Models(Section):
    student: ModelSource  # pi_theta, the model that is trained
    teacher: ModelSource | None  # null in opsd: the teacher is the frozen step-0 student

    @model_validator(mode="before")
    @classmethod
    def _no_path_is_no_teacher(cls, values: Any) -> Any:
        """So that `model.teacher.path=...` can be set where the default is no teacher."""
        if isinstance(values, dict) and isinstance(values.get("teacher"), dict):
            teacher = values["teacher"]
            return values | {"teacher": None if teacher.get("path", "") is None else teacher}
        return values


TargetName = Literal["q", "k", "v", "o", "gate", "up", "down"]


class Adapter(Section):
    """Low-rank matrices that are trained while the student's weights stay; see docs/lora.md."""

    # lora: to each linear layer W x among `targets` it adds scale B A x (arXiv 2106.09685).
    kind: Literal["lora"]
    rank: PositiveInt  # rows of A and columns of B
    alpha: PositiveFloat  # the scale is alpha / rank, with rslora alpha / sqrt(rank)
    rslora: bool  # rank-stabilised scale (arXiv 2312.03732)
    # Share of A's inputs that training sets to zero; 0 with targets in experts.
    dropout: Annotated[float, Field(ge=0, lt=1)]
    # Linear layers with an A and a B, in each layer of the model: of attention q, k, v, o; of the
    # MLP gate, up, down. In each expert gate and up, both or none, have an A and a B together.
    targets: Annotated[list[TargetName], Field(min_length=1)]
    # What A and B begin with. kaiming: A uniform within 1 / sqrt(its inputs), B zero. gaussian: A
    # normal with deviation 1 / rank, B zero. Else the directory of an adapter that Hugging Face
    # PEFT has saved.
    init: Name


class Student(Section):
    """What of the student is trained."""

    adapter: Adapter | None = None  # null: all parameters are trained
    # Of a student with experts. What the load-balancing loss of each sparse layer is multiplied by
    # before it is added to what is minimised (not to the `loss` that is reported): the mean over
    # trajectories of how unevenly each one's tokens go to experts, 1 where they go evenly
    # (Megatron's seq_aux_loss). 0: there is none. With an adapter, which leaves routers as they
    # are, it trains the attention before them.
    moe_aux_loss_coeff: NonNegativeFloat = 0.0


class Layout(Section):
    """How one model is split. Data parallelism takes the ranks that are left over."""

    tensor_model_parallel_size: PositiveInt  # ranks over which each layer is split
    pipeline_model_parallel_size: PositiveInt  # stages, each with a part of the layers
    # parts of a stage in the interleaved schedule, where a model is trained; null: 1F1B
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    context_parallel_size: PositiveInt = 1  # ranks over which each sequence is split
    # split what lies between tensor parallel layers over the same ranks
    sequence_parallel: bool = False
    # Of models with experts alone. Ranks over which the experts of a layer are shared out; with
    # expert_tensor_parallel_size and the stages of the pipeline it divides the ranks.
    expert_model_parallel_size: PositiveInt = 1
    expert_tensor_parallel_size: PositiveInt = 1  # ranks over which each expert is split
    batch_p2p_comm: bool = False  # sends and receives of stages in one call

    @property
    def model_parallel_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_holders(self) -> int:
        """Number of ranks that hold the experts of all stages once."""
        return (
            self.expert_tensor_parallel_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )

    def divides(self, world_size: int) -> bool:
        """Whether so many ranks hold the model a whole number of times, and its experts too."""
        return not (world_size % self.model_parallel_size or world_size % self.expert_holders)


class Parallel(Section):
    student: Layout  # over all ranks of the training job
    teacher: Layout  # over the same ranks, in a way of its own
    timeout_minutes: PositiveFloat  # of a collective; a rank that waits longer ends the run


class Teacher(Section):
    # Where its distribution comes from. megatron: the whole one, from a model held by the ranks
    # that train. server: the loss.top_k most likely tokens, from generation.vllm.teacher.
    # generation: the same, computed while these servers write the rewrites; no second pass.
    scoring: Literal["megatron", "server", "generation"]
    # In opsd: w_T <- ema w_T + (1 - ema) w_theta after each update, beginning with the step-0
    # student. null: the teacher stays that student.
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    offload_weights: bool  # keep the teacher's weights on the host between steps
    offload_states: bool  # keep its hidden states in pinned host memory until they are needed
    # Arguments of its chat template where it scores. null: those of the refinement prompt for that
    # one, data.chat_template_kwargs for a context without a rollout.
    chat_template_kwargs: dict[str, Any] | None = None


class Loss(Section):
    # D(pi_T, pi_theta) of one token. forward_kl: KL(pi_T || pi_theta), the paper's. reverse_kl:
    # KL(pi_theta || pi_T). jsd: beta KL(pi_T || m) + (1 - beta) KL(pi_theta || m) with m = beta
    # pi_T + (1 - beta) pi_theta (GKD, arXiv 2306.13649). k1, k3: estimates of reverse_kl from the
    # sampled token alone, where labels are the student's own samples. k1: policy gradient with
    # reward log pi_T - log pi_theta. k3: its gradient is an estimate of forward_kl's.
    divergence: DivergenceName
    beta: Fraction  # of jsd only: 0 is forward_kl, 1 is reverse_kl
    # Compare only the teacher's k most likely tokens of each position. null: all of the vocabulary.
    top_k: PositiveInt | None
    # All other tokens, where top_k is set. bucket: one category that holds their probability.
    # renormalize: left out, what remains is scaled to 1 on both sides.
    top_k_tail: Literal["bucket", "renormalize"]
    # Largest divergence of one token, in nats; beyond it the token has no gradient. null: no limit,
    # as in the paper.
    token_clip: PositiveFloat | None
    # Largest contribution of one vocabulary entry to the divergence of a token, in nats; beyond it
    # the entry has no gradient (OPSD's pointwise clip, arXiv 2601.18734). null: no limit.
    entry_clip: PositiveFloat | None = None
    # Divides the logits of both models before the softmax. Gradients follow: they are not scaled up
    # by its square.
    temperature: PositiveFloat
    # Label positions whose logits exist at one time. null: on a GPU as many as 4 GiB hold, between
    # 256 and 2048; on a CPU 256.
    chunk_size: PositiveInt | None


class RefinementTemplates(Section):
    """Texts with placeholders {problem}, {rollout}, {reference_solution}; see conf/refinement."""

    system: str | None  # system prompt of the teacher where it rewrites; null: none
    opd: str  # {problem} {rollout}
    opsd: str  # {problem} {reference_solution} {rollout}
    privileged_prompt: str  # {problem} {reference_solution}: opsd's teacher_context=prompt


class RefinementConfig(Section):
    templates: RefinementTemplates  # the wording, one file of conf/refinement a task
    max_context_tokens: PositiveInt  # of the refinement prompt, chat template included
    # A refinement prompt of more than max_context_tokens. shorten: rollout and reference solution
    # are cut, with a notice in their place, never the problem. refuse: the rewrite is rejected, as
    # on_failure says.
    on_overflow: Literal["shorten", "refuse"]
    # A rewrite that cannot be trained on: empty, aborted, cut off by its length, no room for its
    # prompt, or beyond max_student_nll_gap. drop: not trained on. rollout: y_o takes its place.
    # error: the run ends. It is counted in each case.
    on_failure: Literal["drop", "rollout", "error"]
    # Rollouts that the teacher rewrites: all, or those that data.verifier calls wrong or right. A
    # rollout without a verdict is in all only.
    subset: Literal["all", "wrong", "right"]
    # Rollouts outside the subset. rollout: y_o is trained on. drop: they are not.
    others: Literal["rollout", "drop"]
    # Largest mean NLL of y_r under the student minus that of y_o, in nats per token, both given x:
    # a bound on how far a rewrite may lie outside the student's support. Beyond it on_failure
    # applies. null: no bound, and no pass to measure it.
    max_student_nll_gap: PositiveFloat | None
    # Arguments of the teacher's chat template where it rewrites. null: data.chat_template_kwargs.
    chat_template_kwargs: dict[str, Any] | None = None


class Columns(Section):
    """Which column of the data holds what. Exactly one of `problem` and `messages` is set.

    A name with dots is a path: `reward_model.ground_truth`, `solutions.0`.
    """

    problem: str | None  # the problem, a text
    # A conversation: a list of {role, content}, or of {from, value}.
    messages: str | None
    reference_solution: str | None  # a text, or a list of which the first is taken
    # Of verifier code: its tests, where they are in several columns a list of these.
    answer: str | list[str] | None
    system: str | None = None  # system prompts, for rows whose messages begin with none


class Dataset(Section):
    path: Name  # a file, a directory, or the name of a `datasets` dataset: see docs/data.md
    name: Name | None  # the configuration of a `datasets` dataset
    split: Name  # of a `datasets` dataset, such as train or test
    columns: Columns  # where a row has its problem, solution and answer
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
    """How rows of a dataset become problems, and how answers to them are judged."""

    system_prompt: str | None  # where a row has none of its own; null: none
    chat_template_kwargs: dict[str, Any]  # of the chat template: variables that it reads
    # of x, chat template included; longer ones are left out and counted
    max_prompt_tokens: PositiveInt
    # Judge of answers. math: equal as mathematics. code: passes the tests, in the sandbox. exact:
    # ends in the same words. none: no verdicts, and no evaluation.
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
    train: Dataset  # problems that are trained on
    validation: Dataset | None  # problems that evaluation.* asks; null, or a null path: none

    @field_validator("validation", mode="before")
    @classmethod
    def _no_path_is_no_validation(cls, value: Any) -> Any:
        """So that `data.validation.path=...` can be set where the default is none."""
        return None if isinstance(value, dict) and value.get("path", "") is None else value


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
    max_tokens: PositiveInt  # of one completion; one that reaches it has finish reason "length"
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

    def draws_from(self, temperature: float) -> bool:
        """Whether tokens are samples of the model's distribution at `temperature` and no other."""
        off = all(getattr(self, name) == value for name, value in _OFF.items() if name != "stop")
        return off and self.temperature == temperature


class LocalGeneration(Section):
    batch_size: PositiveInt  # sequences per call of Hugging Face `generate`
    dtype: Literal["fp32", "bf16"]  # of the weights that generate


# Ranks for which vLLM 0.32 holds room (--max-lora-rank); an adapter may have a lower one.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class WeightSync(Section):
    """How the student's weights reach its servers; see generation/weight_sync.py."""

    # What servers are given. merged: all weights, with student.adapter merged into them. adapter:
    # student.adapter alone, on the model that they have loaded.
    what: Literal["merged", "adapter"] = "merged"
    # How tensors travel. nccl: between GPUs. gloo: between processors. file: through `directory`.
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
    """The servers of one model. Exactly one of `urls` and `replicas` is given.

    Neither for the teacher of opsd, with weight_sync.what=adapter: the student's servers then
    answer for it, without the adapter.
    """

    urls: list[str]  # http://HOST:PORT of servers that run already
    replicas: NonNegativeInt  # servers that the run starts, on the host of its first rank
    devices: list[
        NonNegativeInt
    ]  # GPUs of those, tensor_parallel_size each; needed where there are GPUs


class Speculation(Section):
    """Drafts of several tokens that a server checks at one time; see docs/servers.md."""

    # Where drafts come from. ngram: what follows the last tokens where they stand earlier in the
    # prompt or the answer. suffix: the same out of a tree that grows with the answers of others;
    # needs the package arctic-inference in vLLM's environment.
    method: Literal["ngram", "suffix"]
    tokens: PositiveInt  # of a draft, at most
    lookup_max: PositiveInt | None = None  # of ngram: so many last tokens are looked up, or fewer
    lookup_min: PositiveInt | None = None  # but no fewer than these; null: lookup_max


class VllmServer(Section):
    """How a server is started; see serve/server.py."""

    python: Name | None  # an interpreter that has vLLM; null: $NEMO_TRD_VLLM_PYTHON or .venv-vllm
    dtype: Literal["auto", "fp32", "bf16"]  # auto: as the model is stored
    # A method of vLLM, such as fp8; null: as the model is stored. Not for a student.
    quantization: Annotated[str, Field(min_length=1)] | None = None
    tensor_parallel_size: PositiveInt  # GPUs of one server
    max_model_len: PositiveInt | None  # null: what the model allows
    max_num_seqs: PositiveInt  # sequences that a server works on at one time
    # Of a teacher: it rewrites by checking drafts. null: token by token.
    speculation: Speculation | None = None
    arguments: list[str]  # further ones of vLLM's API server
    start_timeout_seconds: PositiveFloat  # until its health check answers
    stop_timeout_seconds: PositiveFloat  # afterwards it is killed


class ServedPool(VllmPool):
    """With how its servers are started. conf/ takes what is not set from generation.vllm.server."""

    server: VllmServer  # what the run starts its replicas with


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
    max_backoff_seconds: PositiveFloat  # the longest of these waits
    recovery_timeout_seconds: NonNegativeFloat  # without any usable server for so long: give up
    stale_weights: Literal["retry", "keep", "error"]  # completions of other than current weights


class VllmSettings(Section):
    """Settings of all servers that are asked, and of those that are started.

    Of a training run `server` is only what those of a role, which are read, inherit.
    """

    server: VllmServer  # how servers are started
    client: VllmClient  # how servers are asked
    host: Name  # address that servers of the run bind; ranks on other hosts must reach it
    api_key_env: Name  # the environment variable that holds the servers' key
    api_key_file: Name | None  # or a file that does


class Vllm(VllmSettings):
    """Generation on vLLM servers."""

    student: ServedPool  # they draw rollouts
    teacher: TeacherPool  # they draw refinements, and score unless teacher.scoring=megatron
    weight_sync: WeightSync  # of the student, after each update
    compared_rollouts: PositiveInt  # so many, at the start and in every step, are scored by both


class StoredPairs(Section):
    """Columns of data.train with what was generated before; see data/stored.py."""

    rollout: Name  # y_o
    refinement: Name | None  # y_r; a row without one has a null. null: for rollouts alone


class Generation(Section):
    # Who draws samples. local: Hugging Face `generate` in the processes that train. vllm: servers.
    backend: Literal["local", "vllm"]
    # Train on stored samples: `backend` then answers the validation problems only. null: both y_o
    # and y_r are drawn.
    stored: StoredPairs | None = None
    # The run's own servers and its training ranks share GPUs, in turns: see docs/servers.md.
    colocate: bool = False
    # 0: strictly on-policy. 1: the samples of a step are drawn while the step before it trains. 2
    # or more: up to so many steps ahead, while weights change; see docs/servers.md.
    max_staleness: NonNegativeInt
    rollout: Sampling  # y_o ~ pi_theta(. | x)
    refinement: Sampling  # y_r ~ pi_T(. | x, y_o), in opsd pi_T(. | x, y*, y_o)
    local: LocalGeneration  # of backend local
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
    lr: PositiveFloat  # Adam's learning rate after the warm-up
    min_lr: NonNegativeFloat  # at the end of the schedule; at most lr
    # from lr to min_lr over train.num_steps; constant: stays at lr
    schedule: Literal["cosine", "linear", "constant"]
    warmup_fraction: Fraction  # share of train.num_steps in which the rate rises from 0 to lr
    # AdamW's: taken off the weights themselves, times the learning rate
    weight_decay: NonNegativeFloat
    betas: tuple[Fraction, Fraction]  # Adam's decay of the first and of the second moment
    eps: PositiveFloat  # added to Adam's denominator
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
    # of parameters and activations of both models; the loss is computed in fp32
    dtype: Literal["fp32", "bf16"]
    fp8: Literal["e4m3", "hybrid"] | None  # student, TransformerEngine only
    teacher_fp8: Literal["e4m3", "hybrid"] | None  # the same of the teacher
    # How TransformerEngine scales FP8 tensors. delayed: not in a pipeline, nor for a teacher in
    # FP8. blockwise: from Hopper on. mxfp8: from Blackwell on.
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


class Train(Section):
    num_steps: PositiveInt  # of the whole run, resumed parts included
    prompts_per_step: PositiveInt  # the same prompt again where the data has fewer
    rollouts_per_prompt: PositiveInt  # y_o of one x; each is refined by itself
    # trajectories of one; exactly one of this and the next is set
    micro_batch_size: PositiveInt | None
    # Tokens that a model computes at one time. Micro-batches are as many as the longer sequences of
    # their trajectories fill; what is more on the teacher's side is computed in a second part.
    max_tokens_per_micro_batch: PositiveInt | None
    # Activations that the backward pass computes again. selective: of attention. full: of each
    # layer.
    recompute: Literal["none", "selective", "full"]
    max_failed_steps: PositiveInt  # so many steps in a row without a trajectory stop the run

    @property
    def trajectories_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


class Checkpoint(Section):
    save_interval: PositiveInt  # steps from one checkpoint to the next
    keep_last: PositiveInt  # complete checkpoints; older ones are removed
    resume: Name  # auto, never, or the directory of one checkpoint
    accept_changed_data: bool  # go on although data.train gives other prompts than before
    async_save: bool  # write to disk while the next steps run
    # When the run ends write the student to RUN_DIR/export: a Hugging Face directory; with
    # student.adapter the adapter alone, as PEFT reads it.
    export_hf: bool
    # With student.adapter also write weights and adapter, merged, to RUN_DIR/export_merged.
    export_merged: bool = False


class WandB(Section):
    project: Name  # that gets the run
    entity: str | None = None  # user or team; null: the account's own
    name: str | None = None  # of the run; null: W&B makes one up


class MLflow(Section):
    experiment: Name  # name of the experiment that gets the run
    tracking_uri: Name | None = None  # of the server; null: as MLflow's environment says


class Logging(Section):
    tensorboard: bool  # write RUN_DIR/tensorboard
    wandb: WandB | None  # Weights & Biases; null: off
    mlflow: MLflow | None  # MLflow; null: off
    samples_interval: PositiveInt  # steps from one file in RUN_DIR/samples to the next
    samples_count: PositiveInt  # samples of each of these files
    progress: bool  # progress bars on stderr


class Assumptions(Section):
    """Speeds by which `nemo_trd.plan` divides FLOPs and bytes; a run does not read them."""

    bf16_tflops: PositiveFloat  # peak of one GPU
    fp8_tflops: PositiveFloat  # the same in FP8
    mfu: Share  # share of the peak that training reaches, recomputation included
    fp8_mfu: Share  # the same in FP8
    memory_bandwidth_tb: PositiveFloat  # TB/s of one GPU
    memory_utilization: Share  # share of the bandwidth that decoding and the loss reach
    nvlink_gb: PositiveFloat  # GB/s from one GPU to another of its node
    network_gb: PositiveFloat  # GB/s from one GPU to one of another node
    mean_length: Share  # mean length of prompts and answers over the longest allowed
    # Tokens of a sequence that a server with drafts (speculation) writes in one pass.
    tokens_per_decode_step: Annotated[float, Field(ge=1)] = 1.0
    student_tokens_per_second: PositiveFloat | None  # measured, of one GPU; null: estimated
    teacher_tokens_per_second: PositiveFloat | None  # the same of the teacher


class Cluster(Section):
    """The machines that a run is meant for; a run does not read it."""

    training_nodes: PositiveInt  # machines whose GPUs are the ranks of the training job
    # machines with the student's servers; 0: no machines of their own
    student_server_nodes: NonNegativeInt
    teacher_server_nodes: NonNegativeInt  # the same of the teacher
    student_server_tp: PositiveInt  # GPUs of one server
    teacher_server_tp: PositiveInt  # the same of the teacher
    gpus_per_node: PositiveInt  # of every machine
    gpu_memory_gib: PositiveFloat  # of one GPU
    reserved_gib: NonNegativeFloat  # of each GPU: CUDA context, NCCL buffers, fragmentation
    disk_gib: PositiveFloat | None  # for run.dir; null: what is free there
    assumptions: Assumptions  # speeds that the plan multiplies with

    @property
    def world_size(self) -> int:
        """Ranks of the training job."""
        return self.training_nodes * self.gpus_per_node


class Evaluation(Section):
    at_start: bool  # of the student before the first step
    at_end: bool  # of the student after the last step
    # steps from one evaluation to the next; null: none between the two
    interval: PositiveInt | None
    samples_per_problem: PositiveInt  # the k of avg@k and pass@k
    sampling: Sampling  # of the student's answers

    @property
    def wanted(self) -> bool:
        """Whether the student is ever evaluated."""
        return self.at_start or self.at_end or self.interval is not None


class Config(Section):
    run: Run  # where the run writes, and its seed
    algorithm: Algorithm  # the paper's choices: who teaches, on what, seeing what
    model: Models  # directories of student and teacher
    student: Student = Student()  # what of the student is trained
    parallel: Parallel  # how both are split over ranks
    teacher: Teacher  # who computes its distributions, and what it holds between steps
    precision: Precision  # number formats
    loss: Loss  # D(pi_T, pi_theta)
    refinement: RefinementConfig  # what the teacher is asked, and which rewrites count
    data: Data  # problems, and how answers are judged
    sandbox: Sandbox  # limits of generated programs
    generation: Generation  # who draws samples, and how
    optimizer: Optimizer  # Adam and the learning rate
    train: Train  # steps, and how a step's trajectories are laid out
    checkpoint: Checkpoint  # what is kept, and what a start goes on from
    logging: Logging  # where figures and samples go
    evaluation: Evaluation  # avg@k and pass@k of the student during its run
    cluster: Cluster  # the machines, for nemo_trd.plan and slurm/

    @property
    def teacher_source(self) -> ModelSource:
        """Where the teacher's weights are; in opsd those are the student's at step 0."""
        return self.model.teacher or self.model.student

    @property
    def draws_rewrites(self) -> bool:
        """Whether the teacher rewrites rollouts during the run."""
        return self.algorithm.trajectory == "refinement" and self.generation.stored is None

    @property
    def teacher_is_student(self) -> bool:
        """Whether the teacher in Megatron is the student's own modules with other weights in them.

        Those below its adapter; with `teacher.ema` the average of what is trained.
        """
        own = self.model.teacher is None and self.teacher.scoring == "megatron"
        return own and (self.student.adapter is not None or self.teacher.ema is not None)

    @property
    def served_adapter(self) -> Adapter | None:
        """What the student's servers are given; None: all weights."""
        vllm = self.generation.vllm
        on_servers = vllm is not None and vllm.weight_sync.what == "adapter"
        return self.student.adapter if on_servers else None

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher has work outside Megatron: to rewrite, or to score."""
        return self.draws_rewrites or self.scores_on_servers

    @property
    def teacher_on_student_servers(self) -> bool:
        """Whether the student's servers answer for the teacher, too: as its base, unadapted."""
        vllm = self.generation.vllm
        if vllm is None or self.served_adapter is None or self.model.teacher is not None:
            return False
        without_any = not vllm.teacher.urls and not vllm.teacher.replicas
        return without_any and self.asks_teacher and self.asks_student

    @property
    def asks_student(self) -> bool:
        """Whether the student answers anything outside Megatron."""
        return self.generation.stored is None or self.evaluation.wanted

    @property
    def scores_on_servers(self) -> bool:
        """Whether the teacher's distributions come from its servers, and no rank holds it."""
        return self.teacher.scoring != "megatron"

    @property
    def shows_prompt_to_teacher(self) -> bool:
        """Whether it may score without the refinement prompt; see `trajectories.pair`."""
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
        for where in ("local", "vllm", "colocate"):
            del settings["generation"][where]
        if self.generation.stored is None:  # as before there was this setting
            del settings["generation"]["stored"]
        of_teacher = ("chat_template_kwargs", "ema")  # the rest of the section is only speed
        set_ones = {x: value for x in of_teacher if (value := getattr(self.teacher, x)) is not None}
        if set_ones:
            settings["teacher"] = set_ones
        if self.refinement.chat_template_kwargs is None:  # as before there was this setting
            del settings["refinement"]["chat_template_kwargs"]
        if not self.student.moe_aux_loss_coeff:  # likewise
            del settings["student"]["moe_aux_loss_coeff"]
        if self.student.adapter is None:
            del settings["student"]["adapter"]
        if not settings["student"]:
            del settings["student"]
        if self.loss.entry_clip is None:
            del settings["loss"]["entry_clip"]
        for knob in ("micro_batch_size", "max_tokens_per_micro_batch", "recompute"):
            del settings["train"][knob]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
