"""Trajectory-Refined Distillation (arXiv 2606.08432): the loop, and its command line.

python -m nemo_trd.train experiment=quickstart train.num_steps=50
python -m nemo_trd.launch --nproc 4 parallel.student.pipeline_model_parallel_size=2 ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeAlias

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from nemo_trd.algorithm.trajectories import pair
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.hydra_entry import hydra_entry
from nemo_trd.config.load import explain_refused_override, validate
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Microbatch, Prompt, Refinement, Trajectory
from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron.student import StepResult
from nemo_trd.records.last_line import end_process
from nemo_trd.records.timers import Timers
from nemo_trd.records.trackers import Tracker
from nemo_trd.run.lookahead import sampling_ahead
from nemo_trd.run.run import Run
from nemo_trd.run.session import carry_out, record_end, with_all_ranks

MicroBatches: TypeAlias = Sequence[Sequence[Microbatch]]  # by data parallel rank and position
TeacherStates: TypeAlias = Sequence[Tensor | TopK | None]  # of this rank's, on the last stage
# A pass of the student: `train_step`, `compute_gradients` or `compare`.
StudentPass: TypeAlias = Callable[[MicroBatches, TeacherStates, Collection[str]], StepResult]


def train(run: Run) -> int:
    """Distil the teacher along its own rewrites of the student's rollouts.

    Returns the exit code: 0 when all steps are done or a stop file was found.
    """

    def draw(step: int, timers: Timers) -> list[Refinement]:
        return sample(run, run.inputs.prompts(step), step, timers)

    samples = sampling_ahead(draw, run.config, run.timers, run.samples_ahead)
    exit_code = run.start()
    if exit_code is not None:
        return exit_code
    while run.step < run.config.train.num_steps:
        refinements = run.within_support(samples.take(run.step))  # y_r, each with its x and y_o
        samples.start(run.step + 1)  # with max_staleness, beside what follows
        measured = run.journal.measure(refinements, run.weight_version)
        trajectories = pair(refinements, run.config, run.inputs.teacher_prompt)  # x, c_T | y_r
        result = learn(run, trajectories, run.student.train_step)  # theta moves
        run.journal.record(run.step + 1, refinements, trajectories, result, measured)
        run.advance(result, refinements)
        samples.settle()
        if result:
            with run.timers("weight_sync"):
                run.sync_weights()
        exit_code = run.finish_step(samples.kept)
        if exit_code is not None:
            return exit_code
    run.finish()
    return 0


def sample(run: Run, prompts: Sequence[Prompt], step: int, timers: Timers) -> list[Refinement]:
    """Draw the student's answers to the prompts of a step, and the teacher's rewrites of them.

    y_o ~ pi_theta(. | x), and y_r ~ pi_T(. | x, y_o), in OPSD pi_T(. | x, y*, y_o).
    """
    drawn = run.sampler.sample(prompts, step)
    timers.add(drawn.seconds)
    return drawn.refinements


def learn(
    run: Run, trajectories: Sequence[Trajectory], student_pass: StudentPass
) -> StepResult | None:
    """Take the student along the trajectories: sum_t D(pi_T, pi_theta)(t) / number of t.

    Args:
        student_pass: `run.student.train_step`, or another pass with its arguments.

    Returns:
        The result of the pass; None without trajectories, and nothing has been done.
    """
    if not trajectories:
        return None
    micro_batches, teacher_states = teach(run, trajectories)
    with run.timers("student"):
        watched = run.journal.watched(run.step + 1, trajectories)
        return student_pass(micro_batches, teacher_states, watched)


def teach(run: Run, trajectories: Sequence[Trajectory]) -> tuple[MicroBatches, TeacherStates]:
    """Pack the trajectories, and compute the states of pi_T at their labels."""
    micro_batches = run.student.pack(trajectories)
    with run.timers("teacher"):
        return micro_batches, run.teacher.states(micro_batches)


def launch(
    config: Config,
    work: Callable[[Run], int] = train,
    trackers: Sequence[Tracker] = (),
) -> int:
    """Join the other ranks, check everything, and train. Returns the exit code.

    An exception on any rank ends the processes of all of them; its cause becomes the last line of
    stderr and of the run's log.txt.

    Args:
        work: what is done with the run, to an exit code.
        trackers: who gets the figures of the run besides those that `config.logging` names.

    Raises:
        ConfigError: on every rank, before any model is built. It is written to the log of a run
            that has one.
    """
    return with_all_ranks(config, lambda stop: carry_out(config, work, trackers, stop))


def main(composed: DictConfig) -> None:
    try:
        config = validate(composed)
    except ConfigError as error:
        run_dir = str(OmegaConf.select(composed, "run.dir") or "").strip()
        if run_dir:
            record_end(str(error), Path(run_dir) / "log.txt")
        end_process(f"nemo_trd: {error}", 2)
    try:
        sys.exit(launch(config))
    except ConfigError as error:
        end_process(f"nemo_trd: {error}", 2)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints its own advice and exits
    try:
        hydra_entry(main)()
    except (HydraException, OmegaConfBaseException) as refused:
        end_process(f"nemo_trd: {explain_refused_override(str(refused), sys.argv[1:])}", 2)
