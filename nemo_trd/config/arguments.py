"""Arguments of the command lines that are no settings."""

from __future__ import annotations

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """For `add_argument(type=...)`: an empty path would be the current directory.

    Raises:
        argparse.ArgumentTypeError
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("a path may not be empty")
    return Path(text)
