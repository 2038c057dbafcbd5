"""Draws rollouts and their rewrites once for a whole data set, for runs with generation=stored.

python -m nemo_trd.generate data=gsm8k data.train.path=FILE run.dir=runs/pairs KEY=VALUE ...
python -m nemo_trd.launch --nproc 4 --module nemo_trd.generate KEY=VALUE ...     four ranks

Takes the settings of nemo_trd.train. Samples train.rollouts_per_prompt rollouts of every problem of
data.train with the student as it is in its directory, has the teacher rewrite them, and appends
the rows of data.train, each with rollout, refinement and rejection, to RUN_DIR/pairs.jsonl after
each train.prompts_per_step problems. A second start goes on. Exit code: 0 done, or RUN_DIR/stop was
found; 75 SIGTERM, SIGUSR1 or Ctrl-C came, start again to go on; 2 a setting cannot work; 1 failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_trd.algorithm.acceptance import refinement_counts
from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.data.files import read_rows
from nemo_trd.data.prompt_digests import digests
from nemo_trd.data.stored import stored_form
from nemo_trd.data.types import Prompt, Refinement
from nemo_trd.distributed.exchange import from_first_rank, raise_together
from nemo_trd.distributed.stop import StopRequest
from nemo_trd.preflight.models import check_models
from nemo_trd.records.console import attach_handlers, detach_handlers
from nemo_trd.records.last_line import end_process
from nemo_trd.records.settings_file import keep_settings
from nemo_trd.records.under_way import UnderWay
from nemo_trd.run.generators import Generators
from nemo_trd.run.inputs import load_training_prompts
from nemo_trd.run.run_lock import RunLock
from nemo_trd.run.sampling import Sampler
from nemo_trd.run.session import with_all_ranks
from nemo_trd.verifiers.sandbox import check_sandbox

log = logging.getLogger("nemo_trd.generate")  # under `python -m` the name of this module differs

PAIRS, SETTINGS = "pairs.jsonl", "pairs.settings.json"
COLUMNS = ("rollout", "refinement", "rejection")  # that are added to the rows of data.train


@dataclass(frozen=True)
class Problems:
    """Usable problems of data.train, with the rows that they come from."""

    prompts: list[Prompt]
    rows: dict[int, dict[str, Any]]  # by `Prompt.index`
    student_tokenizer: Any
    teacher_tokenizer: Any


class PairFile:
    """RUN_DIR/pairs.jsonl, which grows by the pairs of whole steps. For one rank.

    Raises:
        ConfigError: it holds pairs that were made with other settings.
    """

    def __init__(self, run_dir: Path, settings: dict[str, Any], pairs_of_steps: list[int]) -> None:
        """Open it, and drop the pairs of a step that was cut off.

        Args:
            pairs_of_steps: number of pairs of each step.
        """
        self.path = run_dir / PAIRS
        keep_settings(run_dir / SETTINGS, settings, self.path)
        self.path.touch()
        whole, at = [0], 0  # where each line ends, in bytes
        with self.path.open("rb") as file:
            for line in file:
                at += len(line)
                whole += [at] if line.endswith(b"\n") else []
        self.steps, pairs = 0, 0
        for number in pairs_of_steps:
            if pairs + number >= len(whole):
                break
            self.steps, pairs = self.steps + 1, pairs + number
        with self.path.open("r+b") as file:
            file.truncate(whole[pairs])

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the pairs of the next step."""
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.steps += 1


def load_problems(config: Config) -> Problems:
    """Check the models, and read data and tokenizers.

    Raises:
        ConfigError: what is wrong and how to mend it. Nothing has been written.
    """
    if config.generation.stored is not None or config.algorithm.trajectory == "rollout":
        field, value = "generation.stored", "rollout and refinement"
        if config.generation.stored is None:
            field, value = "algorithm.trajectory", "rollout"
        raise rule_broken(
            field,
            value,
            "nemo_trd.generate draws rollouts and their rewrites",
            "choose generation=local or generation=vllm, and algorithm.trajectory=refinement",
        )
    student, teacher = check_models(config)
    if config.data.verifier == "code":
        check_sandbox("data.verifier", config.sandbox)
    loaded = load_training_prompts(config, student.tokenizer, teacher.tokenizer)
    dataset, used = config.data.train, {prompt.index for prompt in loaded.prompts}
    rows = {}
    for index, (where, row) in enumerate(islice(read_rows(dataset, "data.train"), dataset.limit)):
        if index in used and isinstance(row, dict):
            taken = [column for column in COLUMNS if column in row]
            if taken:
                raise rule_broken(
                    "data.train.path",
                    dataset.path,
                    f"{where} has a column {taken[0]!r}, which nemo_trd.generate writes",
                    "rename it in the data",
                )
            rows[index] = row
    return Problems(loaded.prompts, rows, student.tokenizer, teacher.tokenizer)


def what_pairs_depend_on(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The settings that change samples, and the problems themselves."""
    settings = config.model_dump(
        mode="json",
        include={
            "run": {"seed"},
            "algorithm": {"mode"},
            "model": True,
            "refinement": True,
            "data": {"train", "system_prompt", "chat_template_kwargs", "verifier"},
            "generation": {"backend", "rollout", "refinement"},
            "train": {"prompts_per_step", "rollouts_per_prompt"},
        },
    )
    del settings["data"]["train"]["path"]  # the file may move
    known = hashlib.sha256(digests(prompts)).hexdigest()[:16]
    return settings | {"problems": f"{len(prompts)} with digest {known}"}


def draw_pairs(config: Config, stop: StopRequest) -> int:
    """Draw the pairs that RUN_DIR/pairs.jsonl lacks. Collective. Returns the exit code."""
    problems = raise_together(lambda: load_problems(config))
    size, number = config.train.prompts_per_step, len(problems.prompts)
    steps = [problems.prompts[first : first + size] for first in range(0, number, size)]
    with ExitStack() as last_first:
        lock = RunLock(config.run_dir)
        from_first_rank(lock.acquire)
        last_first.callback(lock.release)
        if dist.get_rank() == 0:
            handlers = attach_handlers(config.run_dir / "log.txt")
            last_first.callback(detach_handlers, handlers)
        per_prompt = config.train.rollouts_per_prompt
        file = from_first_rank(
            lambda: PairFile(
                config.run_dir,
                what_pairs_depend_on(config, problems.prompts),
                [len(prompts) * per_prompt for prompts in steps],
            )
        )
        if file.steps < len(steps):
            exit_code = _draw(config, problems, steps, file, lock, stop, last_first)
            if exit_code is not None:
                log.info("stopped on request; start again with run.dir=%s to go on", config.run_dir)
                return exit_code
        if dist.get_rank() == 0:
            log.info("%s", summary(file.path, number))
    return 0


def _draw(
    config: Config,
    problems: Problems,
    steps: Sequence[Sequence[Prompt]],
    file: PairFile,
    lock: RunLock,
    stop: StopRequest,
    at_end: ExitStack,
) -> int | None:
    """Draw the steps that are missing. Returns an exit code when asked to stop."""
    generators = Generators(config, stop.signalled)
    at_end.callback(generators.close)
    under_way = UnderWay(config.run_dir / "under_way", dist.get_rank(), config.digest())
    sampler = Sampler(
        config,
        generators.student,
        generators.teacher,
        problems.student_tokenizer,
        problems.teacher_tokenizer,
        under_way,
    )
    if dist.get_rank() == 0:
        for notice in under_way.notices:
            log.warning("%s", notice)
    for step in range(file.steps, len(steps)):
        exit_code = stop.exit_code()
        if exit_code is not None:
            return exit_code
        drawn = sampler.sample(steps[step], step)
        from_first_rank(lock.check)
        if dist.get_rank() == 0:
            file.append([stored_row(problems, refinement) for refinement in drawn.refinements])
        counts = refinement_counts(drawn.refinements, ())
        log.info(
            "step %d of %d: %s; %.1f s",
            step + 1,
            len(steps),
            ", ".join(f"{name} {count}" for name, count in counts.items() if count),
            drawn.seconds["rollout"] + drawn.seconds["refinement"],
        )
    under_way.end()
    return None


def stored_row(problems: Problems, refinement: Refinement) -> dict[str, Any]:
    """Row of pairs.jsonl: that of the problem, and what was drawn for it."""
    rollout, y_r = refinement.request.rollout, refinement.completion
    return {
        **problems.rows[rollout.prompt.index],
        "rollout": stored_form(rollout.completion, rollout.text) | {"correct": rollout.correct},
        "refinement": None
        if y_r is None
        else stored_form(y_r, refinement.text) | {"correct": refinement.correct},
        "rejection": refinement.rejection,
    }


def summary(pairs: Path, problems: int) -> str:
    """Line with the number of pairs, why rewrites were rejected, and what to do with the file."""
    with pairs.open(encoding="utf-8") as file:
        reasons = Counter(json.loads(line)["rejection"] for line in file)
    rejected = {reason: count for reason, count in reasons.items() if reason is not None}
    return (
        f"{reasons.total()} pairs of {problems} problems in {pairs}, rewrites rejected: "
        f"{rejected or 'none'}; train on them with generation=stored data.train.path={pairs}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for nemo_trd.train",
    )
    overrides = parser.parse_args(arguments).overrides
    try:
        config = compose(overrides)
        return with_all_ranks(config, partial(draw_pairs, config))
    except ConfigError as error:
        end_process(f"nemo_trd: {error}", 2)


if __name__ == "__main__":
    sys.exit(main())
