"""Trajectory-Refined Distillation (arXiv 2606.08432) for the Megatron/NeMo stack."""

import sys
from types import TracebackType

__version__ = "0.1.0"


def _end_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C is no fault that needs a traceback; Python then ends with the signal's exit code."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nnemo_trd: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # python -m nemo_trd.SOMETHING, which takes seconds to import the rest
    sys.excepthook = _end_in_one_line
