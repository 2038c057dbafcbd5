"""A run from its inputs to its end: checked, worked on, closed, and its end written down."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Config
from nemo_trd.distributed.exchange import all_come, from_first_rank, raise_together
from nemo_trd.distributed.process import init_distributed, world_from_environment
from nemo_trd.distributed.stop import StopRequest
from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.records.last_line import Cause, append_to_log, end_process
from nemo_trd.records.trackers import Tracker
from nemo_trd.run.inputs import load_inputs
from nemo_trd.run.outcome import nothing_left
from nemo_trd.run.run import Run
from nemo_trd.run.run_lock import at_work, is_of

# Within which all ranks refuse what all of them refuse: rank 0 may have servers to end before.
REFUSED_SECONDS = 120.0


def with_all_ranks(config: Config, work: Callable[[StopRequest], int]) -> int:
    """Join the other ranks and do the work. Returns its exit code.

    An exception on any rank ends the processes of all of them; its cause becomes the last line of
    stderr and of the run's log.txt.

    Raises:
        ConfigError: on every rank, if `work` does on all of them, or if they cannot meet. It is
            written to the log of a run that has one.
    """
    rank, _, _ = world_from_environment()
    log_file = config.run_dir / "log.txt"
    stop = StopRequest(config.run_dir, rank)
    try:
        try:
            watch = init_distributed(
                config.parallel.timeout_minutes, log_file, partial(is_of, config.run_dir)
            )
        except ConfigError as error:
            record_end(str(error), log_file)
            raise
        except dist.DistError as error:
            end_process(f"nemo_trd: the ranks do not meet: {Cause.of(error).line}", 1)
        try:
            exit_code = work(stop)
        except ConfigError as error:
            if not all_come("refused", REFUSED_SECONDS):  # the others wait for this rank
                watch.fail(error)
            record_end(str(error), log_file)
            watch.close()
            raise
        except BaseException as error:
            watch.fail(error)
        watch.close()
    finally:
        stop.close()
    return exit_code


def carry_out(
    config: Config, work: Callable[[Run], int], trackers: Sequence[Tracker], stop: StopRequest
) -> int:
    """Check and load, do the work unless all is done already, and close. Collective.

    Returns:
        The exit code.
    """
    inputs = raise_together(lambda: load_inputs(config, dist.get_world_size()))
    finished = from_first_rank(lambda: nothing_left(config, inputs.checkpoint))
    if finished is not None:
        if dist.get_rank() == 0:
            print(finished, flush=True)
            record_end(finished, config.run_dir / "log.txt", logging.INFO)
        return 0
    run = Run(config, inputs, stop, trackers)
    try:
        exit_code = work(run)
    except BaseException as cause:
        _close_after(cause, run)
        raise
    run.close(succeeded=exit_code == 0)
    return exit_code


def _close_after(cause: BaseException, run: Run) -> None:
    """Close a run that has failed. What else goes wrong meanwhile stands beside the cause."""
    try:
        try:
            if isinstance(cause, GenerationFailed):
                run.save()
        finally:
            run.close(succeeded=False)
    except Exception as error:
        cause.add_note(f"then, while the run was closed: {Cause.of(error).line}")


def record_end(message: str, log_file: Path, level: int = logging.ERROR) -> None:
    """Write on rank 0, in the log of a run that was there before, that it ended here, too.

    Not in that of a run that is at work in the directory, nor where the directory cannot be read.
    """
    with contextlib.suppress(OSError):
        ours = world_from_environment()[0] == 0 and log_file.exists()
        if ours and not at_work(log_file.parent):
            append_to_log(log_file, message, level=level)
