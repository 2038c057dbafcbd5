"""Draws memory by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_trd.plan.memory import GIB, GpuMemory
from nemo_trd.plan.show import PARTS


def plot(memory: Sequence[GpuMemory], limit: float, file: Path) -> None:
    """Draw memory by part while the student trains, one bar for each kind of GPU, the memory of
    its fullest phase, and the line of a full GPU.

    Args:
        limit: memory of a GPU, in GiB.

    Raises:
        ValueError: the ending of the file's name is no image format.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = matplotlib.colormaps["tab20"](range(len(PARTS)))
    figure, axes = pyplot.subplots(figsize=(2.5 + 1.1 * max(4, len(memory)), 5))
    bottoms = [0.0] * len(memory)
    labels = [f"student {gpu.student_stage}\nteacher {gpu.teacher_stage}" for gpu in memory]
    for part, color in zip(PARTS, colors, strict=True):
        sizes = [gpu.phases["student"].get(part, 0) / GIB for gpu in memory]
        if any(sizes):
            axes.bar(labels, sizes, bottom=bottoms, label=part, color=color)
            bottoms = [low + size for low, size in zip(bottoms, sizes, strict=True)]
    totals = [gpu.total / GIB for gpu in memory]
    axes.scatter(labels, totals, marker="_", s=300, color="black", label="fullest phase")
    axes.axhline(limit, color="black", linestyle="--", label=f"{limit:g} GiB")
    axes.set_ylabel("GiB of one GPU")
    axes.set_xlabel("pipeline stage")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
