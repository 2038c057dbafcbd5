"""Reads rows of files, directories of files and `datasets` datasets, each with its place."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Dataset
from nemo_trd.data.json_rows import json_rows, line_rows
from nemo_trd.data.row import BadRow, Row

log = logging.getLogger(__name__)

FORMATS = "JSON Lines (.jsonl, .ndjson), JSON (.json), both also as .gz, or Parquet (.parquet)"
# Files that stand beside data and hold none.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# The words by which names of files and directories tell the split, as `datasets` has them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
SHARD = re.compile(r"(.*?)\d+-of-(\d+)(?!\d)")  # train-00000-of-00002.parquet
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF_WORD)})(?![a-z])")


def read_rows(dataset: Dataset, field: str) -> Iterator[Row]:
    """Yield (place, row) for every row of a dataset, in order; a BadRow for an unreadable one.

    A path is a file, a directory of files, a directory that `datasets` has saved, or else what
    `datasets.load_dataset` takes.

    Raises:
        ConfigError: the file, directory or dataset cannot be read.
    """
    path = Path(dataset.path)
    if path.is_dir():
        is_read_here = (
            _is_plain(path) and dataset.name is None and re.fullmatch(r"[\w.-]+", dataset.split)
        )
        return _directory_rows(dataset, field) if is_read_here else _dataset_rows(dataset, field)
    if path.is_file() and reader_of(path) is None:
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"a file must be {FORMATS}",
            "convert it, or correct its name",
        )
    if reader_of(path) is None:
        return _dataset_rows(dataset, field)
    if not path.is_file():
        raise rule_broken(
            f"{field}.path", dataset.path, "there is no such file", "correct the path"
        )
    return _file_rows(path, field)


def reader_of(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    """Function that reads a file of this name; None where none does."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_rows
    name = name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return line_rows
    return json_rows if name.endswith(".json") else None


def _file_rows(path: Path, field: str) -> Iterator[Row]:
    import pyarrow

    reader = reader_of(path)
    assert reader is not None
    place = "at its beginning"
    try:
        for row in reader(path):
            yield row
            place = f"behind {row[0]}"
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        kind = "Parquet" if reader is _parquet_rows else "JSON"
        raise rule_broken(
            f"{field}.path",
            str(path),
            f"it cannot be read as {kind} {place} ({str(error) or type(error).__name__})",
            "write or copy the file again",
        ) from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in _batch_rows(_with_short_floats(batch)):
                number += 1
                where = f"{path} row {number}"
                if isinstance(row, Exception):
                    row = BadRow("unreadable", f"{where}: cannot be read ({row})", "correct it")
                yield where, row


def _with_short_floats(batch: Any) -> Any:
    """Turn float32 values of a pyarrow.RecordBatch into float64 that print as short (0.1)."""
    import pyarrow

    for place, column in enumerate(batch.schema):
        as_text = _with_float32_as(pyarrow.string(), column.type)
        if as_text != column.type:
            as_float64 = _with_float32_as(pyarrow.float64(), column.type)
            shortened = batch.column(place).cast(as_text).cast(as_float64)
            batch = batch.set_column(place, column.name, shortened)
    return batch


def _with_float32_as(replacement: Any, kind: Any) -> Any:
    """Return the pyarrow type with another in the place of float32, at any depth."""
    import pyarrow

    if kind == pyarrow.float32():
        return replacement
    if pyarrow.types.is_struct(kind):
        fields = [field.with_type(_with_float32_as(replacement, field.type)) for field in kind]
        return pyarrow.struct(fields)
    for is_list, list_of in (
        (pyarrow.types.is_list, pyarrow.list_),
        (pyarrow.types.is_large_list, pyarrow.large_list),
    ):
        if is_list(kind):
            inner = kind.value_field
            return list_of(inner.with_type(_with_float32_as(replacement, inner.type)))
    return kind


def _batch_rows(batch: object) -> list[dict | Exception]:
    """Rows of a pyarrow.RecordBatch; the error for one whose value its type does not allow."""
    try:
        return batch.to_pylist()  # type: ignore[attr-defined]
    except (ValueError, OverflowError):  # a text that is no UTF-8, a date outside of all calendars
        rows: list[dict | Exception] = []
        for number in range(batch.num_rows):  # type: ignore[attr-defined]
            try:
                rows += batch.slice(number, 1).to_pylist()  # type: ignore[attr-defined]
            except (ValueError, OverflowError) as error:
                rows.append(error)
        return rows


# --- directories ---


def _is_plain(directory: Path) -> bool:
    """Whether a directory holds only files: nothing that `datasets` saved or must load."""
    if any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return False
    card = directory / "README.md"
    if not card.is_file():
        return True
    header = re.match(r"---\n.*?\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    return header is None or re.search(r"^configs:", header[0], re.MULTILINE) is None


def _directory_rows(dataset: Dataset, field: str) -> Iterator[Row]:
    """Rows of all data files below a directory, in the order of their names; not of hidden ones.

    Where names of files or of their directories tell a split (train-00000.parquet,
    test/a.jsonl), only those of `split` are read.
    """
    root = Path(dataset.path)
    files = _files_below(root)
    data = [file for file in files if _is_data(file.relative_to(root))]
    if not data:
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"none of the {len(files)} files in this directory is {FORMATS}",
            "correct the path",
        )
    split_files = _files_of_split(data, dataset, field)
    _refuse_doubles(split_files, dataset, field)
    _warn_of_missing_shards(split_files, field)
    read_files = set(split_files)
    others = [str(file.relative_to(root)) for file in files if file not in read_files]
    log.info(
        "%s: %d files of %s are read%s",
        field,
        len(split_files),
        root,
        f"; not read: {_some(others)}" if others else "",
    )
    for file in split_files:
        yield from _file_rows(file, field)


def _files_below(root: Path) -> list[Path]:
    """Files below a directory, linked directories and dead links included, each directory once."""
    files: list[Path] = []
    visited: set[str] = set()
    for directory, names, inside in os.walk(root, followlinks=True):
        if os.path.realpath(directory) in visited:
            names.clear()
            continue
        visited.add(os.path.realpath(directory))
        files += [Path(directory, name) for name in inside]
    return sorted(files)


def _warn_of_missing_shards(files: list[Path], field: str) -> None:
    """Warn where names tell of more shards than are there, as after a download cut short."""
    names = [(file.parent, SHARD.match(file.name)) for file in files]
    shards = Counter((directory, name[1], int(name[2])) for directory, name in names if name)
    for (directory, name, count), present in shards.items():
        if present < count:
            log.warning(
                "%s: %d of the %d shards %s/%s... are there",
                field,
                present,
                count,
                directory,
                name,
            )


def _is_data(name: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in name.parts)
    return not hidden and name.name not in METADATA and reader_of(name) is not None


def _files_of_split(files: list[Path], dataset: Dataset, field: str) -> list[Path]:
    root = Path(dataset.path)
    splits = {file: _split_of(file.relative_to(root)) for file in files}
    named_splits = sorted({split for split in splits.values() if split is not None})
    if not named_splits:
        return files
    split_name = SPLIT_OF_WORD.get(dataset.split, dataset.split)
    split_files = [file for file, split in splits.items() if split == split_name]
    if not split_files:
        raise rule_broken(
            f"{field}.split",
            dataset.split,
            f"by their names the files in {root} are {', '.join(named_splits)}",
            "name one of these",
        )
    return split_files


def _split_of(name: Path) -> str | None:
    """Split that a file's name tells, or else that of the nearest directory that tells one."""
    for part in reversed(name.parts):
        words = SPLIT_WORD.findall(part.lower())
        if words:
            return SPLIT_OF_WORD[words[-1]]
    return None


def _refuse_doubles(files: list[Path], dataset: Dataset, field: str) -> None:
    """Refuse the same data in two formats: every row would be there twice."""
    first: dict[Path, Path] = {}
    for file in files:
        stem = file.with_name(re.sub(r"(\.\w+?)(\.gz)?$", "", file.name.lower()))
        if stem in first:
            raise rule_broken(
                f"{field}.path",
                dataset.path,
                f"{first[stem].name} and {file.name} look like the same data in two formats",
                "move one of them away, or name one file",
            )
        first[stem] = file


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- `datasets` ---


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
            f"give a file ({FORMATS}), a directory of such files, or the name of a dataset that "
            "is in the local cache",
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{dataset.path} ({dataset.split}) row {number}", row
    except Exception as error:  # decoding: images, texts that are no UTF-8, files that are gone
        raise rule_broken(
            f"{field}.path",
            dataset.path,
            f"`datasets` cannot read row {number + 1}: {type(error).__name__}: {error}",
            "correct or remove the row",
        ) from error
