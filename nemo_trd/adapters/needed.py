"""Says what an adapter lacks, and how it gets here."""

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
