"""Model shapes: config.json without transformers, and parameters per pipeline stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Adapter, Layout, ModelSource
from nemo_trd.models.directory import check_model_type, read_json
from nemo_trd.models.family import (
    expected_tensors,
    experts_of,
    family_of,
    head_dim,
    padded_vocab_size,
)
from nemo_trd.models.peft import adapter_tensors
from nemo_trd.models.read import Model
from nemo_trd.models.rules import check_supported

SHIPPED = Path(__file__).parent / "models"
# Values that transformers assumes where config.json of a supported model leaves a key out.
DEFAULTS: dict[str, Any] = {
    "architectures": None,
    "attention_bias": False,
    "head_dim": None,
    "hidden_act": "silu",
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
REQUIRED_OF_SPARSE = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")


def read_model(source: ModelSource, field: str) -> tuple[Model, str | None]:
    """Read the model of a directory that need hold no more than config.json.

    Where there is no such directory, the shape that is shipped under its name takes its place:
    a run can be planned before anything has been downloaded. The model has no tokenizer.

    Returns: the model, and a note when its shape is a shipped one.

    Raises:
        ConfigError: neither exists, or config.json is damaged, incomplete or unsupported.
    """
    directory = Path(source.path).absolute()
    names = (directory.name, "-".join(directory.parts[-2:]))  # the toy's are in a directory: toy
    files = [SHIPPED / f"{name}.json" for name in names]
    shipped = next((file for file in files if file.is_file()), None)
    note = None
    if directory.is_dir():
        check_model_type(directory, field)
        settings = read_json(directory / "config.json", field)
    elif shipped is not None:
        settings = read_json(shipped, field)
        note = f"{field} = {source.path}: not on this machine; the shipped shape of that name"
    else:
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise rule_broken(
            field,
            source.path,
            "there is no such directory, and no shape is shipped under its name",
            f"give a directory with the model's config.json, or one of these names: {known}",
        )
    hf = as_namespace(settings, directory, field)
    check_supported(hf)
    return Model(field, directory, hf, tokenizer=None), note


def as_namespace(settings: Mapping[str, Any], directory: Path, field: str) -> SimpleNamespace:
    """config.json with the attributes that a `PretrainedConfig` would have.

    Raises:
        ConfigError: a size is missing or no positive integer.
    """
    hf = SimpleNamespace(**(DEFAULTS | dict(settings) | {"name_or_path": str(directory)}))
    if getattr(hf, "num_key_value_heads", None) is None:
        if not family_of(hf).key_value_heads_optional:
            raise _bad_size(directory, field, "num_key_value_heads", None)
        hf.num_key_value_heads = getattr(hf, "num_attention_heads", None)
    required = [*REQUIRED, "num_key_value_heads"]
    if family_of(hf).sparse:
        hf.num_experts = getattr(hf, "num_experts", getattr(hf, "num_local_experts", None))
        required += REQUIRED_OF_SPARSE
    for key in required:
        value = getattr(hf, key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _bad_size(directory, field, key, value)
    return hf


def _bad_size(directory: Path, field: str, key: str, value: object) -> ConfigError:
    return rule_broken(
        f"{field} ({directory / 'config.json'}: {key})",
        value,
        "it must be a positive integer",
        "copy config.json of the model again",
    )


@dataclass(frozen=True)
class StageParameters:
    """Parameters that one rank of a pipeline stage holds."""

    total: int
    linear: int  # of these, in the layers' matrices: what FP8 applies to
    experts: int  # of these, in experts
    layers: int


def has_shape(hf: Any) -> bool:
    """Whether sizes are known of it: of a teacher that only its servers hold just lengths are."""
    return hasattr(hf, "hidden_size")


def parameters(hf: Any) -> int:
    """Number of parameters of the whole model, unpadded; a tied output weight counts once."""
    return sum(math.prod(tensor.shape) for tensor in expected_tensors(hf).values())


def active_parameters(hf: Any) -> int:
    """Number of parameters of the whole model that one token meets."""
    experts = experts_of(hf)
    per_token = 0 if experts is None else experts.per_token
    return sum(
        math.prod(tensor.shape)
        for tensor in expected_tensors(hf).values()
        if tensor.expert is None or tensor.expert < per_token
    )


def stage_parameters(hf: Any, layout: Layout) -> list[StageParameters]:
    """Parameters of each pipeline rank, as each of its tensor parallel ranks holds them.

    The ranks that share out the experts of a layer have equally many of them. The vocabulary is
    padded. A tied output weight is a second copy on the last of several stages.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    total, linear, in_experts = [0] * pp, [0] * pp, [0] * pp
    experts = experts_of(hf)
    own = 0 if experts is None else experts.count // layout.expert_model_parallel_size
    vocabulary = padded_vocab_size(hf.vocab_size, tp) // tp * hf.hidden_size
    total[0] += vocabulary
    if not hf.tie_word_embeddings or pp > 1:
        total[-1] += vocabulary
    family = family_of(hf)
    for name, tensor in expected_tensors(hf).items():
        if name in (family.embedding, family.head):
            continue
        if tensor.expert is not None and tensor.expert >= own:
            continue
        ranks = tp if tensor.expert is None else layout.expert_tensor_parallel_size
        size = math.prod(tensor.shape) // (1 if tensor.split_axis is None else ranks)
        if tensor.layer is None:
            total[-1] += size  # the final norm
            continue
        stage = _stage(hf, layout, tensor.layer)
        total[stage] += size
        in_experts[stage] += size if tensor.expert is not None else 0
        if tensor.is_layer_matrix:
            linear[stage] += size
    layers = hf.num_hidden_layers // pp
    counts = zip(total, linear, in_experts, strict=True)
    return [StageParameters(*of_stage, layers) for of_stage in counts]


def _stage(hf: Any, layout: Layout, layer: int) -> int:
    """Pipeline rank that has a layer."""
    pp = layout.pipeline_model_parallel_size
    chunks = pp * (layout.virtual_pipeline_model_parallel_size or 1)
    return layer * chunks // hf.num_hidden_layers % pp


def adapter_parameters(hf: Any, adapter: Adapter) -> int:
    """Number of parameters of a whole adapter."""
    return sum(math.prod(tensor.shape) for tensor in adapter_tensors(hf, adapter).values())


def stage_adapter_parameters(hf: Any, layout: Layout, adapter: Adapter) -> list[int]:
    """Parameters of an adapter on each pipeline rank, as each of its tensor parallel ranks holds
    them: the matrix of a pair that is not split is whole on every one."""
    held = [0] * layout.pipeline_model_parallel_size
    for tensor in adapter_tensors(hf, adapter).values():
        tp = 1 if tensor.split_axis is None else layout.tensor_model_parallel_size
        assert tensor.layer is not None
        held[_stage(hf, layout, tensor.layer)] += math.prod(tensor.shape) // tp
    return held


def key_value_bytes(hf: Any, element: int = 2) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * hf.num_hidden_layers * hf.num_key_value_heads * head_dim(hf) * element
