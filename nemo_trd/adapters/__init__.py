"""TRD inside recipes that people already have; see docs/recipes.md.

Each module translates between another package and `nemo_trd`, whose algorithm stays where it is.
May import every room; no room imports it. Importing `nemo_trd` imports none of those packages,
whether they are installed or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(package: str, install: str) -> Iterator[None]:
    """Around the imports of an adapter.

    Args:
        package: the distribution and its version, as pip spells them.
        install: how it gets here.

    Raises:
        ImportError: something is missing; it says what, and both of the above.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"this adapter needs {package} ({error}). Fix: {install}.") from error
