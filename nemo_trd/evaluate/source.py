"""The evaluated model: a Hugging Face directory, or a checkpoint of a run that is made into one."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ValidationError

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.evaluation import EvaluatedModel
from nemo_trd.config.schema import Adapter, ModelSource
from nemo_trd.models.directory import ADAPTER_NAME
from nemo_trd.records import latest
from nemo_trd.records.checkpoint_dir import STATE_FILE, candidates, defects, records_of

log = logging.getLogger(__name__)

BLOCKS, BLOCK_BYTES = 16, 4096  # of a file that its fingerprint looks at


@dataclass(frozen=True)
class Source:
    """Weights of `checkpoint`, or without one of `hf`; config.json and tokenizer of `hf`."""

    hf: ModelSource
    checkpoint: Path | None
    dtype: Literal["fp32", "bf16"]  # of a checkpoint
    adapter: Adapter | None = None  # what the checkpoint is of, if not of weights

    def fingerprint(self) -> str:
        """Tells other weights, and other tokenizers, from these; quick however large they are."""
        return fingerprint(self.checkpoint or Path(self.hf.path))

    def directory(self, output: Path) -> Path:
        """The Hugging Face directory; a checkpoint is converted once, to one below `output`."""
        if self.checkpoint is None:
            return Path(self.hf.path)
        converted = output / f"model-{self.fingerprint()}"
        if not (converted / "config.json").is_file():
            from nemo_trd.megatron.checkpoint_export import export_checkpoint

            export_checkpoint(self.checkpoint, self.hf, self.dtype, converted, self.adapter)
        return converted


class _RunModel(BaseModel):
    path: str
    trust_remote_code: bool = False


class _RunModels(BaseModel):
    student: _RunModel


class _RunPrecision(BaseModel):
    dtype: Literal["fp32", "bf16"]


class _RunStudent(BaseModel):
    adapter: Adapter | None = None


class _RunSettings(BaseModel):
    """The part of a run's config.yaml that is needed."""

    model: _RunModels
    precision: _RunPrecision
    student: _RunStudent = _RunStudent()


def find_source(model: EvaluatedModel) -> Source:
    """Tell what `model.path` is.

    Raises:
        ConfigError: it is none of the three, or what a checkpoint needs is missing.
    """
    path = Path(model.path)
    if (path / "config.json").is_file():
        if model.hf_path is not None:
            raise rule_broken(
                "model.hf_path",
                model.hf_path,
                f"it belongs to a checkpoint, and {path} is a Hugging Face directory",
                "leave it out",
            )
        source = ModelSource(path=str(path), trust_remote_code=model.trust_remote_code)
        return Source(source, None, "fp32")
    checkpoint = _checkpoint(latest.follow(path))
    reason = defects(checkpoint)
    if reason:
        raise rule_broken("model.path", str(checkpoint), reason, "name a complete checkpoint")
    settings = _run_settings(records_of(checkpoint) / "config.yaml")
    student = settings.model.student
    hf = Path(model.hf_path or student.path)
    if not (hf / "config.json").is_file():
        raise rule_broken(
            "model.hf_path" if model.hf_path else "model.path",
            str(hf if model.hf_path else checkpoint),
            f"a checkpoint has weights only; config.json and tokenizer are not in {hf}, "
            "where its run began",
            "set model.hf_path to that Hugging Face directory",
        )
    trusted = model.trust_remote_code or student.trust_remote_code
    source = ModelSource(path=str(hf), trust_remote_code=trusted)
    return Source(source, checkpoint, settings.precision.dtype, settings.student.adapter)


def _checkpoint(path: Path) -> Path:
    if (path / STATE_FILE).is_file():
        return path.resolve()
    checkpoints = candidates(path / "checkpoints")
    for checkpoint in checkpoints:
        reason = defects(checkpoint)
        if reason is None:
            return checkpoint.resolve()
        log.warning("passing over checkpoint %s: %s", checkpoint, reason)
    if checkpoints:
        return checkpoints[0]
    if (path / ADAPTER_NAME).is_file():
        fix = "give its run's directory, or what checkpoint.export_merged=true wrote beside it"
    elif (path / "export" / "config.json").is_file():
        fix = f"evaluate {path / 'export'}"
    else:
        fix = "give a directory with config.json, or a run directory with checkpoints"
    raise rule_broken(
        "model.path",
        str(path),
        "it is no Hugging Face directory (config.json), no checkpoint "
        f"({STATE_FILE}) and no run directory with a checkpoint"
        if path.is_dir()
        else "there is no such directory",
        fix,
    )


def _run_settings(file: Path) -> _RunSettings:
    try:
        return _RunSettings.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        raise rule_broken(
            "model.path",
            str(file),
            f"the run's settings say which model a checkpoint is of, and cannot be read: {error}",
            "put the checkpoint back into its run directory",
        ) from None


def fingerprint(directory: Path) -> str:
    """Digest of the names, sizes and some blocks of all files below a directory."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(directory)} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for block in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
