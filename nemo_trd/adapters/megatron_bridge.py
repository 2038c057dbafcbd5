"""TRD in recipes of Megatron-Bridge 0.6.2.

    config = qwen3_8b_pretrain_config()   # any recipe, any GPT architecture that Bridge has
    trd = TRD(compose([...]))             # TRD's own settings: data, teacher, loss, generation
    pretrain(trd_recipe(config, trd), trd.forward_step, callbacks=[trd_callback(trd)])

Bridge owns model, optimizer, schedule and checkpoints. Before a step the callback draws its samples
and asks the teacher; the forward step takes the divergence; after it the callback brings the new
weights to the generator, under their Hugging Face names. The translation is done here, everything
else by the modules that the loop uses.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from transformers import AutoConfig

from nemo_trd.adapters.needed import needed
from nemo_trd.algorithm import micro_batches
from nemo_trd.algorithm.acceptance import refinement_counts
from nemo_trd.algorithm.refinement import privileged_context
from nemo_trd.algorithm.trajectories import pair, sequence_lengths
from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config
from nemo_trd.data.prompts import prompts_of_step
from nemo_trd.data.types import Microbatch, Prompt
from nemo_trd.distributed.exchange import raise_together
from nemo_trd.distributed.process import device
from nemo_trd.megatron.context_parallel import own_part
from nemo_trd.megatron.finite import Findings, NonFiniteError, first_bad_value
from nemo_trd.megatron.loss_head import LossHead
from nemo_trd.megatron.model import HiddenStatesModel, load_hf_config
from nemo_trd.megatron.schedule import is_last_stage, run_model
from nemo_trd.megatron.teacher import Teacher
from nemo_trd.models.family import shared_vocab_size
from nemo_trd.models.read import read_tokenizer
from nemo_trd.preflight.models import real_vocab_size
from nemo_trd.run.generators import Generators
from nemo_trd.run.inputs import load_training_prompts
from nemo_trd.run.sampling import Sampler

log = logging.getLogger(__name__)

Item = tuple[Microbatch, Tensor | None]  # with the teacher's hidden states, on the last stage


def returning_hidden_states(models: list[Any]) -> list[Any]:
    """A hook on Bridge's model provider: its GPT models stop before the output layer."""
    for model in models:
        kind = type(model)  # by its name Bridge finds how weights are called
        model.__class__ = type(kind.__name__, (HiddenStatesModel, kind), {})
    return models


class TRDForwardStep:
    """Megatron's forward step: the divergence along the labels of a micro-batch.

    `head` is there on the last stage once there are process groups: `TRD` makes it. `left` is the
    number of micro-batches that are yet to come in this step.
    """

    head: LossHead | None = None

    def __init__(self, left: Callable[[], int]) -> None:
        self._left = left
        self._findings: list[Findings] = []

    def __call__(
        self,
        state: Any,
        data_iterator: Iterator[Item],
        model: Any,
        return_schedule_plan: bool = False,
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Hidden states, and the function from them to loss sum, number of labels, and report."""
        assert not return_schedule_plan, "expert parallel overlap has no micro-batches of TRD"
        micro_batch, teacher_states = next(data_iterator)
        hidden = run_model(model, micro_batch.student)
        return hidden, partial(self._divergence, micro_batch, teacher_states, model)

    def _divergence(
        self, micro_batch: Microbatch, teacher_states: Tensor | None, model: Any, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert teacher_states is not None and self.head is not None
        weight = get_attr_wrapped_model(model, "output_weight")()
        result, findings = self.head.divergence(hidden, weight, micro_batch, teacher_states)
        self._check(findings)
        count = torch.full((), result.count, dtype=torch.int, device=device())
        # Bridge divides the first by the second, over all micro-batches and ranks.
        report = {
            name: torch.stack([total.detach().float(), count.float()])
            for name, total in {"loss": result.loss_sum, **result.metrics}.items()
        }
        return result.loss_sum, count, report

    def _check(self, findings: Findings) -> None:
        """Read what a step has found at its last micro-batch: no weight has moved yet.

        Raises:
            NonFiniteError: naming the trajectory.
        """
        self._findings.append(findings)
        if self._left():
            return
        error, self._findings = first_bad_value(self._findings), []
        if error:
            raise NonFiniteError(error)


class TRD:
    """TRD for a recipe of Bridge. Everything after `start` is collective."""

    def __init__(self, config: Config) -> None:
        _check(config)
        self.config = config
        self.micro_batches: deque[Item] = deque()
        self.forward_step = TRDForwardStep(left=lambda: len(self.micro_batches))

    def start(self, groups: ProcessGroupCollection) -> None:
        """Read data and tokenizers, and make teacher and generators, beside Bridge's model.

        The student may be of any architecture; the teacher is one that `nemo_trd` knows.

        Raises:
            ConfigError: on all ranks.
        """
        config = self.config
        student, teacher = config.model.student, config.teacher_source
        self._groups = groups
        hf = AutoConfig.from_pretrained(
            student.path, trust_remote_code=student.trust_remote_code, local_files_only=True
        )
        teacher_hf = load_hf_config(teacher.path, teacher.trust_remote_code)
        columns = shared_vocab_size(hf.get_text_config(), teacher_hf)
        tokenizers = tuple(
            read_tokenizer(source.path, source.trust_remote_code) for source in (student, teacher)
        )
        self._vocab_size = real_vocab_size(columns, tokenizers[0])
        self._teacher_tokenizer = tokenizers[1]
        self._prompts = raise_together(partial(_load_prompts, config, *tokenizers))
        self._teacher = Teacher(config, groups)
        self._generators = Generators(config, stopping=lambda: False)  # signals are for Bridge
        generators = self._generators.student, self._generators.teacher
        self._sampler = Sampler(config, *generators, *tokenizers)

    def read_teacher_head(self, model: Any) -> None:
        """Make the loss head of the last stage, with the teacher's weight in its sharding."""
        if is_last_stage(self._groups):
            split = get_attr_wrapped_model(model, "config").sequence_parallel
            head = LossHead(self.config.loss, self._vocab_size, self._groups, split)
            weight = get_attr_wrapped_model(model, "output_weight")()
            head.read_teacher_weight(self.config.teacher_source, weight)
            self.forward_step.head = head

    def draw(self, step: int, num_micro_batches: int) -> dict[str, int]:
        """Samples of a step and the teacher's states along them, for `micro_batches`: counts."""
        config = self.config
        size, seed = config.train.prompts_per_step, config.run.seed
        prompts = prompts_of_step(self._prompts, step, size, seed)
        refinements = self._sampler.sample(prompts, step).refinements
        trajectories = pair(
            refinements,
            config,
            lambda prompt: privileged_context(prompt, config, self._teacher_tokenizer),
        )
        if not trajectories:  # Adam would move the weights without a gradient
            raise RuntimeError(
                f"step {step} has nothing to train on: {refinement_counts(refinements, ())}. "
                "Fix: set refinement.on_failure=rollout, or raise the limit that was met."
            )
        plan = micro_batches.plan(
            config,
            trajectories,
            data_parallel_size=self._groups.dp.size(),
            cost=lambda trajectory: sum(sequence_lengths(trajectory)),  # of any architecture
            count=num_micro_batches,  # as many as Bridge will ask for
        )
        states = self._teacher.states(plan)
        own = [own_part(batch, self._groups.cp) for batch in plan[self._groups.dp.rank()]]
        self.micro_batches = deque(zip(own, states, strict=True))
        return refinement_counts(refinements, trajectories)

    def load_generator(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._generators.student.load_weights(iter(weights), version)

    def close(self) -> None:
        self._generators.close()


def _check(config: Config) -> None:
    """Raises ConfigError: a setting that Bridge decides, or that nothing here carries out."""
    adapter, gap = config.student.adapter, config.refinement.max_student_nll_gap
    stored = config.generation.stored
    for name, value, is_refused, rule, fix in (
        (
            "teacher.scoring",
            config.teacher.scoring,
            config.teacher.scoring != "megatron",
            "Bridge's recipes have it in Megatron",
            "set teacher.scoring=megatron",
        ),
        (
            "train.micro_batch_size",
            config.train.micro_batch_size,
            config.train.micro_batch_size is None,
            "Bridge counts sequences of a micro-batch",
            "set it, and train.max_tokens_per_micro_batch=null",
        ),
        (
            "student.adapter",
            adapter and adapter.kind,
            adapter is not None,
            "Bridge's recipe says what of its model is trained",
            "set it to null",
        ),
        (
            "student.moe_aux_loss_coeff",
            config.student.moe_aux_loss_coeff,
            bool(config.student.moe_aux_loss_coeff),
            "Bridge's recipe says how its routers are balanced",
            "set it to 0",
        ),
        (
            "teacher.ema",
            config.teacher.ema,
            config.teacher.ema is not None,
            "Bridge owns the student's weights, and nothing here follows them",
            "set it to null",
        ),
        (
            "refinement.max_student_nll_gap",
            gap,
            gap is not None,
            "Bridge owns the student, and nothing here asks it for likelihoods before a step",
            "set it to null",
        ),
        (
            "generation.stored",
            stored and stored.model_dump(),
            stored is not None,
            "samples are drawn before each step",
            "choose another generation, such as generation=vllm",
        ),
    ):
        if is_refused:
            raise rule_broken(name, value, rule, fix)


def _load_prompts(config: Config, student_tokenizer: Any, teacher_tokenizer: Any) -> list[Prompt]:
    if student_tokenizer.get_vocab().items() - teacher_tokenizer.get_vocab().items():
        raise rule_broken(
            "model.teacher.path",
            config.teacher_source.path,
            "its tokenizer has not the ids of the student's",
            "choose a teacher of the student's family",
        )
    return load_training_prompts(config, student_tokenizer, teacher_tokenizer).prompts


def next_micro_batches(queue: Callable[[], deque[Item]]) -> Iterator[Item]:
    """Micro-batches of this step. Every stage of a pipeline takes all of them, in order."""
    while True:
        yield queue().popleft()


def trd_recipe(config: Any, trd: TRD) -> Any:
    """Amend a `ConfigContainer`, in place: data, model, and how losses and batches are counted.

    Raises:
        ImportError: without Megatron-Bridge.
        ConfigError: the recipe splits the model in another way than `parallel.student`, or in
            virtual stages.
    """
    with needed(
        "megatron-bridge==0.6.2",
        "pip install 'nemo_trd[megatron-bridge]' with Python 3.12 and TransformerEngine, or use a "
        "NeMo container that has it",
    ):
        from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

    @dataclass(kw_only=True)
    class TRDDataset(DatasetProvider):
        """Micro-batches of what the callback drew."""

        dataloader_type: str = "external"
        seq_length: int = field(default=config.model.seq_length)

        def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, None, None]:
            return next_micro_batches(lambda: trd.micro_batches), None, None

    settings, layout = trd.config, trd.config.parallel.student
    sizes = ("tensor_model", "pipeline_model", "context")
    for name in (*(f"{size}_parallel_size" for size in sizes), "sequence_parallel"):
        if getattr(config.model, name) != getattr(layout, name):
            raise rule_broken(
                f"parallel.student.{name}",
                getattr(layout, name),
                f"the recipe's model has {getattr(config.model, name)}",
                "give the recipe's",
            )
    virtual = config.model.virtual_pipeline_model_parallel_size
    if virtual is not None:
        raise rule_broken(
            "model.virtual_pipeline_model_parallel_size of the recipe",
            virtual,
            "sequences of TRD differ in length, and interleaved stages take one",
            "set it to null",
        )
    config.dataset = TRDDataset()
    config.model.register_pre_wrap_hook(returning_hidden_states)
    config.model.calculate_per_token_loss = True
    config.model.variable_seq_lengths = layout.pipeline_model_parallel_size > 1
    config.ddp.average_in_collective = False  # sums, divided by one number of tokens
    # Parameters are gathered where a layer is called, and the output layer is not: it is read.
    config.ddp.overlap_param_gather = config.optimizer.overlap_param_gather = False
    if config.comm_overlap is not None:
        config.comm_overlap.overlap_param_gather = False
    config.train.train_iters = settings.train.num_steps
    config.train.micro_batch_size = settings.train.micro_batch_size
    config.train.global_batch_size = settings.train.trajectories_per_step
    config.validation.eval_iters = 0  # there are no validation micro-batches: see nemo_trd.evaluate
    return config


def trd_callback(trd: TRD) -> Any:
    """Bridge's `Callback` that draws the samples of a step, and refreshes the generator after it.

    Raises:
        ImportError: without Megatron-Bridge.
    """
    with needed("megatron-bridge==0.6.2", "pip install 'nemo_trd[megatron-bridge]', Python 3.12"):
        from megatron.bridge.models.conversion.auto_bridge import AutoBridge
        from megatron.bridge.training.callbacks import Callback, CallbackContext

    class TRDCallback(Callback):
        def on_train_start(self, context: CallbackContext) -> None:
            groups = get_attr_wrapped_model(context.model[-1], "pg_collection")
            trd.start(groups)
            trd.read_teacher_head(context.model[-1])
            source = trd.config.model.student
            self._bridge = AutoBridge.from_hf_pretrained(
                source.path, trust_remote_code=source.trust_remote_code
            )
            self._refresh(context)

        def on_train_step_start(self, context: CallbackContext) -> None:
            train, replicas = context.state.cfg.train, context.state.cfg.data_parallel_size
            count = train.global_batch_size // (train.micro_batch_size * replicas)
            counts = trd.draw(context.state.train_state.step, count)
            context.user_state["trd"] = counts
            log.info("step %d: %s", context.state.train_state.step + 1, counts)

        def on_train_step_end(self, context: CallbackContext) -> None:
            assert not trd.micro_batches, "the schedule left some"
            self._refresh(context)

        def on_train_end(self, context: CallbackContext) -> None:
            trd.close()

        def _refresh(self, context: CallbackContext) -> None:
            weights = self._bridge.export_hf_weights(context.model, show_progress=False)
            trd.load_generator(
                ((w.param_name, w.weight) for w in weights), context.state.train_state.step
            )

    return TRDCallback()
