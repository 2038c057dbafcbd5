"""TRD for the trainers of NeMo-Aligner 0.7.0, and a trainer of Aligner's shape for TRD.

`TRDStudent` is the model that Aligner's trainers drive. One call of `get_loss_and_metrics` is one
step of TRD up to its gradients: rollouts for the prompts of the batch, their refinements, and the
divergence along them. The update is `TRDStudent.optimizer`'s, as ever.

    model = TRDStudent(run)
    SupervisedTrainer(model=model, optimizer=model.optimizer, scheduler=model.scheduler,
                      ckpt_callback=model.checkpoint_callback, ...).fit()

`TRDTrainer` has the methods that users of `ReinforceTrainer` know, over the loop of
`nemo_trd.train`. examples/nemo_aligner/train_gpt_trd.py starts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from nemo_trd.adapters.needed import needed
from nemo_trd.algorithm.acceptance import refinement_counts
from nemo_trd.algorithm.trajectories import pair
from nemo_trd.data.types import GenerationRequest, Prompt, Refinement, Trajectory
from nemo_trd.distributed.exchange import merge_shares, own_share
from nemo_trd.generation.protocol import request_seed
from nemo_trd.megatron.student import StepResult
from nemo_trd.run.run import Run
from nemo_trd.train import learn, sample, train

with needed(
    "nemo-aligner==0.7.0",
    "pip install -r requirements-aligner.txt in an environment of its own, with nemo_trd there by "
    "--no-deps: no extra can name it, its pins (transformers 4, numpy 1) exclude those of nemo_trd",
):
    from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface

Batch = dict[str, Any]


def collate_prompts(prompts: list[Prompt]) -> Batch:
    """Aligner's data loaders over `run.inputs.training_prompts` take this as their `collate_fn`."""
    return {"prompts": prompts}


class TRDStudent(AlignableGenerativeInterface):
    """A run of TRD as a model. All methods are collective; batches are a data parallel rank's.

    Aligner asks Megatron's global state for ranks and groups. It is set up here, with the
    student's layout, unless it is there already.
    """

    # Clipping is then left to the optimizer, where `optimizer.clip_grad` says how much.
    use_mcore_dist_optim = True
    with_megatron_fused_adam = False

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cfg = OmegaConf.create({"global_batch_size": run.config.train.prompts_per_step})
        layout = run.config.parallel.student
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_global_memory_buffer()  # made with the models; made again here
            parallel_state.initialize_model_parallel(
                layout.tensor_model_parallel_size,
                layout.pipeline_model_parallel_size,
                layout.virtual_pipeline_model_parallel_size,
                context_parallel_size=layout.context_parallel_size,
            )
        assert parallel_state.get_data_parallel_rank() == run.student.groups.dp.rank()
        self.optimizer = _Optimizer(self)
        self.scheduler = _Scheduler()
        self.checkpoint_callback = _CheckpointCallback(run)
        self._pending: _Pending | None = None

    def get_loss_and_metrics(self, batch: Batch, forward_only: bool) -> tuple[float, Batch]:
        """The mean divergence along the refinements of `batch["prompts"]`, and what else is known.

        Without `forward_only` the gradients are there afterwards. The metrics are the same object
        that the trainer logs after the update: grad_norm and lr join them then. Where no
        refinement can be trained on, the loss is NaN, and the update will be none.
        """
        prompts = merge_shares(batch["prompts"], self.run.student.groups.dp)
        refinements = sample(self.run, prompts, self.run.step, self.run.timers)
        if forward_only:
            return self.compare(refinements)
        return self.compute_gradients(refinements)

    def compute_gradients(self, refinements: Sequence[Refinement]) -> tuple[float, Batch]:
        """As `get_loss_and_metrics`, along refinements that all ranks have."""
        run = self.run
        refinements = run.within_support(refinements)
        measured = run.journal.measure(refinements, run.weight_version)
        trajectories = pair(refinements, run.config, run.inputs.teacher_prompt)
        result = learn(run, trajectories, run.student.compute_gradients)
        loss, metrics = _loss_and_metrics(refinements, trajectories, measured, result)
        self._pending = _Pending(refinements, trajectories, result, measured, metrics)
        return loss, metrics

    def compare(self, refinements: Sequence[Refinement]) -> tuple[float, Batch]:
        """As `compute_gradients`, without gradients."""
        run = self.run
        refinements = run.within_support(refinements)
        trajectories = pair(refinements, run.config, run.inputs.teacher_prompt)
        result = learn(run, trajectories, run.student.compare)
        return _loss_and_metrics(refinements, trajectories, {}, result)

    def update(self) -> None:
        """One step of the optimizer, the step's record, and the new weights for the generator."""
        assert self._pending is not None, "no gradients: get_loss_and_metrics comes first"
        run, done, self._pending = self.run, self._pending, None
        result = done.result
        if result is not None:
            with run.timers("student"):
                updated = run.student.update()
            done.metrics.update(updated)
            result = replace(result, metrics=result.metrics | updated)
        run.journal.record(run.step + 1, done.refinements, done.trajectories, result, done.measured)
        run.advance(result, done.refinements)
        if result is not None:
            with run.timers("weight_sync"):
                run.sync_weights()

    @torch.no_grad()
    def infer(
        self,
        inference_batch: Batch,
        length_params: Any = None,
        sampling_params: Any = None,
        strategy: Any = None,
    ) -> Batch:
        """Continue prompts as `generation.rollout` says; the other arguments must be None.

        Args:
            inference_batch: `text`, int64 [b, s], right-padded, and `length`, [b].

        Returns:
            response_tokens [b, longest], prompts included and right-padded with 0;
            response_lengths and prompt_lengths [b]; is_end [b], whether it ended with an EOS;
            predictions, the decoded continuations.
        """
        assert length_params is sampling_params is strategy is None, "set generation.rollout"
        texts, lengths = inference_batch["text"].tolist(), inference_batch["length"].tolist()
        own = [tuple(row[:length]) for row, length in zip(texts, lengths, strict=True)]
        run, replicas = self.run, self.run.student.groups.dp
        requests = [
            GenerationRequest(ids, request_seed(run.config.run.seed, "infer", run.step, number))
            for number, ids in enumerate(merge_shares(own, replicas))
        ]
        sampling = run.config.generation.rollout
        answers = own_share(run.sampler.complete(requests, sampling, "answers"), replicas)
        rows = [torch.tensor(x + a.token_ids) for x, a in zip(own, answers, strict=True)]
        return {
            "response_tokens": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "response_lengths": torch.tensor([len(row) for row in rows]),
            "prompt_lengths": torch.tensor(lengths),
            "is_end": torch.tensor([a.finish_reason in ("stop", "stop_string") for a in answers]),
            "predictions": [run.inputs.decode(a.token_ids) + a.tail for a in answers],
        }

    # Whatever has to happen around a step happens inside of it: models switch between training
    # and evaluation, buffers of gradients are zeroed, and the generator has the newest weights.

    def prepare_for_training(self) -> None: ...

    def finish_training(self) -> None: ...

    def prepare_for_training_step(self) -> None: ...

    def finish_training_step(self) -> None: ...

    def prepare_for_validation_step(self) -> None: ...

    def finish_validation_step(self) -> None: ...

    def prepare_for_inference(self) -> None: ...

    def finish_inference(self) -> None: ...


@dataclass(frozen=True)
class _Pending:
    """A step whose gradients are there and whose update is not."""

    refinements: Sequence[Refinement]
    trajectories: Sequence[Trajectory]
    result: StepResult | None
    measured: Mapping[str, float]
    metrics: Batch  # what the trainer was given


def _loss_and_metrics(
    refinements: Sequence[Refinement],
    trajectories: Sequence[Trajectory],
    measured: Mapping[str, float],
    result: StepResult | None,
) -> tuple[float, Batch]:
    metrics = {"loss": float("nan"), **refinement_counts(refinements, trajectories), **measured}
    metrics |= result.metrics if result else {}
    return metrics["loss"], metrics


class _Optimizer:
    """The student's optimizer, as far as Aligner's trainers use one."""

    def __init__(self, model: TRDStudent) -> None:
        self._model = model

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._model.run.student.optimizer.param_groups

    def zero_grad(self) -> None:
        """Gradients are zeroed where new ones are computed."""

    def step(self, closure: None = None) -> None:
        self._model.update()


class _Scheduler:
    """The student's is stepped with its optimizer, before each update."""

    def step(self) -> None: ...


class _CheckpointCallback:
    """Saves the run where Aligner would save a .nemo file: below RUN_DIR/checkpoints."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def custom_save(
        self, monitor_candidates: Mapping[str, torch.Tensor], is_train_end: bool = False
    ) -> None:
        """`checkpoint.keep_last` decides what is kept, not a monitored value."""
        self._run.save()


class TRDTrainer:
    """The loop of `nemo_trd.train` under the names of Aligner's trainers.

    `fit` is that loop. The other methods are its parts, for scripts that go through a step by
    hand: `run_training(generate_rollouts()[0])` is one step.
    """

    def __init__(self, model: TRDStudent) -> None:
        self.model = model
        self.run = model.run

    def fit(self) -> int:
        """All steps that are left, with validation and saving as configured; the exit code."""
        return train(self.run)

    @torch.no_grad()
    def generate_rollouts(self) -> tuple[list[Refinement], dict[str, float], dict[str, float]]:
        """The samples of this step: refinements, each with its rollout; counts; seconds."""
        run = self.run
        refinements = sample(run, run.inputs.prompts(run.step), run.step, run.timers)
        return refinements, dict(refinement_counts(refinements, ())), run.timers.phases()

    def run_training(self, refinements: Sequence[Refinement]) -> tuple[float, dict[str, float]]:
        """One update along these refinements: loss and metrics."""
        loss, metrics = self.model.compute_gradients(refinements)
        self.model.update()
        return loss, metrics

    def run_validation(self) -> dict[str, float]:
        """avg@k and pass@k on the validation problems; empty where there are none."""
        accuracy = self.run.evaluate()
        return {} if accuracy is None else accuracy.summary()

    def state_dict(self) -> dict[str, int]:
        """Where the run stands. Loading it is `checkpoint.resume`'s."""
        samples = self.run.step * self.run.config.train.prompts_per_step
        epoch = samples // len(self.run.inputs.training_prompts)
        return {"step": self.run.step, "consumed_samples": samples, "epoch": epoch}

    def save(self) -> None:
        self.run.save()


class AlignerTracker:
    """Figures of a run for Aligner's `CustomLoggerWrapper`, under train/, val/ and timers/."""

    PREFIXES = {"evaluation": "val/", "seconds": "timers/"}

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def log(self, step: int, values: Mapping[str, float]) -> None:
        by_prefix: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            group, _, rest = name.rpartition("/")
            prefix = self.PREFIXES.get(group, "train/")
            short = rest if group in self.PREFIXES else name
            by_prefix.setdefault(prefix, {})[short] = value
        for prefix, metrics in by_prefix.items():
            self._logger.log_metrics(metrics, step=step, prefix=prefix)

    def close(self, succeeded: bool) -> None:
        self._logger.finalize()
