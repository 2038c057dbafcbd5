"""A LoRA adapter in the files of Hugging Face PEFT, and what it must have to belong to a model.

adapter_config.json has its settings, adapter_model.safetensors its matrices: for each linear layer
W [out, in] among its targets A [rank, in] as `lora_A.weight` and B [out, rank] as `lora_B.weight`,
below the layer's name in the model. The header of the latter also keeps the digest of the weights
that the adapter was trained on, which PEFT does not look at.

transformers has the weights of all experts of a layer in two tensors, [experts, out, in]: gate and
up in one, down in the other. PEFT (`lora.ParamWrapper`, `target_parameters`) puts one A and one B
on each expert's slice, so gate and up have one A together. Those of all experts are one tensor:
A [experts x rank, in], expert by expert, and B [out, rank x experts], where the experts alternate.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Adapter
from nemo_trd.models.directory import (
    ADAPTER_NAME,
    ADAPTER_WEIGHTS,
    StoredTensor,
    read_json,
    stored_tensors,
    tensors_of_file,
)
from nemo_trd.models.family import (
    LayerNames,
    WeightTensor,
    dense_layers,
    experts_of,
    family_of,
    is_sparse,
    layer_tensors,
)

log = logging.getLogger(__name__)

FIELD = "student.adapter.init"
MLP_TARGETS = ("gate", "up", "down")
BASE_DIGEST = "base_sha256"  # in the header of adapter_model.safetensors
THREADS = 4  # that hash weights; hashlib lets them run beside each other
# Settings of PEFT that change what an adapter computes, with the only values that are supported.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# Others that do, and that older versions do not have: looked at, and not written.
_ABSENT: dict[str, Any] = {
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "monteclora_config": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "kasa_config": None,
}
# Values of init_lora_weights with which PEFT leaves the weights of the model as they are. Others,
# such as pissa and olora, take the first B A off them, and do so again whenever it loads them.
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
_MERGED_OR_PLAIN = (
    "merge it into its model and train that one, or, where PEFT cannot merge it, begin with a "
    "plain LoRA adapter"
)


def target_modules(names: LayerNames) -> dict[str, str]:
    """Target in `student.adapter.targets` -> the linear layer's name below its layer."""
    return {
        "q": names.query,
        "k": names.key,
        "v": names.value,
        "o": names.attention_output,
        "gate": names.gate,
        "up": names.up,
        "down": names.down,
    }


def matrix_names(module: str) -> tuple[str, str]:
    """Names of A and B of a linear layer in adapter_model.safetensors.

    Args:
        module: the layer's name in the model, such as model.layers.0.self_attn.q_proj.
    """
    below = f"base_model.model.{module}"
    return f"{below}.lora_A.weight", f"{below}.lora_B.weight"


def adapted_modules(hf: Any, adapter: Adapter) -> dict[str, WeightTensor]:
    """Every linear layer of the model that gets an A and a B, by name, with its weight."""
    family = family_of(hf)
    modules = target_modules(family.layer)
    chosen = {f"{modules[target]}.weight": modules[target] for target in adapter.targets}
    sparse = [is_sparse(hf, layer) for layer in range(hf.num_hidden_layers)]
    of_kinds = {kind: layer_tensors(hf, sparse=kind) for kind in set(sparse)}
    return {
        f"{family.layers}.{layer}.{module}": replace(of_kinds[kind][name], layer=layer)
        for layer, kind in enumerate(sparse)
        for name, module in chosen.items()
        if name in of_kinds[kind]
    }


@dataclass(frozen=True)
class FusedWeight:
    """Weights of all experts of a layer that are one tensor in transformers.

    layer: number of the layer.
    experts: number of experts.
    parts: modules of an expert whose rows lie in it, one behind the other.
    rows: outputs of each of them.
    inputs: of each of them, the same for all.
    split_axis: over which expert tensor parallel ranks split the weights of these modules.
    """

    layer: int
    experts: int
    parts: tuple[str, ...]
    rows: int
    inputs: int
    split_axis: int


def adapted_experts(hf: Any, adapter: Adapter) -> dict[str, FusedWeight]:
    """Those among the targets, by the name below which PEFT has A and B of each.

    PEFT wraps the module that holds both tensors once for each: gate and up first, and down around
    it.
    """
    family, experts = family_of(hf), experts_of(hf)
    if experts is None:
        return {}
    names, kinds = family.layer, dict[str, tuple[str, ...]]()
    down, gate_up = "down" in adapter.targets, "gate" in adapter.targets
    if gate_up:
        inner = f"{names.experts}.base_layer" if down else names.experts
        kinds[inner] = (names.expert_gate, names.expert_up)
    if down:
        kinds[names.experts] = (names.expert_down,)
    of_layer, found = layer_tensors(hf, sparse=True), {}
    for layer in range(hf.num_hidden_layers):
        if not is_sparse(hf, layer):
            continue
        for module, parts in kinds.items():
            one = of_layer[f"{names.expert(parts[0], 0)}.weight"]
            assert one.split_axis is not None
            rows, inputs = one.shape
            found[f"{family.layers}.{layer}.{module}"] = FusedWeight(
                layer, experts.count, parts, rows, inputs, one.split_axis
            )
    return found


def adapter_tensors(hf: Any, adapter: Adapter) -> dict[str, WeightTensor]:
    """Every tensor of an adapter by its name in adapter_model.safetensors.

    Where a linear layer is split over its outputs B is, where it is split over its inputs A.
    """
    tensors = {}
    for module, fused in adapted_experts(hf, adapter).items():
        a, b = matrix_names(module)
        outputs, columns = len(fused.parts) * fused.rows, fused.experts * adapter.rank
        tensors[a] = WeightTensor((columns, fused.inputs), layer=fused.layer, of_experts=True)
        tensors[b] = WeightTensor((outputs, columns), layer=fused.layer, of_experts=True)
    for module, weight in adapted_modules(hf, adapter).items():
        (outputs, inputs), axis = weight.shape, weight.split_axis
        a, b = matrix_names(module)
        tensors[a] = WeightTensor((adapter.rank, inputs), 1 if axis == 1 else None, weight.layer)
        tensors[b] = WeightTensor((outputs, adapter.rank), 0 if axis == 0 else None, weight.layer)
    return tensors


def scale(adapter: Adapter) -> float:
    """Factor of B A x: alpha / rank, with rslora alpha / sqrt(rank) (arXiv 2312.03732)."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)


def _target_parameters(hf: Any, adapter: Adapter) -> list[str]:
    """Those of the targets that PEFT must be given as parameters, not as modules.

    In a model with experts these are all in the MLP: PEFT takes a module gate_proj for that of the
    experts, and puts nothing on the linear layer of that name in a dense layer.
    """
    if experts_of(hf) is None:
        return []
    names = family_of(hf).layer
    fused = {"gate": names.fused_gate_up, "up": names.fused_gate_up, "down": names.fused_down}
    chosen = [target for target in MLP_TARGETS if target in adapter.targets]
    of_experts = [f"{names.experts}.{fused[target]}" for target in chosen]
    of_dense = [f"{target_modules(names)[target]}.weight" for target in chosen]
    return list(dict.fromkeys(of_experts)) + (of_dense if dense_layers(hf) else [])


def config_json(hf: Any, adapter: Adapter, base: str) -> dict[str, Any]:
    """What adapter_config.json says of an adapter of the model in the directory `base`.

    Args:
        hf: config of that model.
    """
    modules, parameters = target_modules(family_of(hf).layer), _target_parameters(hf, adapter)
    linear = [t for t in adapter.targets if not (parameters and t in MLP_TARGETS)]
    whole = adapter.alpha.is_integer()  # vLLM wants a whole number
    return _PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if whole else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": [modules[target].split(".")[-1] for target in linear],
        **({"target_parameters": parameters} if parameters else {}),
        "inference_mode": True,
    }


def begins_from_directory(adapter: Adapter) -> bool:
    """Whether A and B are those of a PEFT directory, which `init` names."""
    return adapter.init not in ("kaiming", "gaussian")


def check_beginning(hf: Any, adapter: Adapter) -> Iterator[ConfigError]:
    """Yield why the adapter in the directory that `init` names is not one of these settings.

    Args:
        hf: config of the model that it is put on.
    """
    if not begins_from_directory(adapter):
        return
    try:
        settings, stored = read_adapter(Path(adapter.init))
    except ConfigError as error:
        yield error
        return
    for key, plain in (_PLAIN | _ABSENT).items():
        if settings.get(key, plain) != plain and settings[key]:
            yield rule_broken(
                f"{FIELD} ({Path(adapter.init) / ADAPTER_NAME}: {key})",
                settings[key],
                f"adapters with {key} = {json.dumps(plain)} are supported",
                _MERGED_OR_PLAIN,
            )
    beginning = settings.get("init_lora_weights", True)
    if beginning not in _KEEPS_BASE:
        yield rule_broken(
            f"{FIELD} ({Path(adapter.init) / ADAPTER_NAME}: init_lora_weights)",
            beginning,
            "PEFT changes the weights of the model whenever it loads such an adapter",
            _MERGED_OR_PLAIN,
        )
    own = {
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "rslora": bool(settings.get("use_rslora", False)),
    }
    for key, value in own.items():
        if value != getattr(adapter, key):
            yield rule_broken(
                f"student.adapter.{key}",
                getattr(adapter, key),
                f"the adapter in {adapter.init} has {value}",
                f"set it to {json.dumps(value)}, or student.adapter.init=kaiming",
            )
    if own["rank"] == adapter.rank:
        yield from _different_tensors(hf, adapter, stored)


def _different_tensors(
    hf: Any, adapter: Adapter, stored: dict[str, StoredTensor]
) -> Iterator[ConfigError]:
    expected = {name: tensor.shape for name, tensor in adapter_tensors(hf, adapter).items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if shapes == expected:
        return
    name = min(shapes.items() ^ expected.items())[0]
    yield rule_broken(
        FIELD,
        adapter.init,
        f"with student.adapter.targets = {list(adapter.targets)} the model has "
        f"{_described(expected, name)} of {name}, and the adapter {_described(shapes, name)}",
        "set targets to the adapter's, or name the model that it was trained on",
    )


def _described(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return f"a shape {list(shapes[name])}" if name in shapes else "nothing"


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read adapter_config.json and the header of adapter_model.safetensors.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if not directory.is_dir():
        raise rule_broken(
            FIELD,
            str(directory),
            "it is kaiming, gaussian, or the directory of an adapter, and there is no such one",
            "name a directory with adapter_config.json",
        )
    settings, weights = read_json(directory / ADAPTER_NAME, FIELD), directory / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise rule_broken(
            FIELD, str(weights), "there is no such file", "save the adapter as safetensors"
        )
    return settings, tensors_of_file(weights, FIELD)


def check_base_of_beginning(adapter: Adapter, digest: str, base: str) -> None:
    """Refuse an adapter that says that it was trained on other weights.

    Warns where it does not say so, as adapters of PEFT do not, and names another model.

    Args:
        digest: `weights_digest` of the model that it is put on.
        base: the directory of that model.

    Raises:
        ConfigError
    """
    from safetensors import safe_open

    if not begins_from_directory(adapter):
        return
    directory = Path(adapter.init)
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as opened:
        recorded = (opened.metadata() or {}).get(BASE_DIGEST)
    named = read_json(directory / ADAPTER_NAME, FIELD).get("base_model_name_or_path")
    if recorded is None and named and Path(named).name != Path(base).resolve().name:
        log.warning(
            "%s = %s was trained on %s, it says, and records no digest of those weights; "
            "model.student.path is %s",
            *(FIELD, adapter.init, named, base),
        )
    if recorded not in (None, digest):
        raise rule_broken(
            FIELD,
            adapter.init,
            f"it was trained on other weights (SHA-256 {recorded[:16]}) than those of "
            f"model.student.path ({digest[:16]})",
            "name the model that it was trained on, or student.adapter.init=kaiming",
        )


def weights_digest(directory: Path, field: str) -> str:
    """SHA-256 of all weights of a model directory: names, dtypes, shapes and bytes of the tensors.

    The same however they are divided over files.

    Raises:
        ConfigError: as `directory.stored_tensors`.
    """
    from safetensors import safe_open

    stored = stored_tensors(directory, field)

    def one(name: str) -> str:
        import torch

        tensor = stored[name]
        with safe_open(tensor.file, framework="pt") as opened:
            values = opened.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(memoryview(values)).hexdigest()
        return f"{name} {tensor.dtype} {list(tensor.shape)} {digest}\n"

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return hashlib.sha256("".join(pool.map(one, sorted(stored))).encode()).hexdigest()
