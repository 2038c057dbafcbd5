"""Model shapes: config.json without transformers, and parameters per pipeline stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Adapter, Layout, ModelSource
from nemo_trd.models.directory import check_model_type, read_json
from nemo_trd.models.family import (
    WeightTensor,
    dense_layers,
    experts_of,
    family_of,
    head_dim,
    is_sparse,
    layer_tensors,
    outer_tensors,
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
    "norm_topk_prob": False,
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
REQUIRED_OF_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")


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
    keys = [*REQUIRED, "num_key_value_heads"]
    if family_of(hf).sparse:
        keys += REQUIRED_OF_EXPERTS
        if not hasattr(hf, "num_experts"):  # as transformers 5 names it
            hf.num_experts = getattr(hf, "num_local_experts", None)
    for key in keys:
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


def has_shape(hf: Any) -> bool:
    """Whether sizes are known of it: of a teacher that only its servers hold just lengths are."""
    return hasattr(hf, "hidden_size")


def parameters(hf: Any) -> int:
    """Number of parameters of the whole model, unpadded; a tied output weight counts once."""
    dense = dense_layers(hf)
    layers = dense * _count(layer_tensors(hf, sparse=False)) if dense else 0
    if sparse := hf.num_hidden_layers - dense:
        layers += sparse * _count(layer_tensors(hf, sparse=True))
    return layers + _count(outer_tensors(hf))


def expert_parameters(hf: Any) -> int:
    """Of these, how many are in experts."""
    experts = experts_of(hf)
    if experts is None:
        return 0
    sparse = hf.num_hidden_layers - dense_layers(hf)
    return sparse * experts.count * 3 * hf.hidden_size * experts.width


def _count(tensors: Mapping[str, WeightTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def touched_parameters(hf: Any, tokens: float) -> float:
    """Number of parameters that a pass of `tokens` tokens reads, with experts drawn alike.

    Of one token these are the model's active parameters.
    """
    experts = experts_of(hf)
    if experts is None:
        return parameters(hf)
    share = 1 - (1 - experts.per_token / experts.count) ** tokens
    return parameters(hf) - (1 - share) * expert_parameters(hf)


def stage_parameters(hf: Any, layout: Layout) -> list[StageParameters]:
    """Parameters of each pipeline rank, as each of its tensor parallel ranks holds them.

    The vocabulary is padded. A tied output weight is a second copy on the last of several stages.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    vocabulary = padded_vocab_size(hf.vocab_size, tp) // tp * hf.hidden_size
    of_kinds = {
        sparse: _layer_parameters(layer_tensors(hf, sparse=sparse), layout)
        for sparse in {is_sparse(hf, layer) for layer in range(hf.num_hidden_layers)}
    }
    stages = []
    for stage in range(pp):
        total = vocabulary if stage == 0 else 0
        if stage == pp - 1:
            total += hf.hidden_size  # the final norm
            total += vocabulary if not hf.tie_word_embeddings or pp > 1 else 0
        layers = [of_kinds[is_sparse(hf, n)] for n in layers_of_stage(hf, layout, stage)]
        stages.append(
            StageParameters(
                total + sum(layer.total for layer in layers),
                sum(layer.linear for layer in layers),
                sum(layer.experts for layer in layers),
            )
        )
    return stages


def _layer_parameters(tensors: Mapping[str, WeightTensor], layout: Layout) -> StageParameters:
    """What one rank holds of a layer."""
    tp, etp = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
    experts = [math.prod(t.shape) // etp for t in tensors.values() if t.expert is not None]
    own_experts = sum(experts) // layout.expert_model_parallel_size
    total = linear = own_experts
    for tensor in tensors.values():
        if tensor.expert is None:
            size = math.prod(tensor.shape) // (1 if tensor.split_axis is None else tp)
            total += size
            linear += size if tensor.is_linear else 0
    return StageParameters(total, linear, own_experts)


def layers_of_stage(hf: Any, layout: Layout, stage: int) -> list[int]:
    """Numbers of the layers that a pipeline rank has, from 0."""
    return [n for n in range(hf.num_hidden_layers) if _stage(hf, layout, n) == stage]


def _stage(hf: Any, layout: Layout, layer: int) -> int:
    """Pipeline rank that has a layer."""
    pp = layout.pipeline_model_parallel_size
    chunks = pp * (layout.virtual_pipeline_model_parallel_size or 1)
    return layer * chunks // hf.num_hidden_layers % pp


def adapter_parameters(hf: Any, adapter: Adapter) -> int:
    """Number of parameters of a whole adapter."""
    return sum(math.prod(tensor.shape) for tensor in adapter_tensors(hf, adapter).values())


def active_adapter_parameters(hf: Any, adapter: Adapter) -> float:
    """Of these, how many a token meets: of those on experts its experts' share."""
    experts = experts_of(hf)
    share = 1.0 if experts is None else experts.per_token / experts.count
    return sum(
        math.prod(tensor.shape) * (share if tensor.of_experts else 1.0)
        for tensor in adapter_tensors(hf, adapter).values()
    )


def stage_adapter_parameters(hf: Any, layout: Layout, adapter: Adapter) -> list[StageParameters]:
    """Parameters of an adapter on each pipeline rank, as each of its tensor parallel ranks holds
    them: the matrix of a pair that is not split is whole on every one. None is in FP8."""
    total, experts = ([0] * layout.pipeline_model_parallel_size for _ in range(2))
    for tensor in adapter_tensors(hf, adapter).values():
        assert tensor.layer is not None
        stage = _stage(hf, layout, tensor.layer)
        ranks = 1 if tensor.split_axis is None else layout.tensor_model_parallel_size
        if tensor.of_experts:
            ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
            experts[stage] += math.prod(tensor.shape) // ranks
        total[stage] += math.prod(tensor.shape) // ranks
    return [StageParameters(*own) for own in zip(total, repeat(0), experts)]


def key_value_bytes(hf: Any, element: int = 2) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * hf.num_hidden_layers * hf.num_key_value_heads * head_dim(hf) * element
