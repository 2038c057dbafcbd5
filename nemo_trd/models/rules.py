"""Which models and layouts can be built: rules on config.json alone. Imports no torch.

`hf` is a `transformers.PretrainedConfig` or anything else with its attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Layout
from nemo_trd.models.family import (
    FAMILIES,
    family_of,
    fp8_multiple,
    head_dim,
    rope_parameters,
)


def check_supported(hf: Any) -> None:
    """Refuse what the Megatron models would compute differently from transformers.

    Raises:
        ConfigError: naming config.json, the key, its value and what is supported.
    """
    file = Path(hf.name_or_path or "") / "config.json"

    def require(key: str, value: object, holds: bool, rule: str) -> None:
        if not holds:
            raise _unsupported(file, key, value, rule)

    require("model_type", hf.model_type, hf.model_type in FAMILIES, _one_of(FAMILIES))
    family, architectures = family_of(hf), hf.architectures or []
    require(
        "architectures",
        architectures,
        set(architectures) <= {family.architecture},
        f"of model_type {hf.model_type} {family.architecture} is supported",
    )
    require("hidden_act", hf.hidden_act, hf.hidden_act == "silu", "silu is supported")
    keys = ("attention_bias", "mlp_bias")
    biases = {key: bool(getattr(hf, key, False)) for key in keys}
    if not (family.optional_biases and all(biases.values())):
        some = " and ".join(name for name, known in FAMILIES.items() if known.optional_biases)
        for key, value in biases.items():
            require(
                key, value, not value, f"supported are {' and '.join(keys)} together, of {some}"
            )
    window = getattr(hf, "sliding_window", None)
    layer_types = set(getattr(hf, "layer_types", None) or [])
    windowed = getattr(hf, "use_sliding_window", False) and window is not None
    require(
        "sliding_window",
        window,
        not windowed and layer_types <= {"full_attention"},
        "every layer must use full attention",
    )
    quantization = getattr(hf, "quantization_config", None)
    require("quantization_config", quantization, quantization is None, "weights must be plain")
    rope = rope_parameters(hf)
    require(
        "rope_type",
        rope["rope_type"],
        rope["rope_type"] in family.rope_types,
        _one_of(family.rope_types),
    )
    if rope["rope_type"] == "yarn":
        factor = rope.get("factor")
        rule = "YaRN wants a factor of 1 or more"
        require("factor", factor, isinstance(factor, int | float) and factor >= 1, rule)
    partial = rope.get("partial_rotary_factor", 1.0)
    require("partial_rotary_factor", partial, partial == 1.0, "1.0 is supported")


def _unsupported(file: Path, key: str, value: object, rule: str) -> ConfigError:
    return rule_broken(f"{file}: {key}", value, rule, "use a supported model")


def _one_of(values: Iterable[str]) -> str:
    return f"supported are {', '.join(values)}"


def check_layout(hf: Any, layout: Layout, field: str) -> None:
    """Refuse a layout that does not divide the model. `field` is e.g. "parallel.student".

    The vocabulary always divides: it is padded.

    Raises:
        ConfigError: naming the field, its value and the size that it does not divide.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(hf, name)
        if size % tp:
            raise rule_broken(
                f"{field}.tensor_model_parallel_size",
                tp,
                f"it must divide {name} of the model, {size}",
                f"use a divisor of {size}",
            )
    layers, virtual = hf.num_hidden_layers, layout.virtual_pipeline_model_parallel_size or 1
    if layers % (pp * virtual):
        key = "virtual_" if virtual > 1 else ""
        raise rule_broken(
            f"{field}.{key}pipeline_model_parallel_size",
            virtual if virtual > 1 else pp,
            f"{pp * virtual} stages must divide num_hidden_layers of the model, {layers}",
            f"let the stages be a divisor of {layers}",
        )


def check_fp8(hf: Any, layout: Layout, field: str, recipe: str) -> None:
    """Refuse a layout in which a rank's matrices are none that FP8 products take.

    Args:
        hf: of a model whose layers multiply in FP8, and which `layout` divides.
        field: e.g. "parallel.student".
        recipe: `precision.fp8_recipe`.

    Raises:
        ConfigError: naming the dimension of the matrices on one rank.
    """
    tp, multiple = layout.tensor_model_parallel_size, fp8_multiple(recipe)
    queries, keys = (
        heads * head_dim(hf) // tp for heads in (hf.num_attention_heads, hf.num_key_value_heads)
    )
    for name, size in (
        ("hidden_size", hf.hidden_size),
        ("intermediate_size / tensor_model_parallel_size", hf.intermediate_size // tp),
        ("heads x head_dim / tensor_model_parallel_size", queries),
        ("rows of query, key and value / tensor_model_parallel_size", queries + 2 * keys),
    ):
        if size % multiple:
            raise rule_broken(
                f"{field}.tensor_model_parallel_size",
                tp,
                f"FP8 ({recipe}) multiplies matrices whose sides are multiples of {multiple}, and "
                f"{name} is {size}",
                "use fewer ranks, or switch FP8 off for this model",
            )
