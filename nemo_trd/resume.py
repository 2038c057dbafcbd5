"""Whether a run can go on from a checkpoint: the same model, the same data. Imports no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nemo_trd.checkpoint_dir import read_state
from nemo_trd.config import rule_broken

log = logging.getLogger(__name__)


def check_matches(checkpoint: Path, model: dict[str, Any], digest: str) -> None:
    """Refuse a checkpoint of another model; warn when other settings have changed.

    Raises:
        ConfigError: naming the first field of the architecture that differs.
    """
    state = read_state(checkpoint)
    for field in sorted({*state.model, *model}):
        if state.model.get(field) != model.get(field):
            raise rule_broken(
                "checkpoint.resume",
                str(checkpoint),
                f"it holds a model with {field} = {state.model.get(field)!r}, and the student "
                f"has {model.get(field)!r}",
                "give another run.dir, or the model that the run began with",
            )
    if state.digest != digest:
        log.warning(
            "settings that change the numbers differ from those that %s was made with; "
            "compare config.yaml of the run directory",
            checkpoint,
        )


def check_prompts(checkpoint: Path, num_prompts: int) -> None:
    """Refuse to go on with other data: the order of prompts would not be the one begun.

    Raises:
        ConfigError: both numbers.
    """
    recorded = read_state(checkpoint).num_prompts
    if recorded != num_prompts:
        raise rule_broken(
            "data.train.path",
            num_prompts,
            f"{checkpoint} was made with {recorded} usable prompts and there are {num_prompts} now",
            "restore the data, or start again with another run.dir",
        )


def model_identity(hf: Any) -> dict[str, Any]:
    """What of a Hugging Face config a checkpoint depends on."""
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
    )
    return {field: getattr(hf, field, None) for field in fields}
