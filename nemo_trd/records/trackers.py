"""Trackers, which get the figures of a run beside its own files: TensorBoard, W&B, MLflow.

Imports none of them, nor torch, until a run asks for one.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import yaml

from nemo_trd.config.dotted import dotted
from nemo_trd.config.schema import Config, MLflow, WandB
from nemo_trd.records.step_lines import write_atomically

log = logging.getLogger(__name__)

IDS_FILE = "trackers.json"  # in the run directory: how a resumed run finds its W&B or MLflow run
HIDDEN = "***"
_SECRET_KEYS = {"api_key", "password", "secret", "token"}
_MLFLOW_PARAM_LENGTH = 500  # the strictest limit among the servers in use
_MLFLOW_BATCH = 100  # parameters, a limit of its interface


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record finite figures of one step."""
        ...

    def close(self, succeeded: bool) -> None: ...


def open_trackers(config: Config, resumed_step: int) -> list[Tracker]:
    """Open every tracker that `config.logging` names; a resumed run goes on where it was.

    Their packages are installed: `nemo_trd.preflight` refuses a run without them.
    """
    settings = public_settings(config)
    ids = _Ids(config.run_dir / IDS_FILE, resumed_step > 0)
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoardTracker(config.run_dir / "tensorboard", settings, resumed_step))
    if config.logging.wandb is not None:
        trackers.append(WandBTracker(config.logging.wandb, config.run_dir, settings, ids))
    if config.logging.mlflow is not None:
        trackers.append(MLflowTracker(config.logging.mlflow, config.run_dir, settings, ids))
    return trackers


def public_settings(config: Config) -> dict[str, Any]:
    """The settings as plain data without credentials, for files and servers that others read."""
    return _without_secrets(config.model_dump(mode="json"))


def _without_secrets(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_secrets(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if key in _SECRET_KEYS:
        return HIDDEN
    if "://" in value and "@" in value:
        address = urlsplit(value)
        host = address.netloc.rpartition("@")[2]
        return urlunsplit(address._replace(netloc=f"{HIDDEN}@{host}"))
    return value


class _Ids:
    """Names of this run on tracking servers, kept in the run directory."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if resumed and path.exists():
            self._known = json.loads(path.read_text())

    def get(self, tracker: str) -> str | None:
        return self._known.get(tracker)

    def keep(self, tracker: str, run_id: str) -> None:
        self._known[tracker] = run_id
        write_atomically(self._path, json.dumps(self._known))


class TensorBoardTracker:
    def __init__(self, directory: Path, settings: dict[str, Any], resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run logged beyond the step it is resumed from.
        self._writer = SummaryWriter(
            str(directory), purge_step=resumed_step + 1 if resumed_step else None, flush_secs=30
        )
        if not resumed_step:
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(_grouped(name), value, step)

    def close(self, succeeded: bool) -> None:
        self._writer.close()


class WandBTracker:
    def __init__(
        self, settings: WandB, run_dir: Path, run_settings: dict[str, Any], ids: _Ids
    ) -> None:
        import wandb

        run_id = ids.get("wandb") or secrets.token_hex(8)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=run_settings,
        )
        # W&B's own step counter drops what is logged again after a resume.
        self._run.define_metric("*", step_metric="step")
        ids.keep("wandb", run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{_grouped(name): value for name, value in values.items()}})

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class MLflowTracker:
    """Through the client, which has no global state; without a server, files in the run."""

    def __init__(
        self, settings: MLflow, run_dir: Path, run_settings: dict[str, Any], ids: _Ids
    ) -> None:
        # Without a server the client can only write files: mlflow-skinny has no database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        in_run_dir = (run_dir / "mlruns").resolve().as_uri()
        uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", in_run_dir)
        self._client = MlflowClient(tracking_uri=uri)
        known = ids.get("mlflow")
        if known is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(settings.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(settings.experiment)
        )
        run = self._client.create_run(experiment_id, run_name=run_dir.name)
        self._run_id = run.info.run_id
        self._log_params(run_settings)
        ids.keep("mlflow", self._run_id)

    def _log_params(self, run_settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = []
        for name, value in dotted(run_settings).items():
            text = str(value)
            if len(text) > _MLFLOW_PARAM_LENGTH:  # config.yaml has the whole of it
                text = text[: _MLFLOW_PARAM_LENGTH - 1] + "…"
            params.append(Param(name, text))
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _MLFLOW_BATCH])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [  # names may not hold an @
            Metric(_grouped(name).replace("@", "_at_"), value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")


def _grouped(name: str) -> str:
    """Trackers draw what stands before the slash as one panel."""
    return name if "/" in name else f"train/{name}"
