"""Students, teachers and problems of the comparisons.

They are the toy task's (nemo_trd/toy), but for a student that also follows a solution it is shown,
so that it can be its own teacher in OPSD. A model that is there is kept if it was made of the same
settings, so that it stays the same while runs are added.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_trd.toy import task, warm_start
from nemo_trd.toy.rows import RowMaker
from nemo_trd.toy.tokenizer import build_tokenizer
from nemo_trd.toy.warm_start import STUDENT, TEACHER, Recipe

FOLLOWING_STUDENT = replace(
    STUDENT,
    shares={"solve": 24, "recover": 8, "follow": 2, "follow_attempt": 6},
    gates={"solve": 0.4, "follow": 0.9, "follow_attempt": 0.9},
    before=replace(
        STUDENT,
        shares={"follow": 8, "follow_attempt": 16},
        gates={"follow": 0.95, "follow_attempt": 0.95},
        check_interval=10,
    ),
)
MADE = "made.json"  # beside a model: what it was made of, and what it can do


@dataclass(frozen=True)
class Texts:
    """What models learn from.

    noticed: how often a slip is taken back.
    labels: the most products that the tokenizer has labels for.
    """

    noticed: float = task.NOTICED
    labels: int = task.USUAL


@dataclass(frozen=True)
class World:
    """Models and prompts of one condition. A seed has its own of each.

    products: in a prompt.
    """

    student: Recipe = FOLLOWING_STUDENT
    teacher: Recipe = TEACHER
    texts: Texts = Texts()
    products: int = task.USUAL

    def untrained(self) -> World:
        """For a look at the machinery."""
        return replace(self, student=untrained(self.student), teacher=untrained(self.teacher))


def untrained(recipe: Recipe) -> Recipe:
    """Two steps, and no gates."""
    before = recipe.before and untrained(recipe.before)
    return replace(recipe, max_steps=2, gates={}, held_out=2, check_interval=1, before=before)


def make_model(
    directory: Path,
    role: str,
    seed: int,
    recipe: Recipe,
    texts: Texts,
    orders: Sequence[int] = (1,),
) -> None:
    """Write `directory`, unless it is there, made of the same settings.

    A model that does not pass its gates is kept too: `missed` says so.

    Args:
        role: student or teacher; with the seed it decides what is drawn.
        orders: weights of the orders of products in its texts (nemo_trd/toy/derivations.py).
    """
    torch.set_num_threads(1)
    templates = warm_start.toy_templates()
    settings = {
        **{"role": role, "seed": seed, "recipe": asdict(recipe), "texts": asdict(texts)},
        **{"templates": templates.model_dump(), "torch": torch.__version__},
    }
    if len(orders) > 1:
        settings["orders"] = [*orders]
    settings = json.loads(json.dumps(settings))
    made = directory / MADE
    if made.exists() and json.loads(made.read_text())["settings"] == settings:
        return
    rows = RowMaker(build_tokenizer(texts.labels), templates, texts.noticed, orders)
    started = time.monotonic()
    model, accuracy = warm_start.train(recipe, rows, seed, role)
    seconds = round(time.monotonic() - started, 1)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    rows.tokenizer.save_pretrained(directory)
    weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()[:16]
    found = {"settings": settings, "accuracy": accuracy, "seconds": seconds, "weights": weights}
    found["missed"] = [k for k, gate in recipe.gates.items() if accuracy[k] < gate]
    made.write_text(json.dumps(found, indent=2) + "\n")


def read_made(directory: Path) -> dict[str, Any]:
    """What `make_model` wrote: settings, accuracy, seconds, digest of the weights, missed gates."""
    return json.loads((directory / MADE).read_text())


def write_problems(out: Path, sizes: dict[str, int], products: int = task.USUAL) -> None:
    """`out`/NAME.jsonl for every size: different problems, none of them among those to train on."""
    out.mkdir(parents=True, exist_ok=True)
    problems = task.examples("validation", sum(sizes.values()), 1, products)
    for name, count in sizes.items():
        warm_start.write_jsonl(out / f"{name}.jsonl", problems[:count])
        problems = problems[count:]


def write_prompts(out: Path, seed: int, products: int = task.USUAL) -> None:
    """`out`/train.jsonl: what a run of this seed trains on."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = task.examples("train", warm_start.TRAIN_PROBLEMS, seed, products)
    warm_start.write_jsonl(out / "train.jsonl", drawn)
