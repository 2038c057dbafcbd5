"""The teacher on Megatron: it only ever gives its final hidden states.

The student's last stage turns them into teacher logits chunk by chunk, with a copy of the
teacher's output weight in the student's vocabulary sharding. So the two models may be split in
different ways, and no teacher logits travel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import PretrainedConfig

from nemo_trd.config.schema import Config
from nemo_trd.data.types import ContextBatch, Microbatch
from nemo_trd.distributed.process import device
from nemo_trd.megatron.context_parallel import own_context
from nemo_trd.megatron.hand_over import (
    HandOver,
    last_stage_ranks,
    open_communicator,
    rounds_of,
)
from nemo_trd.megatron.hf_weights import load_hf_weights
from nemo_trd.megatron.lora import adapter_off
from nemo_trd.megatron.model import HiddenStatesModel, build_model, load_hf_config
from nemo_trd.megatron.moving_average import MovingAverage
from nemo_trd.megatron.process_groups import process_groups
from nemo_trd.megatron.schedule import label_rows, run_model, run_schedule

Pack = tuple[ContextBatch, bool]  # and whether its states are wanted; else it is a filler


class Teacher:
    """Holds this rank's share of the teacher, without gradients or optimizer.

    `micro_batches[d]` below are those of the student's data parallel rank d; every rank has
    the whole plan. All methods are collective.
    """

    def __init__(
        self,
        config: Config,
        student_groups: ProcessGroupCollection,
        own: Sequence[HiddenStatesModel] | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """Load the teacher.

        Args:
            own: the student's own stages, which with other weights are the teacher: nothing is
                loaded then. Their layout is the teacher's.
            average: those weights. None: those below the student's adapter.
        """
        source = config.teacher_source
        self._layout = config.parallel.teacher
        self._offload_weights = config.teacher.offload_weights
        self._offload_states = config.teacher.offload_states
        self._groups = process_groups(self._layout)
        hf = load_hf_config(source.path, source.trust_remote_code)
        self._hidden_size = hf.hidden_size
        self._is_student = own is not None
        self._average = average
        self._models = own or self._load(config, hf)
        self._dtype = self._models[0].config.params_dtype
        self._sources = last_stage_ranks(self._groups)
        self._destinations = last_stage_ranks(student_groups)
        if self._offload_weights:
            self._move(torch.device("cpu"))
        open_communicator()

    def _load(self, config: Config, hf: PretrainedConfig) -> list[HiddenStatesModel]:
        precision = config.precision
        with torch.no_grad():  # weights in FP8 would get a second copy for the backward pass
            models = build_model(
                *(hf, self._layout, self._groups, precision),
                fp8=precision.teacher_fp8,
                frozen=True,
            )
        load_hf_weights(models, hf, config.teacher_source.path, self._groups)
        for model in models:
            model.requires_grad_(False).eval()
        return models

    @torch.no_grad()
    def states(self, micro_batches: Sequence[Sequence[Microbatch]]) -> list[Tensor | None]:
        """Final hidden states [n, h] at this rank's labels of each of its own micro-batches.

        They are where the student's loss is computed: on its last stage, on the context parallel
        rank that predicts the label. Elsewhere: None.
        """
        rounds = rounds_of(micro_batches, self._groups.dp.size())
        own = [
            self._packs_of_round([micro_batches[s][p].teacher for s, p in states])
            for states in rounds
        ]
        hand_over = HandOver(
            micro_batches,
            rounds,
            self._sources,
            self._destinations,
            like=torch.empty(0, self._hidden_size, dtype=self._dtype, device=device()),
            offload=self._offload_states,
        )
        if self._offload_weights:
            self._move(device())
        # A pipeline without shared experts runs in lock-step with itself only: replicas may have
        # other numbers of packs, this one none.
        if any(own):
            with self._as_teacher() if self._is_student else nullcontext():
                self._forward(own, hand_over)
        if self._offload_weights:
            self._move(torch.device("cpu"))
        return hand_over.finish()

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """Have the student's modules compute as the teacher, until the end of the block."""
        average = self._average
        with adapter_off(self._models) if average is None else average.in_place():
            for model in self._models:
                model.eval()  # an adapter drops nothing
            try:
                yield
            finally:
                for model in self._models:
                    model.train()

    def _move(self, target: torch.device) -> None:
        for model in self._models:
            move(model, target)

    def _packs_of_round(self, of_teachers: Sequence[Sequence[ContextBatch]]) -> list[Pack]:
        """This replica's packs of a round, which may have none for it.

        Replicas that share out experts meet in every sparse layer: those with fewer packs pass
        fillers.
        """
        mine = self._groups.dp.rank()
        own = of_teachers[mine] if mine < len(of_teachers) else ()
        packs: list[Pack] = [(pack, True) for pack in own]
        if self._layout.expert_model_parallel_size * self._layout.expert_tensor_parallel_size > 1:
            most = max(map(len, of_teachers))
            packs += [(of_teachers[0][0], False)] * (most - len(own))
        return packs

    def _forward(self, rounds: Sequence[Sequence[Pack]], hand_over: HandOver) -> None:
        """Pass the packs of all rounds forward; hand over what the ones before have given.

        Where stages interleave, all is handed over at the end: the order of passes is another.
        """
        cp, pp = self._groups.cp, self._groups.pp
        packs = [
            (own_context(pack, cp.size(), cp.rank()), wanted)
            for of_round in rounds
            for pack, wanted in of_round
        ]
        interleaved = len(self._models) > 1
        if interleaved:  # it takes a multiple of the stages
            packs += [(packs[-1][0], False)] * (-len(packs) % pp.size())
        behind = pp.size() - 1 - pp.rank()
        computed = list(accumulate(map(len, rounds)))  # packs, by round

        def keep(pack: Pack, hidden: Tensor, non_loss_data: bool) -> None:
            batch, wanted = pack
            rows = label_rows(hidden, batch, self._groups, self._layout.sequence_parallel)
            if wanted:
                hand_over.computed.append(rows)

        def forward_step(iterator, model):  # noqa: ANN001, ANN202  (megatron's signature)
            number, pack = next(iterator)
            if not interleaved:
                hand_over.start(bisect_right(computed, number - behind))
            return run_model(model, pack[0]), partial(keep, pack)

        run_schedule(
            self._models,
            forward_step,
            list(enumerate(packs)),
            [batch for batch, _ in packs],
            self._groups,
            forward_only=True,
            collect=True,
        )


def move(model: torch.nn.Module, target: torch.device) -> None:
    """Move frozen parameters to a device, those in FP8 too.

    `Module.to` would set their data, which TransformerEngine brings back to where they were.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            moved = torch.nn.Parameter(parameter.detach().to(target), requires_grad=False)
            module._parameters[name] = moved
