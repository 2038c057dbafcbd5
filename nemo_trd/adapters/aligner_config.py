"""From a configuration with NeMo-Aligner's keys to a `Config`.

Aligner's keys keep their meaning; what they cannot say stands under `model.trd` in the names of
`conf/`, and which files of `conf/` are the base under `model.trd.groups`.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.load import composed, validate
from nemo_trd.config.schema import Config

# Where a key of Aligner is only spelt differently here.
NAMES = {
    "trainer.trd.max_steps": "train.num_steps",
    "trainer.trd.val_check_interval": "evaluation.interval",
    "trainer.trd.save_interval": "checkpoint.save_interval",
    "trainer.trd.gradient_clip_val": "optimizer.clip_grad",
    "trainer.trd.num_rollouts_per_prompt": "train.rollouts_per_prompt",
    "exp_manager.explicit_log_dir": "run.dir",
    "pretrained_checkpoint.restore_from_path": "model.student.path",
    "model.seed": "run.seed",
    "model.micro_batch_size": "train.micro_batch_size",
    "model.sequence_parallel": "parallel.student.sequence_parallel",
    "model.tensor_model_parallel_size": "parallel.student.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size": "parallel.student.pipeline_model_parallel_size",
    "model.data.train": "data.train.path",
    "model.optim.lr": "optimizer.lr",
    "model.optim.weight_decay": "optimizer.weight_decay",
    "model.optim.betas": "optimizer.betas",
    "model.optim.sched.min_lr": "optimizer.min_lr",
}
# The same of an adapter, where `model.peft.peft_scheme` is lora.
ADAPTER_NAMES = {
    "model.peft.lora_tuning.adapter_dim": "student.adapter.rank",
    "model.peft.lora_tuning.alpha": "student.adapter.alpha",
    "model.peft.lora_tuning.adapter_dropout": "student.adapter.dropout",
    "model.peft.restore_from_path": "student.adapter.init",
}
# What is translated below, and what is the experiment manager's alone.
OTHERS = {
    *("model.data.validation", "model.peft.peft_scheme", "model.peft.lora_tuning.target_modules"),
    *("model.peft.lora_tuning.variant", "model.peft.lora_tuning.dropout_position"),
    *("model.trd", "model.global_batch_size", "model.optim.sched.warmup_steps"),
    *("model.optim.sched.name", "trainer.precision", "exp_manager", "name"),
}
SCHEDULES = {"CosineAnnealing": "cosine", "linear": "linear", "constant": "constant"}
SCHEMES = {"none": "none", "lora": "lora"}
TARGETS = {
    "attention_qkv": ["q", "k", "v"],
    "attention_dense": ["o"],
    "mlp_fc1": ["gate", "up"],
    "mlp_fc2": ["down"],
    "attention": ["q", "k", "v", "o"],
    "mlp": ["gate", "up", "down"],
    "all": ["q", "k", "v", "o", "gate", "up", "down"],
}
PRECISIONS = {"bf16": "bf16", "bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}


def config_from_aligner(cfg: DictConfig) -> Config:
    """Settings of a run from those of a script of Aligner's shape.

    Raises:
        ConfigError: a key without a value, a key that nothing would read, or a broken rule.
    """
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, value in _leaves(container, ""):
        if value == "???":
            raise ConfigError(f"{key} has no value. Fix: set {key}=...")
        if not _is_known(key):
            raise rule_broken(key, value, "nothing reads this key", "remove it")
    trd = container["model"]["trd"]
    groups = [f"{group}={name}" for group, name in trd.pop("groups", {}).items()]
    adapted = OmegaConf.select(cfg, "model.peft.peft_scheme") is not None
    adapted = adapted and _choice(cfg, "model.peft.peft_scheme", SCHEMES) == "lora"
    if adapted:
        groups.append("student.adapter=lora")
    base: Any = OmegaConf.to_container(composed(groups))
    settings: Any = OmegaConf.merge(base, trd)
    for key, name in (NAMES | (ADAPTER_NAMES if adapted else {})).items():
        value = OmegaConf.select(cfg, key)
        if value is not None:
            OmegaConf.update(settings, name, value)
    _translate(cfg, settings)
    if adapted:
        _translate_adapter(cfg, settings)
    return validate(settings)


def _translate(cfg: DictConfig, settings: DictConfig) -> None:
    """Settings that are not the same under another name."""
    if OmegaConf.select(cfg, "exp_manager.max_time_per_run") is not None:
        raise rule_broken(
            "exp_manager.max_time_per_run",
            cfg.exp_manager.max_time_per_run,
            "a run ends early on a signal: SIGUSR1 or SIGTERM",
            "set it to null, and let the scheduler send one before its limit",
        )
    settings.optimizer.schedule = _choice(cfg, "model.optim.sched.name", SCHEDULES)
    settings.precision.dtype = _choice(cfg, "trainer.precision", PRECISIONS)
    train, size = settings.train, cfg.model.global_batch_size  # trajectories of one update
    if size % train.rollouts_per_prompt:
        raise rule_broken(
            "model.global_batch_size",
            size,
            f"trainer.trd.num_rollouts_per_prompt = {train.rollouts_per_prompt} must divide it",
            "make it a multiple",
        )
    train.prompts_per_step = size // train.rollouts_per_prompt
    train.max_tokens_per_micro_batch = None
    warmup_steps = cfg.model.optim.sched.warmup_steps
    if warmup_steps > train.num_steps:
        raise rule_broken(
            "model.optim.sched.warmup_steps",
            warmup_steps,
            f"it may not exceed trainer.trd.max_steps = {train.num_steps}",
            "lower it",
        )
    settings.optimizer.warmup_fraction = warmup_steps / (train.num_steps + 1)
    if cfg.model.data.validation is None:
        settings.evaluation.interval = None
    else:  # of the same columns
        settings.data.validation = {**settings.data.train, "path": cfg.model.data.validation}


def _translate_adapter(cfg: DictConfig, settings: DictConfig) -> None:
    """The settings of Aligner's LoRA, as far as Hugging Face PEFT's LoRA has them too."""
    tuning: Any = OmegaConf.select(cfg, "model.peft.lora_tuning") or {}
    if tuning.get("alpha") is None and tuning.get("adapter_dim") is not None:
        settings.student.adapter.alpha = tuning.adapter_dim  # as in NeMo
    _only(cfg, "model.peft.lora_tuning.variant", "canonical", "q, k, v, gate and up have an A each")
    position = "model.peft.lora_tuning.dropout_position"
    _only(cfg, position, "pre", "dropout acts on the input of A")
    field = "model.peft.lora_tuning.target_modules"
    targets: list[str] = []
    for module in tuning.get("target_modules") or ["attention_qkv"]:  # NeMo's default
        if module not in TARGETS:
            raise rule_broken(field, module, f"known here: {', '.join(TARGETS)}", "choose of them")
        targets += [target for target in TARGETS[module] if target not in targets]
    settings.student.adapter.targets = targets


def _only(cfg: DictConfig, key: str, allowed: str, rule: str) -> None:
    value = OmegaConf.select(cfg, key)
    if value not in (None, allowed):
        raise rule_broken(key, value, rule, f"set it to {allowed}, or leave it out")


def _choice(cfg: DictConfig, key: str, names: dict[str, str]) -> str:
    value = str(OmegaConf.select(cfg, key))
    if value not in names:
        raise rule_broken(key, value, f"known here: {', '.join(names)}", "choose one of them")
    return names[value]


def _is_known(key: str) -> bool:
    parts = key.split(".")
    prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return bool(prefixes & (NAMES.keys() | ADAPTER_NAMES.keys() | OTHERS))


def _leaves(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        leaves += _leaves(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
    return leaves
