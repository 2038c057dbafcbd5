"""Trajectory-Refined Distillation (arXiv 2606.08432): the loop, and its command line.

python -m nemo_trd.train experiment=quickstart train.num_steps=50
python -m nemo_trd.launch --nproc 4 parallel.student.pipeline_model_parallel_size=2 ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_trd.algorithm.trajectories import pair
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.hydra_entry import hydra_entry
from nemo_trd.config.load import explain_refused_override, validate
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Refinement
from nemo_trd.distributed.exchange import from_first_rank, raise_together
from nemo_trd.distributed.process import init_distributed, world_from_environment
from nemo_trd.distributed.stop import StopRequest
from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.records.last_line import Cause, append_to_log, end_process
from nemo_trd.records.timers import Timers
from nemo_trd.records.trackers import Tracker
from nemo_trd.run.inputs import load_inputs
from nemo_trd.run.lookahead import Lookahead
from nemo_trd.run.outcome import nothing_left
from nemo_trd.run.run import Run
from nemo_trd.run.run_lock import at_work, is_of


def train(run: Run) -> int:
    """Distil the teacher along its own rewrites of the student's rollouts.

    Returns the exit code: 0 when all steps are done or a stop file was found.
    """
    student, teacher, timers = run.student, run.teacher, run.timers
    samples = Lookahead(partial(sample, run), run.config, timers, run.samples_ahead)
    exit_code = run.start()
    if exit_code is not None:
        return exit_code
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

    An exception on any rank ends the processes of all of them; its cause becomes the last line of
    stderr and of the run's log.txt.

    Args:
        work: what is done with the run, to an exit code.
        trackers: who gets the figures of the run besides those that `config.logging` names.

    Raises:
        ConfigError: on every rank, before any model is built. It is written to the log of a run
            that has one.
    """
    rank, _, _ = world_from_environment()
    log_file = config.run_dir / "log.txt"
    stop = StopRequest(config.run_dir, rank)
    try:
        try:
            watch = init_distributed(
                config.parallel.timeout_minutes, log_file, partial(is_of, config.run_dir)
            )
        except dist.DistError as error:
            end_process(f"nemo_trd: the ranks do not meet: {Cause.of(error).line}", 1)
        try:
            exit_code = _run(config, work, trackers, stop)
        except ConfigError as error:
            _record_end(str(error), log_file)
            watch.close()
            raise
        except BaseException as error:
            watch.fail(error)
        watch.close()
    finally:
        stop.close()
    return exit_code


def _run(
    config: Config, work: Callable[[Run], int], trackers: Sequence[Tracker], stop: StopRequest
) -> int:
    """Check and load, do the work unless all is done already, and close. Returns the exit code."""
    inputs = raise_together(lambda: load_inputs(config, dist.get_world_size()))
    finished = from_first_rank(lambda: nothing_left(config, inputs.checkpoint))
    if finished is not None:
        if dist.get_rank() == 0:
            print(finished, flush=True)
            _record_end(finished, config.run_dir / "log.txt", logging.INFO)
        return 0
    run = Run(config, inputs, stop, trackers)
    exit_code = None
    try:
        exit_code = work(run)
    except GenerationFailed:
        run.save()
        raise
    finally:
        run.close(succeeded=exit_code == 0)
    return exit_code


def _record_end(message: str, log_file: Path, level: int = logging.ERROR) -> None:
    """On rank 0, in the log of a run that was there before: it ended here, too.

    Not in that of a run that is at work in the directory, nor where the directory cannot be read.
    """
    with contextlib.suppress(OSError):
        ours = world_from_environment()[0] == 0 and log_file.exists()
        if ours and not at_work(log_file.parent):
            append_to_log(log_file, message, level=level)


def main(composed: DictConfig) -> None:
    try:
        config = validate(composed)
    except ConfigError as error:
        run_dir = str(OmegaConf.select(composed, "run.dir") or "").strip()
        if run_dir:
            _record_end(str(error), Path(run_dir) / "log.txt")
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
