"""Trajectory-Refined Distillation (arXiv 2606.08432): the loop, and its command line.

python -m nemo_trd.train experiment=quickstart train.num_steps=50
torchrun --nproc-per-node 4 -m nemo_trd.train parallel.student.pipeline_model_parallel_size=2 ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_trd.adapters.nemo_toolkit import hydra_entry
from nemo_trd.batching import pair
from nemo_trd.config import (
    Config,
    ConfigError,
    explain_refused_override,
    validate,
)
from nemo_trd.generation import GenerationFailed
from nemo_trd.lookahead import Lookahead
from nemo_trd.megatron.parallel import raise_together
from nemo_trd.megatron.runtime import StopRequest, end_process, init_distributed
from nemo_trd.metrics import Timers
from nemo_trd.run import Run, load_inputs
from nemo_trd.trackers import Tracker
from nemo_trd.types import Refinement


def train(run: Run) -> int:
    """Distil the teacher along its own rewrites of the student's rollouts.

    Returns the exit code: 0 when all steps are done or a stop file was found.
    """
    student, teacher, timers = run.student, run.teacher, run.timers
    samples = Lookahead(partial(sample, run), run.config, timers, run.samples_ahead)
    run.start()
    while run.step < run.config.train.num_steps:
        refinements = run.within_support(samples.take(run.step))
        samples.start(run.step + 1)  # with max_staleness 1, beside what follows
        measured = run.measure(refinements)
        trajectories = pair(refinements, run.config, run.teacher_prompt)  # x + y_r | c_T + y_r
        result = None
        if trajectories:
            micro_batches = student.pack(trajectories)
            with timers("teacher"):
                teacher_states = teacher.states(micro_batches)  # of pi_T, at the labels
            with timers("student"):  # one step on sum_t D(pi_T, pi_theta)(t) / number of t
                watched = run.watched(trajectories)
                result = student.train_step(micro_batches, teacher_states, watched)
        run.record(refinements, trajectories, result, measured)
        samples.settle()
        if result:
            with timers("weight_sync"):
                run.sync_weights()
        exit_code = run.finish_step(samples.ready)
        if exit_code is not None:
            return exit_code
    run.finish()
    return 0


def sample(run: Run, step: int, timers: Timers) -> list[Refinement]:
    """What the student answers to the prompts of a step, and how the teacher rewrites it."""
    with timers("rollout"):  # y_o ~ pi_theta(. | x)
        rollouts = run.sampler.rollouts(run.prompts(step), step)
    with timers("refinement"):  # y_r ~ pi_T(. | x, y_o), in OPSD pi_T(. | x, y*, y_o)
        return run.sampler.refinements(rollouts, step)


def launch(
    config: Config,
    work: Callable[[Run], int] = train,
    trackers: Sequence[Tracker] = (),
) -> int:
    """Join the other ranks, check everything, and train. Returns the exit code.

    An exception on any rank ends the processes of all of them, with its cause.

    Args:
        work: what is done with the run, to an exit code.
        trackers: who gets the figures of the run besides those that `config.logging` names.

    Raises:
        ConfigError: on every rank, before any model is built.
    """
    watch = init_distributed(config.parallel.timeout_minutes)
    try:
        inputs = raise_together(lambda: load_inputs(config, dist.get_world_size()))
        stop = StopRequest(config.run_dir)
        run = Run(config, inputs, stop, trackers)
        exit_code = None
        try:
            exit_code = work(run)
        except GenerationFailed:
            run.save()
            raise
        finally:
            run.close(succeeded=exit_code == 0)
        stop.close()
    except ConfigError:
        watch.close()
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    watch.close()
    return exit_code


def main(composed: DictConfig) -> None:
    try:
        sys.exit(launch(validate(composed)))
    except ConfigError as error:
        end_process(f"nemo_trd: {error}", 2)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints its own advice and exits
    try:
        hydra_entry(main)()
    except (HydraException, OmegaConfBaseException) as refused:
        end_process(f"nemo_trd: {explain_refused_override(str(refused), sys.argv[1:])}", 2)
