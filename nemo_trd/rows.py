"""Rows of JSON Lines files, Parquet files and `datasets` datasets, each with the place it is at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_trd.config import ConfigError, Dataset, rule_broken

Row = tuple[str, dict[str, Any]]  # where it stands, for error messages; its columns


def read_rows(dataset: Dataset, field: str) -> Iterator[Row]:
    """Every row of a dataset, in order.

    A path that ends in .jsonl or .parquet is such a file. Anything else is a directory that
    `datasets` has saved, or what `datasets.load_dataset` takes.

    Raises:
        ConfigError: the file or dataset cannot be read, or a line is no JSON object.
    """
    path = Path(dataset.path)
    if path.suffix not in (".jsonl", ".parquet"):
        if path.is_file():
            raise rule_broken(
                f"{field}.path",
                dataset.path,
                "a file must be JSON Lines (.jsonl) or Parquet (.parquet)",
                "convert it, or correct its name",
            )
        return _dataset_rows(dataset, field)
    if not path.is_file():
        raise rule_broken(
            f"{field}.path", dataset.path, "there is no such file", "correct the path"
        )
    return _json_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, field)


def _json_rows(path: Path) -> Iterator[Row]:
    """Blank lines are no rows. Lines end at newlines only, whatever Unicode calls a line end."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                # json.loads would take UTF-16 as well; a byte order mark is allowed
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise ConfigError(
                    f"{where}: not valid JSON ({error}). Fix: one JSON object a line, in UTF-8."
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{where}: a JSON {type(row).__name__}, not an object. "
                    'Fix: one object with named columns a line, like {"problem": "..."}.'
                )
            yield where, row


def _parquet_rows(path: Path, field: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise rule_broken(
            f"{field}.path",
            str(path),
            f"it cannot be read as Parquet after row {number} ({error})",
            "write the file again",
        ) from error


def _dataset_rows(dataset: Dataset, field: str) -> Iterator[Row]:
    import datasets

    path = Path(dataset.path)
    try:
        if (path / "state.json").is_file():
            rows = datasets.load_from_disk(dataset.path)
        elif (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(dataset.path)
            if dataset.split not in splits:
                raise rule_broken(
                    f"{field}.split",
                    dataset.split,
                    f"{dataset.path} has only {', '.join(splits)}",
                    "name one of these",
                )
            rows = splits[dataset.split]
        else:
            rows = datasets.load_dataset(dataset.path, dataset.name, split=dataset.split)
    # Whatever a dataset's files hold can go wrong here: OSError, ValueError, DatasetsError, ...
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"`datasets` cannot load it (name={dataset.name}, split={dataset.split}): "
            f"{type(error).__name__}: {error}",
            "give a .jsonl or .parquet file, a directory, or the name of a dataset that is in "
            "the local cache",
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{dataset.path} ({dataset.split}) row {number}", row
