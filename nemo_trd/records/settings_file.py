"""What samples on disk were made with: a second start goes on with the same settings only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_trd.config.dotted import dotted
from nemo_trd.config.errors import rule_broken
from nemo_trd.records.step_lines import write_atomically


def keep_settings(file: Path, settings: Mapping[str, Any], samples: Path) -> None:
    """Write down the settings that samples are made with, or compare them with those before.

    Raises:
        ConfigError: the settings differ, naming the first one that does, or there are samples that
            nothing is known of.
    """
    if file.is_file():
        _check_same(json.loads(file.read_text(encoding="utf-8")), settings, file)
    elif samples.exists():
        raise rule_broken(
            str(samples.parent),
            samples.name,
            f"it has no {file.name}, which tells how these samples were made",
            "give another directory",
        )
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(settings, indent=1) + "\n")


def _check_same(recorded: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> None:
    before, now = dotted(recorded), dotted(json.loads(json.dumps(settings)))
    for field in [*now, *(field for field in before if field not in now)]:
        if before.get(field) != now.get(field) or (field in before) != (field in now):
            raise rule_broken(
                field,
                now.get(field),
                f"{file} says {before.get(field)!r}, and samples of both would be mixed",
                "set it back, or give another directory",
            )
