"""Compares a run with the checkpoint that it resumes: settings, model, data. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Adapter, Config, Dataset
from nemo_trd.data.files import read_rows
from nemo_trd.data.prompt_digests import BYTES, DIGESTS_FILE, Difference, difference
from nemo_trd.records.checkpoint_dir import read_state
from nemo_trd.records.trackers import public_settings

# Settings that may differ in a resumed run without making it another run.
_OF_A_START = ("run.dir", "checkpoint.resume", "checkpoint.accept_changed_data", "cluster")
# Settings on which the samples of a step depend, beside the weights.
_OF_SAMPLES = (
    *("run.seed", "algorithm", "model", "refinement", "data", "sandbox"),
    *("generation.rollout", "generation.refinement", "generation.backend"),
    *("generation.max_staleness", "train.prompts_per_step", "train.rollouts_per_prompt"),
)
# Settings that decide which prompts there are, and their tokens.
_OF_PROMPTS = ("data", "algorithm.mode", "model.student", "refinement")
BASE = "base"  # among what identifies a model: the digest of the weights below an adapter
_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """Setting that differs from the one that the checkpoint was made with."""

    name: str  # dotted
    before: str  # JSON; "nothing" where there was no such setting
    now: str

    def __str__(self) -> str:
        start = _first_difference(self.before, self.now)
        return f"{self.name}: {_excerpt(self.before, start)} -> {_excerpt(self.now, start)}"

    def is_of(self, sections: Sequence[str]) -> bool:
        """Whether the setting is one of `sections`, or stands in one."""
        return any(self.name == s or self.name.startswith(f"{s}.") for s in sections)


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)


def _excerpt(text: str, start: int) -> str:
    """Part of a text with the character at `start`, at most `_SHOWN` characters and dots."""
    first = max(0, min(start - _SHOWN // 3, len(text) - _SHOWN))
    excerpt = text[first : first + _SHOWN]
    return f"{'...' * (first > 0)}{excerpt}{'...' * (first + _SHOWN < len(text))}"


def changed_settings(record: Mapping[str, Any], config: Config) -> list[Change]:
    """Settings that differ from a checkpoint's record of them, in the order of conf/."""
    changes = [Change(*change) for change in _differing(record, public_settings(config), "")]
    return [change for change in changes if not change.is_of(_OF_A_START)]


def _differing(before: Any, now: Any, name: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in before if key not in now)]:
            key_name = f"{name}.{key}" if name else key
            if key not in before:
                yield key_name, "nothing", _as_text(now[key])
            elif key not in now:
                yield key_name, _as_text(before[key]), "nothing"
            else:
                yield from _differing(before[key], now[key], key_name)
    elif before != now:
        yield name, _as_text(before), _as_text(now)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def samples_hold(changes: Sequence[Change]) -> bool:
    """Whether samples made ahead are those that the present settings would give."""
    return not any(change.is_of(_OF_SAMPLES) for change in changes)


def changes_since(checkpoint: Path, config: Config) -> tuple[list[Change], str]:
    """Changed settings since a checkpoint was made, and a line that lists them, "" if none."""
    state = read_state(checkpoint)
    if not state.settings:
        differ = "settings that change the numbers may differ from those that it was made with"
        return [], "" if state.digest == config.digest() else f"{differ}; it does not record which"
    changes = changed_settings(state.settings, config)
    return changes, f"changed: {'; '.join(map(str, changes))}" if changes else ""


def check_matches(checkpoint: Path, model: dict[str, Any], config: Config) -> None:
    """Refuse a checkpoint of another model or precision, or without a teacher that has moved.

    Raises:
        ConfigError: with the first field that differs.
    """
    state = read_state(checkpoint)
    for field in sorted({*state.model, *model} - {BASE}):
        if state.model.get(field) != model.get(field):
            raise rule_broken(
                "checkpoint.resume",
                str(checkpoint),
                f"it holds a model with {field} = {state.model.get(field)!r}, and the student "
                f"has {model.get(field)!r}",
                "give another run.dir, or the model that the run began with",
            )
    dtype = state.settings.get("precision", {}).get("dtype", config.precision.dtype)
    if dtype != config.precision.dtype:
        raise rule_broken(
            "precision.dtype",
            config.precision.dtype,
            f"{checkpoint} holds a run in {dtype}, and the weights and states of one precision "
            "do not continue in the other",
            f"set precision.dtype={dtype}, or start again with another run.dir",
        )
    ema = config.teacher.ema
    if ema is not None and state.settings.get("teacher", {}).get("ema") is None:
        raise rule_broken(
            "teacher.ema",
            ema,
            f"{checkpoint} holds no average of the student's weights",
            "set it to null, or start again with another run.dir",
        )


def check_prompts(checkpoint: Path, prompts: bytes, config: Config) -> str | None:
    """Refuse to go on with other data, unless `checkpoint.accept_changed_data` allows it.

    Args:
        prompts: `prompt_digests.digests` of the present prompts.

    Returns:
        A line on the accepted change, None where nothing has changed.

    Raises:
        ConfigError: with the number of prompts before, and the first row that differs.
    """
    file = checkpoint / DIGESTS_FILE
    if not file.is_file():  # written by a version that recorded their number alone
        before, now = read_state(checkpoint).num_prompts, len(prompts) // BYTES
        rule = f"it was made with {before} usable prompts and there are {now} now"
        if before == now:
            return None
    else:
        changed = difference(file.read_bytes(), prompts)
        if changed is None:
            return None
        rule = _explanation(changed, config.data.train)
        record = read_state(checkpoint).settings
        reasons = [c for c in changed_settings(record, config) if c.is_of(_OF_PROMPTS)]
        if reasons and record:
            rule += f"; changed settings: {'; '.join(map(str, reasons))}"
    if config.checkpoint.accept_changed_data:
        return f"checkpoint.accept_changed_data=true, going on with other data: {rule}"
    raise rule_broken(
        "data.train.path",
        config.data.train.path,
        f"not the data of {checkpoint}: {rule}",
        "restore the data, start again with another run.dir, or go on with "
        "checkpoint.accept_changed_data=true",
    )


def _explanation(changed: Difference, dataset: Dataset) -> str:
    place = "" if changed.row is None else _place(dataset, changed.row)
    if changed.only_tokens:
        return (
            f"the texts are the same and their tokens are not, first at {place}: the chat "
            "template, what it is given, or the tokenizer has changed"
        )
    if changed.only_order and not changed.parts and changed.row_before is not None:
        return (
            f"the same prompts stand in other rows (seeds depend on them): {place} was row "
            f"{changed.row_before + 1}"
        )
    if changed.only_order:
        return f"the same prompts come in another order, first at {place}"
    counts = f"it was made with {changed.before} usable prompts and there are {changed.now} now"
    if changed.before == changed.now:
        counts = f"{changed.differing} of {changed.now} usable prompts differ"
    if changed.row is None:
        return f"{counts}; the last {changed.before - changed.now} are gone"
    if changed.row_before is None:
        return f"{counts}; the first new one is {place}"
    return f"{counts}, first at {place} (another {', '.join(changed.parts) or 'row'})"


def _place(dataset: Dataset, row: int) -> str:
    """Place of a row, as error messages name it."""
    return next(islice(read_rows(dataset, "data.train"), row, None))[0]


def check_base(checkpoint: Path, digest: str) -> None:
    """Refuse an adapter of other weights than the student begins with.

    Args:
        digest: `models.peft.weights_digest` of model.student.path.

    Raises:
        ConfigError
    """
    saved = read_state(checkpoint).model.get(BASE)
    if saved != digest:
        raise rule_broken(
            "checkpoint.resume",
            str(checkpoint),
            f"its adapter is one of other weights (SHA-256 {str(saved)[:16]}) than those of "
            f"model.student.path ({digest[:16]})",
            "restore the model that the run began with, or give another run.dir",
        )


def model_identity(hf: Any, adapter: Adapter | None = None) -> dict[str, Any]:
    """What a checkpoint depends on: fields of a Hugging Face config, and what an adapter is."""
    fields = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        *("moe_intermediate_size", "num_local_experts", "mlp_only_layers", "decoder_sparse_step"),
    )
    identity = {field: getattr(hf, field, None) for field in fields}
    if adapter is None:
        return identity
    shape = adapter.model_dump(mode="json", exclude={"dropout", "init"})
    return identity | {f"adapter.{name}": value for name, value in shape.items()}
