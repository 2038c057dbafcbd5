"""Which models and layouts can be built: rules on config.json alone. Imports no torch.

`hf` is a `transformers.PretrainedConfig` or anything else with its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Adapter, Layout
from nemo_trd.models.family import (
    FAMILIES,
    dense_layers,
    experts_of,
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
    for key in ("attention_bias", "mlp_bias"):
        value = bool(getattr(hf, key, False))
        some = [name for name, known in FAMILIES.items() if key in known.optional_biases]
        holds = not value or key in family.optional_biases
        require(key, value, holds, f"it is supported of {', '.join(some)}")
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
    if family.sparse:
        _check_experts(hf, require)
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


def _check_experts(hf: Any, require: Callable[[str, object, bool, str], None]) -> None:
    """What a config.json with experts must say of them."""
    shared = getattr(hf, "shared_expert_intermediate_size", None)
    require(
        "shared_expert_intermediate_size", shared, not shared, "shared experts are not supported"
    )
    step = getattr(hf, "decoder_sparse_step", None)
    require("decoder_sparse_step", step, step != 0, "every N-th layer has experts, N is 1 or more")
    sparse = hf.num_hidden_layers - dense_layers(hf)
    where = {key: getattr(hf, key, None) for key in ("mlp_only_layers", "decoder_sparse_step")}
    require(", ".join(where), where, sparse > 0, "at least one layer must have experts")
    experts = experts_of(hf)
    assert experts is not None
    chosen = experts.per_token
    rule = f"of {experts.count} experts (num_experts) no more can be chosen, and not none"
    require("num_experts_per_tok", chosen, 1 <= chosen <= experts.count, rule)
    require(
        "norm_topk_prob",
        experts.normalized,
        not (experts.normalized and chosen == 1),
        "of a single expert (num_experts_per_tok = 1) it makes every weight 1, so the router would "
        "never learn",
    )


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
    names = ["num_attention_heads", "num_key_value_heads"]
    names += ["intermediate_size"] if dense_layers(hf) else []
    for name in names:
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
    _check_expert_layout(hf, layout, field)


def _check_expert_layout(hf: Any, layout: Layout, field: str) -> None:
    """Refuse sizes that do not divide the experts, and any where there are none."""
    experts = experts_of(hf)
    for key, name in (
        ("expert_model_parallel_size", "num_experts"),
        ("expert_tensor_parallel_size", "moe_intermediate_size"),
    ):
        ranks = getattr(layout, key)
        if experts is None:
            if ranks > 1:
                raise rule_broken(
                    f"{field}.{key}",
                    ranks,
                    f"it shares out experts, and a model of model_type {hf.model_type} has none",
                    "set it to 1",
                )
            continue
        size = experts.count if name == "num_experts" else experts.width
        if size % ranks:
            raise rule_broken(
                f"{field}.{key}",
                ranks,
                f"it must divide {name} of the model, {size}",
                f"use a divisor of {size}",
            )
    if experts and layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise rule_broken(
            f"{field}.sequence_parallel",
            False,
            "in a model with experts tensor parallel ranks must each route tokens of their own: "
            f"tensor_model_parallel_size is {layout.tensor_model_parallel_size}",
            "set it to true",
        )


def adapts_experts(hf: Any, adapter: Adapter) -> bool:
    """Whether an adapter is on experts, too."""
    return experts_of(hf) is not None and not {"gate", "up", "down"}.isdisjoint(adapter.targets)


def check_expert_adapter(hf: Any, adapter: Adapter, layout: Layout) -> None:
    """Refuse an adapter on experts that PEFT has not, or that the layout does not divide.

    Raises:
        ConfigError
    """
    if not adapts_experts(hf, adapter):
        return
    if ("gate" in adapter.targets) != ("up" in adapter.targets):
        raise rule_broken(
            "student.adapter.targets",
            list(adapter.targets),
            f"in a model with experts (model_type {hf.model_type}) gate and up are one tensor, on "
            "which PEFT has one adapter",
            "name both, or none of them",
        )
    if adapter.dropout:
        raise rule_broken(
            "student.adapter.dropout",
            adapter.dropout,
            "PEFT adapts the tensors of all experts of a layer (target_parameters), and has no "
            "dropout there",
            "set it to 0, or leave gate, up and down out of student.adapter.targets",
        )
    if hf.hidden_size % layout.expert_tensor_parallel_size:
        raise rule_broken(
            "parallel.student.expert_tensor_parallel_size",
            layout.expert_tensor_parallel_size,
            "with an adapter on experts it must divide hidden_size of the model, "
            f"{hf.hidden_size}: ranks share out the adapter's matrices, too",
            f"use a divisor of {hf.hidden_size}",
        )


def check_load_balancing(hf: Any, coefficient: float) -> None:
    """Refuse a load-balancing loss of a student without experts.

    Raises:
        ConfigError
    """
    if coefficient and experts_of(hf) is None:
        raise rule_broken(
            "student.moe_aux_loss_coeff",
            coefficient,
            f"it balances the load of experts, and a student of model_type {hf.model_type} has "
            "none",
            "set it to 0",
        )


def check_no_experts_in_fp8(hf: Any, field: str, fp8: str) -> None:
    """Refuse FP8 where a model has experts.

    Args:
        field: the setting with that format, e.g. "precision.fp8".

    Raises:
        ConfigError
    """
    if experts_of(hf) is not None:
        raise rule_broken(
            field,
            fp8,
            f"a model of model_type {hf.model_type} has experts, and these are not computed in FP8",
            "set it to null",
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
