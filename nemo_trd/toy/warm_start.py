"""Make the toy's models and data: a weak student, a stronger teacher, prompts.

    python -m nemo_trd.toy.warm_start --out runs/toy --seed 1234

Both models are trained from scratch on the warm-start problems, until their gates are passed on
held-out problems. The teacher learns to solve and to rewrite attempts, the student to solve.
Both learn how a solution goes on after a wrong number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nemo_trd.config.arguments import path
from nemo_trd.config.load import conf_dir
from nemo_trd.config.schema import RefinementTemplates
from nemo_trd.toy import task
from nemo_trd.toy.rows import IGNORED, Row, RowMaker, as_tensors
from nemo_trd.toy.tokenizer import PAD, build_tokenizer

HEAD_DIM = 32
TRAIN_PROBLEMS, VALIDATION_PROBLEMS = 4000, 250


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    `shares` is keyed by the kind of row (`RowMaker`); `gates` too, or by "notice", which looks at
    "recover" rows and may have a number of products as they may: notice@24.
    """

    layers: int
    hidden: int
    feed_forward: int
    max_steps: int
    shares: dict[str, int]  # rows in a batch
    gates: dict[str, float]  # training ends when these accuracies, or `noticing`, are reached
    held_out: int = 128  # rows of each kind that the gates look at
    check_interval: int = 20
    warmup_steps: int = 20
    cooling_from: float = 0.8  # with so many solved, the learning rates start to fall to a tenth
    cooling_steps: int = 150
    matrix_lr: float = 0.02  # Muon
    other_lr: float = 3e-3  # AdamW: embedding and norms
    before: Recipe | None = None  # of the same model: what it learns first


STUDENT = Recipe(
    layers=2,
    hidden=64,
    feed_forward=192,
    max_steps=1000,
    shares={"solve": 24, "recover": 8},
    gates={"solve": 0.4},
    check_interval=5,
    matrix_lr=0.03,
)
TEACHER = Recipe(
    layers=4,
    hidden=128,
    feed_forward=384,
    max_steps=1200,
    shares={"solve": 12, "recover": 16, "rewrite": 12},
    gates={"solve": 0.97, "rewrite": 0.97, "notice": 0.4},
)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3; the global random state is left as it was."""
    heads = recipe.hidden // HEAD_DIM
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def token_losses(model: Qwen3ForCausalLM, rows: list[Row]) -> torch.Tensor:
    """Negative log-likelihood of each label, [rows, longest - 1], 0 where there is no label."""
    tokens, targets = as_tensors(rows)
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, answers: list[list[Row]]) -> float:
    """The probability that a sample at temperature 1 is exactly a right solution.

    Args:
        answers: of each context its right solutions, which are equally many everywhere.
    """
    losses = token_losses(model, [row for rows in answers for row in rows]).sum(dim=1)
    return (-losses).exp().view(len(answers), -1).sum(dim=1).mean().item()


@torch.no_grad()
def noticing(model: Qwen3ForCausalLM, rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> float:
    """How much likelier a result is taken back where it is wrong: about `RowMaker.noticed` at best.

    Args:
        rows: of the kind "recover".
    """
    ids = tokenizer.get_vocab()
    equals, no, pad = ids["="], ids[task.NO], ids[PAD]
    tokens, _ = as_tensors([Row(row.context, [*row.labels, pad]) for row in rows])
    probability = model(input_ids=tokens, use_cache=False).logits.softmax(-1)[..., no]
    probabilities: dict[bool, list[float]] = {True: [], False: []}  # by whether the result is wrong
    for row, taken_back in zip(rows, probability.tolist(), strict=True):
        for place in (after + 1 for after, label in enumerate(row.labels) if label == equals):
            probabilities[place in row.unlearnt].append(taken_back[len(row.context) + place])
    wrong, right = (sum(probabilities[kind]) / len(probabilities[kind]) for kind in (True, False))
    return wrong - right


def train(
    recipe: Recipe, rows: RowMaker, seed: int, name: str
) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """Train until the gates are passed or `max_steps` is reached.

    Returns:
        the model, and what it reaches for every kind of row in `shares` and every gate.
    """
    rng = random.Random(f"{name} {seed}")
    held_out = {
        kind: [rows.right_rows(kind, rng) for _ in range(recipe.held_out)] for kind in recipe.shares
    }
    if recipe.before is None:
        model = new_model(recipe, rows.tokenizer, seed)
    else:
        model, _ = train(recipe.before, rows, seed, f"{name}, first part")
    optimizers = _optimizers(model, recipe)
    reached: dict[str, float] = {}
    cooling_since = recipe.max_steps

    def measure(gate: str) -> float:
        if gate.startswith("notice"):
            slips = [row for [row] in held_out[gate.replace("notice", "recover")]]
            return noticing(model, slips, rows.tokenizer)
        return accuracy(model, held_out[gate])

    def passed(gate: str) -> bool:
        reached[gate] = measure(gate)
        return reached[gate] >= recipe.gates[gate]

    progress = tqdm(range(1, recipe.max_steps + 1), desc=f"warm start of the {name}", unit="step")
    for step in progress:
        # One group per kind: rows of a kind are equally long, so little is padded.
        groups = [[rows.row(kind, rng) for _ in range(n)] for kind, n in recipe.shares.items()]
        labels = sum(len(row[1]) for group in groups for row in group)
        for group in groups:
            (token_losses(model, group).sum() / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * _lr_factor(recipe, step, cooling_since)
            optimizer.step()
            optimizer.zero_grad()
        if step % recipe.check_interval == 0:
            if all(passed(gate) for gate in recipe.gates):
                break
            solved = [value for gate, value in reached.items() if gate.startswith("solve")]
            if min(solved, default=0.0) >= recipe.cooling_from:
                cooling_since = min(cooling_since, step)
            progress.set_postfix({kind: f"{value:.2f}" for kind, value in reached.items()})
    progress.close()
    return model, {gate: measure(gate) for gate in {**recipe.shares, **recipe.gates}}


def _optimizers(
    model: Qwen3ForCausalLM, recipe: Recipe
) -> list[tuple[torch.optim.Optimizer, float]]:
    # With AdamW alone the loss stays on the plateau before the multiplication table several times
    # as long, and for some seeds for ever.
    layers = dict(model.model.layers.named_parameters())
    matrices = [parameter for parameter in layers.values() if parameter.ndim == 2]
    of_muon = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_muon]
    return [
        (torch.optim.Muon(matrices, weight_decay=0.01), recipe.matrix_lr),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0), recipe.other_lr),
    ]


def _lr_factor(recipe: Recipe, step: int, cooling_since: int) -> float:
    # How long a seed stays on the plateau differs, so cooling starts by accuracy, not by step.
    cooled = max(0.0, (step - cooling_since) / recipe.cooling_steps)
    return min(1.0, step / recipe.warmup_steps) * max(0.1, 1.0 - 0.9 * cooled)


def toy_templates() -> RefinementTemplates:
    """The templates of conf/refinement/toy.yaml."""
    loaded = OmegaConf.to_container(OmegaConf.load(conf_dir() / "refinement" / "toy.yaml"))
    assert isinstance(loaded, dict)
    return RefinementTemplates.model_validate(loaded["templates"])


def digest(seed: int, recipes: dict[str, Recipe], templates: RefinementTemplates) -> str:
    """Identifies what the warm start makes: settings, this package, torch."""
    sha = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(source.read_bytes())
    settings = {name: asdict(recipe) for name, recipe in recipes.items()}
    used = [seed, settings, templates.model_dump(), torch.__version__, torch.get_num_threads()]
    sha.update(json.dumps(used, sort_keys=True).encode())
    return sha.hexdigest()[:16]


def make(out: Path, seed: int, student: Recipe = STUDENT, teacher: Recipe = TEACHER) -> dict:
    """Write student, teacher, train.jsonl and validation.jsonl into `out`.

    What `out` holds already from equal settings is kept.

    Returns:
        what warm_start.json holds: digest, seed, and per model accuracy and seconds.

    Raises:
        RuntimeError: a model did not pass its gates.
    """
    templates = toy_templates()
    recipes = {"student": student, "teacher": teacher}
    report_path = out / "warm_start.json"
    expected = digest(seed, recipes, templates)
    if report_path.exists():
        report = json.loads(report_path.read_text())
        if report["digest"] == expected:
            return report
        report_path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "train.jsonl", task.examples("train", TRAIN_PROBLEMS, seed))
    # The validation problems are the same for every seed, so that runs can be compared.
    write_jsonl(out / "validation.jsonl", task.examples("validation", VALIDATION_PROBLEMS, 0))
    report = {"digest": expected, "seed": seed}
    rows = RowMaker(build_tokenizer(), templates)
    for name, recipe in recipes.items():
        started = time.monotonic()
        model, reached = train(recipe, rows, seed, name)
        missed = {
            kind: reached[kind] for kind, gate in recipe.gates.items() if reached[kind] < gate
        }
        if missed:
            raise RuntimeError(
                f"warm start of the {name}, seed {seed}: accuracy {missed} after "
                f"{recipe.max_steps} steps, gates {recipe.gates}. Fix: another --seed."
            )
        shutil.rmtree(out / name, ignore_errors=True)
        model.save_pretrained(out / name)
        rows.tokenizer.save_pretrained(out / name)
        report[name] = {"accuracy": reached, "seconds": round(time.monotonic() - started, 1)}
    report_path.write_text(json.dumps(report, indent=2) + "\n")
    return report


def write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.toy.warm_start", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=path, default=Path("runs/toy"))
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=2, help="part of what is reproducible")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = make(options.out, options.seed)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
