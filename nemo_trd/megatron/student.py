"""The student on Megatron: distillation steps, scoring, and its weights as Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from nemo_trd.algorithm import micro_batches
from nemo_trd.config.schema import Config
from nemo_trd.data.types import LabelValues, Microbatch, Trajectory
from nemo_trd.distributed.exchange import merge_shares
from nemo_trd.distributed.process import device
from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron import finite, lora
from nemo_trd.megatron.context_parallel import at_all_labels, own_part
from nemo_trd.megatron.hf_weights import export_hf_weights, load_hf_weights
from nemo_trd.megatron.learning_rate import scheduler
from nemo_trd.megatron.load_balancing import LoadBalancing
from nemo_trd.megatron.loss_head import LossHead
from nemo_trd.megatron.model import build_model, load_hf_config
from nemo_trd.megatron.moving_average import MovingAverage
from nemo_trd.megatron.offload import offloaded
from nemo_trd.megatron.optimizer import make_optimizer, optimizer_tensors
from nemo_trd.megatron.process_groups import process_groups
from nemo_trd.megatron.reports import Report, read_labels, read_sums, read_watched
from nemo_trd.megatron.schedule import is_last_stage, run_model, run_schedule
from nemo_trd.models.family import shared_vocab_size
from nemo_trd.models.peft import scale
from nemo_trd.models.served import is_only_served, read_served
from nemo_trd.models.vocabulary import load_tokenizer
from nemo_trd.preflight.models import real_vocab_size


@dataclass(frozen=True)
class StepResult:
    """Result of one step of the student, the same on all ranks."""

    metrics: dict[str, float]  # means over the label tokens of the global batch
    watched: dict[str, LabelValues]  # by the trajectory's name


class Student:
    """Holds this rank's share of the student and of its optimizer. All methods are collective.

    average: the weights of a teacher that follows the student (`teacher.ema`), else None.
    """

    def __init__(self, config: Config) -> None:
        source = config.model.student
        self._config = config
        self.layout = config.parallel.student
        self.groups = process_groups(self.layout)
        self.hf = load_hf_config(source.path, source.trust_remote_code)
        self.models = build_model(
            self.hf,
            self.layout,
            self.groups,
            config.precision,
            recompute=config.train.recompute,
            fp8=config.precision.fp8,
        )
        load_hf_weights(self.models, self.hf, source.path, self.groups)
        self.adapter = config.student.adapter
        if self.adapter is not None:
            lora.add_adapters(self.models, self.hf, self.adapter, self.groups, config.run.seed)
        ema = config.teacher.ema
        self.average = None if ema is None else MovingAverage(self.models, ema)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,  # nemo_trd.megatron.finite does, when the passes are done
            use_distributed_optimizer=config.optimizer.distributed,
            overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        )
        self.chunks = [
            DistributedDataParallel(m.config, ddp, m, pg_collection=self.groups)
            for m in self.models
        ]
        for model in self.models:
            model.config.finalize_model_grads_func = finalize_model_grads
            if config.optimizer.overlap_grad_reduce:
                syncs = [chunk.no_sync for chunk in self.chunks]
                model.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        self.optimizer = make_optimizer(config, self.chunks, self.groups)
        self.scheduler = scheduler(config.optimizer, config.train.num_steps, self.optimizer)
        teacher = _teacher_hf(config)
        self._columns = shared_vocab_size(self.hf, teacher)
        in_megatron = config.teacher.scoring == "megatron"
        self._cost = micro_batches.trajectory_flops(self.hf, teacher if in_megatron else None)
        self._head = self._loss_head(config)

    @property
    def vocab_size(self) -> int:
        """Number of token ids over which the divergence runs."""
        return self._head.vocab_size

    def _loss_head(self, config: Config) -> LossHead:
        """Head of the last stage, with the teacher's frozen output weight where it is there."""
        vocab_size = real_vocab_size(self._columns, load_tokenizer(config.model.student))
        split = self.layout.sequence_parallel
        trained = config.student.adapter is None  # with an adapter the output weight is frozen
        head = LossHead(config.loss, vocab_size, self.groups, split, into_main_grad=trained)
        in_megatron = config.teacher.scoring == "megatron"
        if in_megatron and not is_only_served(config) and is_last_stage(self.groups):
            weight = self.models[-1].output_weight()
            if not trained and config.teacher_is_student:  # no adapter is on it
                head.teacher_weight = weight
            elif self.average is not None:
                head.teacher_weight = self.average.of(weight)
            else:
                head.read_teacher_weight(config.teacher_source, weight)
        return head

    def pack(self, trajectories: Sequence[Trajectory]) -> list[list[Microbatch]]:
        """Micro-batches of every data parallel rank: `plan[rank][position]`."""
        interleaved = len(self.models) > 1  # this schedule wants one length for all
        return micro_batches.plan(
            self._config,
            trajectories,
            data_parallel_size=self.groups.dp.size(),
            cost=self._cost,
            multiple=self.groups.pp.size() if interleaved else 1,
            same_length=interleaved,
        )

    def train_step(
        self,
        plan: Sequence[Sequence[Microbatch]],
        teacher_states: Sequence[Tensor | TopK | None],
        watch: Collection[str] = (),
    ) -> StepResult:
        """Minimise the divergence along the labels: sum over tokens / their global number.

        And beside it, with `student.moe_aux_loss_coeff`, the load-balancing loss of its experts.

        Args:
            plan: what `pack` returned.
            teacher_states: the teacher's hidden states [n, h], or its top k, at this rank's labels
                of each of its data parallel rank's micro-batches, on the last stage.
            watch: names of the trajectories whose values at each label are wanted.

        Raises:
            NonFiniteError: naming the trajectory. No weight has changed.
        """
        result = self.compute_gradients(plan, teacher_states, watch)
        return replace(result, metrics=result.metrics | self.update())

    def compute_gradients(
        self,
        plan: Sequence[Sequence[Microbatch]],
        teacher_states: Sequence[Tensor | TopK | None],
        watch: Collection[str] = (),
    ) -> StepResult:
        """The first half of `train_step`: no weight changes."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self._dropout():
            return self._compare_all(plan, teacher_states, watch, forward_only=False)

    def _dropout(self) -> AbstractContextManager[None]:
        if self.adapter is None or not self.adapter.dropout:
            return nullcontext()
        return lora.dropout_of(self.scheduler.num_steps, self._config.run.seed, self.groups)

    def update(self) -> dict[str, float]:
        """The second half of `train_step`: grad_norm and lr."""
        self.scheduler.step(increment=1)
        updated, grad_norm, _ = self.optimizer.step()
        assert updated, "only loss scaling skips updates, and bf16 and fp32 have none"
        if self.average is not None:
            self.average.update()
            self._follow_average()
        return {"grad_norm": float(grad_norm), "lr": self.optimizer.param_groups[0]["lr"]}

    def load_average(self, saved: Mapping[str, Tensor]) -> None:
        """Take over the average of a checkpoint."""
        assert self.average is not None
        self.average.load(saved)
        self._follow_average()

    def _follow_average(self) -> None:
        """Give the loss head the teacher's output weight as it is now."""
        assert self.average is not None
        if self.adapter is None and self._head.teacher_weight is not None:
            self._head.teacher_weight = self.average.of(self.models[-1].output_weight())

    @torch.no_grad()
    def compare(
        self,
        plan: Sequence[Sequence[Microbatch]],
        teacher_states: Sequence[Tensor | TopK | None],
        watch: Collection[str] = (),
    ) -> StepResult:
        """Report as `train_step` does, except grad_norm and lr, of weights as they are."""
        for chunk in self.chunks:
            chunk.eval()
        result = self._compare_all(plan, teacher_states, watch, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return result

    def _compare_all(
        self,
        plan: Sequence[Sequence[Microbatch]],
        teacher_states: Sequence[Tensor | TopK | None],
        watch: Collection[str],
        *,
        forward_only: bool,
    ) -> StepResult:
        own = self._own(plan)
        balancing = self._load_balancing(plan)
        balances = [balancing and balancing.of(micro_batch) for micro_batch in own]
        reports = run_schedule(  # in here nothing is read back from the device
            self.chunks,
            self._forward_step(self._divergence),
            list(zip(own, teacher_states, balances, strict=True)),
            [micro_batch.student for micro_batch in own],
            self.groups,
            forward_only=forward_only,
        )
        finite.check([r.findings for r in reports], () if forward_only else self.chunks)
        watched = read_watched(reports, watch, self.groups.cp)
        share = [(read_sums(reports), watched)] if reports else []
        result = _merged(self._everyone(share))
        shares = micro_batches.real_token_share(plan)
        if self._config.scores_on_servers:
            del shares["teacher_real_token_share"]  # servers pack in ways of their own
        balance = {} if balancing is None else balancing.read()
        return replace(result, metrics=result.metrics | shares | balance)

    @torch.no_grad()
    def teacher_top_k(
        self,
        teacher_states: Tensor | TopK,
        micro_batch: Microbatch,
        k: int,
        *,
        padded: bool = False,
    ) -> TopK:
        """The teacher's k most likely ids at the n labels of one micro-batch.

        On the last stage, with what the teacher gave there: its hidden states [m, h] at this rank's
        labels, or already its top k. With `padded`, of its distribution over the ids without a
        token too, as a server computes it. Collective over tensor and context parallel ranks.
        """
        vocab_size = self._columns if padded else self.vocab_size
        part = own_part(micro_batch, self.groups.cp)
        top = self._head.teacher_top_k(teacher_states, part.labels, k, vocab_size)
        ids, log_probs, of_labels = (
            at_all_labels(values.t() if values.dim() == 2 else values, part, self.groups.cp)
            for values in (top.ids, top.log_probs, top.label_log_probs)
        )
        return TopK(ids.t(), log_probs.t(), of_labels)

    @torch.no_grad()
    def token_nll(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        """Negative log-likelihood of each label token, in nats, by trajectory name.

        Under the student's own distribution, over all columns of its output layer: what a server
        of this student tells.
        """
        for chunk in self.chunks:
            chunk.eval()
        own = self._own(self.pack(trajectories))
        reports = run_schedule(
            self.chunks,
            self._forward_step(self._nll),
            [(micro_batch, None, None) for micro_batch in own],
            [micro_batch.student for micro_batch in own],
            self.groups,
            forward_only=True,
            collect=True,
        )
        for chunk in self.chunks:
            chunk.train()
        shares = self._everyone([read_labels(reports, self.groups.cp)])
        return {name: nll for share in shares for name, nll in share.items()}

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Hold no memory of weights, gradients and optimizer on the device, and compute nothing.

        Weights and optimizer states wait on the host. Gradients are gone, and so are the FP8 forms
        of the weights, which the next first micro-batch makes again.
        """
        for model in self.models:
            for module in model.modules():
                getattr(module, "_fp8_workspaces", {}).clear()  # of TransformerEngine's layers
        buffers = [b for c in self.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        weights = [t for m in self.models for t in (*m.parameters(), *m.buffers())]
        weights += [b.param_data for b in buffers if b.param_data is not None]
        head = self._head.teacher_weight
        states = optimizer_tensors(self.optimizer)
        average = [] if self.average is None else self.average.tensors
        kept = [*weights, *states, *average, *([] if head is None else [head])]
        with offloaded(kept, forgotten=[buffer.grad_data for buffer in buffers]):
            yield

    def export_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name, whole, on every rank, one at a time.

        An adapter is merged into what is exported; the weights here stay as they are.
        """
        added = {} if self.adapter is None else lora.added_to_weights(self.models, self.adapter)
        return export_hf_weights(self.models, self.hf, self.groups, added)

    def export_teacher_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The average of the student's weights, as `export_hf_weights`.

        The student computes with it until the iterator is at its end or closed.
        """
        assert self.average is not None
        with self.average.in_place():
            yield from self.export_hf_weights()

    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the adapter under its name in PEFT, likewise."""
        assert self.adapter is not None
        return lora.export_adapter(self.models, self.hf, self.adapter, self.groups)

    def export_scaled_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """The same, with B multiplied by the scale: B A x is what is added."""
        assert self.adapter is not None
        factor = scale(self.adapter)
        for name, tensor in self.export_adapter():
            yield name, tensor * factor if ".lora_B." in name else tensor

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds of each model of this rank, "chunk0", "chunk1", ...

        All of it; with an adapter that alone, since its base does not change.
        """
        return {
            f"chunk{index}": model.sharded_state_dict(metadata=metadata)
            if self.adapter is None
            else lora.sharded_state_dict(model, self.groups)
            for index, model in enumerate(self.models)
        }

    def _own(self, plan: Sequence[Sequence[Microbatch]]) -> list[Microbatch]:
        """What this rank computes: its data parallel rank's micro-batches, its part of each."""
        return [
            own_part(micro_batch, self.groups.cp) for micro_batch in plan[self.groups.dp.rank()]
        ]

    def _load_balancing(self, plan: Sequence[Sequence[Microbatch]]) -> LoadBalancing | None:
        coefficient = self._config.student.moe_aux_loss_coeff
        if not coefficient:
            return None
        return LoadBalancing(coefficient, plan, self.models[0].config, self.groups)

    def _forward_step(self, loss: Any) -> Any:
        def forward_step(iterator, model):  # noqa: ANN001, ANN202  (megatron's signature)
            micro_batch, teacher_states, balance = next(iterator)
            hidden = run_model(model, micro_batch.student, balance)
            return hidden, partial(loss, micro_batch, teacher_states)

        return forward_step

    def _divergence(
        self, micro_batch: Microbatch, teacher_states: Tensor | TopK, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Report]:
        weight = self.models[-1].output_weight()
        result, findings = self._head.divergence(hidden, weight, micro_batch, teacher_states)
        tokens = torch.full((), result.count, dtype=torch.int, device=device())
        values = torch.stack([result.token_divergence, *result.token_nll])
        return result.loss_sum, tokens, Report(micro_batch, result.metrics, findings, values)

    def _nll(
        self, micro_batch: Microbatch, _: None, hidden: Tensor, non_loss_data: bool
    ) -> tuple[Microbatch, Tensor]:
        weight = self.models[-1].output_weight()
        return micro_batch, self._head.token_nll(hidden, weight, micro_batch, self.hf.vocab_size)

    def _everyone(self, share: list[Any]) -> list[Any]:
        """What data and context parallel ranks have read of their last stages, on every rank."""
        has_it = is_last_stage(self.groups) and self.groups.tp.rank() == 0
        return merge_shares(share if has_it else [])


def _merged(shares: Sequence[tuple[dict[str, float], dict[str, LabelValues]]]) -> StepResult:
    """Result of a step from sums over labels and watched values of ranks that share its loss."""
    totals = {name: sum(sums[name] for sums, _ in shares) for name in shares[0][0]}
    tokens = totals.pop("tokens")
    means = {name: total / tokens for name, total in totals.items()}
    metrics = {**means, "loss": means["divergence"], "label_tokens": tokens}
    return StepResult(metrics, {name: v for _, own in shares for name, v in own.items()})


def _teacher_hf(config: Config) -> Any:
    """Settings of the teacher's model: of its directory, or what its servers are known to serve."""
    source, vllm = config.teacher_source, config.generation.vllm
    if is_only_served(config):
        assert vllm is not None  # config.teacher_rules: servers score
        return read_served(source, "model.teacher.path", vllm.teacher.server)
    return load_hf_config(source.path, source.trust_remote_code)
