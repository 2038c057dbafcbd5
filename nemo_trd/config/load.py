"""Composing the files of conf/ and turning them into checked settings."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.rules import check_consistent
from nemo_trd.config.schema import Config


def conf_dir() -> Path:
    """The configuration files: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


Schema = TypeVar("Schema", bound=BaseModel)


def validate(settings: DictConfig | dict[str, Any]) -> Config:
    """Turn what Hydra composed into a `Config`; see `validate_as`."""
    config = validate_as(Config, settings)
    check_consistent(config)
    return config


def validate_as(schema: type[Schema], settings: DictConfig | dict[str, Any]) -> Schema:
    """Turn what Hydra composed into settings of this schema.

    Raises:
        ConfigError: every broken rule, one a line: field, value, rule, fix.
    """
    try:
        plain = (
            OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
            if isinstance(settings, DictConfig)
            else settings
        )
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "?"
        raise ConfigError(
            f"{field} has no value: {str(error).splitlines()[0]}. Fix: set {field}=..."
        ) from error
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        lines = [_explain(schema, detail) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(schema: type[BaseModel], detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    if detail["type"] == "extra_forbidden":
        return _explain_unknown_key(schema, field, detail["input"])
    if detail["type"] == "missing":
        return f"{field}: missing. Fix: set {field}=..."
    return f"{field} = {detail['input']!r}: {detail['msg']}. Fix: give a value that obeys this."


def _explain_unknown_key(schema: type[BaseModel], field: str, value: object) -> str:
    path = field.split(".")
    sections = [_keys_of(schema, path[:depth]) for depth in range(len(path))]
    depth = next(d for d, keys in enumerate(sections) if keys is not None and path[d] not in keys)
    known = sections[depth] or []
    close = difflib.get_close_matches(path[depth], known, n=1)
    guess = ".".join([*path[:depth], *close, *path[depth + 1 :]])
    fix = f"did you mean {guess}?" if close else f"known keys here: {', '.join(known) or 'none'}"
    return f"{field} = {value!r}: unknown key. Fix: {fix}"


def _keys_of(schema: type[BaseModel], path: list[str]) -> list[str] | None:
    """Names of the settings in the section at `path`; none where there is no such section.

    None where the names are the user's own, as those of benchmarks.
    """
    section: type[BaseModel] = schema
    names = iter(path)
    for part in names:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        options = (annotation, *get_args(annotation))
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if get_origin(annotation) is dict and next(names, None) is None:
            return None
        if not inner:
            return []
        section = inner[0]
    return sorted(section.model_fields)


def compose(overrides: list[str], config_name: str = "config") -> Config:
    """Compose and validate from Python, as the command line does; see `compose_as`."""
    return validate(composed(overrides, config_name))


def compose_as(schema: type[Schema], overrides: list[str], config_name: str) -> Schema:
    """Compose `conf/CONFIG_NAME.yaml` and validate it as `schema`.

    Raises:
        ConfigError: an override that names nothing, or a broken rule.
    """
    return validate_as(schema, composed(overrides, config_name, schema))


def composed(
    overrides: list[str], config_name: str = "config", schema: type[BaseModel] = Config
) -> DictConfig:
    """Settings that Hydra makes of the files in `conf/` and the overrides, not yet checked.

    Raises:
        ConfigError: an override that names nothing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    # There is one in the way inside of a program that Hydra has started.
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            return hydra_compose(config_name, with_free_keys(overrides, schema))
    except (HydraException, OmegaConfBaseException) as error:
        message = explain_refused_override(str(error), overrides, schema)
        raise ConfigError(message) from error
    finally:
        GlobalHydra.instance().hydra = outer


def with_free_keys(overrides: list[str], schema: type[BaseModel] = Config) -> list[str]:
    """Overrides that Hydra takes: keys of settings that have any are added without a `+`.

    So `data.chat_template_kwargs.enable_thinking=false` can be said like every other setting. And
    `student.adapter=lora` chooses the file conf/student/adapter/lora.yaml.
    """
    overrides = [_of_group(override) for override in overrides]
    named = [re.match(r"[\w.]+(?==)", override) for override in overrides]
    return [
        f"++{override}" if name and _is_free(schema, name[0].split(".")) else override
        for override, name in zip(overrides, named, strict=True)
    ]


def _of_group(override: str) -> str:
    """`student/adapter=lora` of `student.adapter=lora`, where there is a file of that name."""
    key, _, value = override.partition("=")
    group = key.replace(".", "/")
    named = re.fullmatch(r"\w+(\.\w+)+=\w+", override)
    is_file = named is not None and (conf_dir() / group / f"{value}.yaml").is_file()
    return f"{group}={value}" if is_file else override


def _is_free(schema: type[BaseModel], path: list[str]) -> bool:
    """Whether the setting at `path` is, or is in, one whose keys are the user's own."""
    section = schema
    names = iter(path)
    for name in names:
        annotation = section.model_fields[name].annotation if name in section.model_fields else None
        for option in (annotation, *get_args(annotation)):
            if get_origin(option) is dict:
                option = get_args(option)[1]
                if not (isinstance(option, type) and issubclass(option, BaseModel)):
                    return True
                next(names, None)  # a name that the user gave to a section
            if isinstance(option, type) and issubclass(option, BaseModel):
                section = option
                break
        else:
            return False
    return False


def explain_refused_override(
    message: str, overrides: list[str], schema: type[BaseModel] = Config
) -> str:
    """Hydra's message, except that it suggests to append a key that nothing would read."""
    refused = re.match(r"Could not override '([\w.]+)'", message)
    if not refused:
        return message
    field = refused[1]
    value = next((o.split("=", 1)[1] for o in overrides if o.startswith(f"{field}=")), None)
    known = _keys_of(schema, field.split(".")[:-1])
    if value is None or known is None:
        return message
    section, _, name = field.rpartition(".")
    if name not in known:
        return _explain_unknown_key(schema, field, value)
    return (
        f"{field} = {value!r}: there is no section {section} here. Fix: give all of it, "
        f"'{section}={{{name}: {value}, ...}}' with the keys {', '.join(known)}, or choose a file "
        f"of conf/ that has it"
    )
