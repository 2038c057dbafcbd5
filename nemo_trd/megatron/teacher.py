"""The frozen teacher on Megatron: it only ever gives its final hidden states.

The student's last stage turns them into teacher logits chunk by chunk, with a copy of the
teacher's output weight in the student's vocabulary sharding. So the two models may be split in
different ways, and no teacher logits travel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import PretrainedConfig

from nemo_trd.algorithm.micro_batches import filler
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
from nemo_trd.megatron.process_groups import process_groups
from nemo_trd.megatron.schedule import label_rows, run_model, run_schedule
from nemo_trd.models.family import pack_alignment

Pack = tuple[ContextBatch, bool]  # and whether its states are handed over; else it is a filler


class Teacher:
    """Holds this rank's share of the teacher, without gradients or optimizer.

    `micro_batches[d]` below are those of the student's data parallel rank d; every rank has
    the whole plan. All methods are collective.
    """

    def __init__(
        self,
        config: Config,
        student_groups: ProcessGroupCollection,
        base: HiddenStatesModel | None = None,
    ) -> None:
        """Load the teacher.

        Args:
            base: a student with an adapter, whose own modules without it are the teacher: nothing
                is loaded then. Its layout is the teacher's.
        """
        source = config.teacher_source
        self._layout = config.parallel.teacher
        self._offload_weights = config.teacher.offload_weights
        self._offload_states = config.teacher.offload_states
        self._groups = process_groups(self._layout)
        hf = load_hf_config(source.path, source.trust_remote_code)
        self._hidden_size = hf.hidden_size
        precision = config.precision
        alignment = pack_alignment(self._layout, precision.teacher_fp8, precision.fp8_recipe)
        self._filler = filler(alignment)
        self._is_base = base is not None
        self._model = base or self._load(config, hf)
        self._dtype = self._model.config.params_dtype
        self._sources = last_stage_ranks(self._groups)
        self._destinations = last_stage_ranks(student_groups)
        if self._offload_weights:
            move(self._model, torch.device("cpu"))
        open_communicator()

    def _load(self, config: Config, hf: PretrainedConfig) -> HiddenStatesModel:
        precision = config.precision
        with torch.no_grad():  # weights in FP8 would get a second copy for the backward pass
            models = build_model(
                *(hf, self._layout, self._groups, precision),
                fp8=precision.teacher_fp8,
                frozen=True,
            )
        load_hf_weights(models, hf, config.teacher_source.path, self._groups)
        models[0].requires_grad_(False).eval()
        return models[0]

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
            move(self._model, device())
        # A pipeline without shared experts runs in lock-step with itself only: replicas may have
        # other numbers of packs, this one none.
        if any(own):
            with adapter_off([self._model]) if self._is_base else nullcontext():
                self._forward(own, hand_over)
        if self._offload_weights:
            move(self._model, torch.device("cpu"))
        return hand_over.finish()

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
            packs += [(self._filler, False)] * (most - len(own))
        return packs

    def _forward(self, rounds: Sequence[Sequence[Pack]], hand_over: HandOver) -> None:
        """Pass the packs of all rounds forward; hand over what the ones before have given."""
        cp = self._groups.cp
        packs = [
            (own_context(pack, cp.size(), cp.rank()), wanted)
            for of_round in rounds
            for pack, wanted in of_round
        ]
        behind = self._groups.pp.size() - 1 - self._groups.pp.rank()
        computed = list(accumulate(map(len, rounds)))  # packs, by round

        def keep(pack: Pack, hidden: Tensor, non_loss_data: bool) -> None:
            batch, wanted = pack
            rows = label_rows(hidden, batch, self._groups, self._layout.sequence_parallel)
            if wanted:
                hand_over.computed.append(rows)

        def forward_step(iterator, model):  # noqa: ANN001, ANN202  (megatron's signature)
            number, pack = next(iterator)
            hand_over.start(bisect_right(computed, number - behind))
            return run_model(model, pack[0]), partial(keep, pack)

        run_schedule(
            [self._model],
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
