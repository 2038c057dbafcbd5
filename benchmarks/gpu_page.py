"""The Markdown page of benchmarks/gpu.py: what was measured, on what, and what was not."""

from __future__ import annotations

from typing import Any

TRAINING = (
    "| case | layers | GPUs, layout | tokens/s | TFLOP/s a GPU | MFU | teacher s | student s "
    "| planned teacher s | planned student s | peak GiB | planned GiB | export s | loss |"
)
GENERATION = "| case | start s | tokens/s | way of weights | GiB | first sync s | sync s |"
NOTES = {
    "loss": "Forward and backward of the distillation loss, each strategy in a process of its own; "
    "`benchmarks/loss.py` says what the columns are.",
    "training": "Whole steps: the teacher's forward pass, the student's forward and backward with "
    "the loss, and the update; random weights, every trajectory of the greatest length. Tokens are "
    "the student's. FLOPs are those that `nemo_trd.plan` counts; the planned columns are its "
    "prediction for this layout with the assumptions of `conf/cluster/h100.yaml`, whatever the "
    "card. MFU is left out where the card's peak is not known. Details: "
    "`benchmarks/gpu_training.py`.",
    "generation": "One vLLM server of the small shape, greedy answers to random prompts, the "
    "second of two rounds. Random weights repeat themselves: a gain by drafts says nothing of a "
    "trained model.",
}


def markdown(found: dict[str, Any]) -> str:
    """The page of what `gpu.measure` has found."""
    lines = ["# This machine", "", *heading(found), ""]
    if "tests" in found:
        counts = ", ".join(f"{count} {what}" for what, count in found["tests"].items())
        lines += ["## Tests of tests/gpu", "", counts, ""]
    tables = {"loss": loss_table, "training": training_table, "generation": generation_table}
    for part, figures in found["figures"].items():
        lines += [f"## {part.capitalize()}", "", NOTES[part], "", *tables[part](figures), ""]
    lines += ["## Failed", "", *listed(found["failures"], "error"), ""]
    lines += ["## Left out", "", *listed(found["left_out"], "reason"), ""]
    return "\n".join(lines)


def heading(found: dict[str, Any]) -> list[str]:
    machine = found.get("machine")
    ran = f"{found['date']}, {found['seconds']:.0f} s, commit {found['commit']}"
    if machine is None:
        return [f"Nothing could be measured. {ran}."]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = "" if machine["card"].startswith("CPU") else f" with {machine['memory_gib']} GiB"
    tiny = ["**Tiny sizes: no figure here tells of speed.**", ""] if found["tiny"] else []
    return [*tiny, f"{machine['gpus']} x {machine['card']}{memory}. {ran}.", "", f"{versions}."]


def loss_table(figures: dict[str, Any]) -> list[str]:
    lines = ["| case | strategy | peak GB | seconds | max gradient error |", "|" + "---|" * 5]
    for name, rows in figures.items():
        for row in rows:
            if "failed" in row:
                lines.append(f"| {name} | {row['name']} | failed | | |")
                continue
            numbers = f"{row['peak_gb']:.3g} | {row['seconds']:.4g} | {row['grad_error']:.1e}"
            lines.append(f"| {name}, {row['tokens']} tokens | {row['name']} | {numbers} |")
    return lines


def training_table(figures: dict[str, Any]) -> list[str]:
    lines = [TRAINING, "|" + "---|" * 14]
    for name, row in figures.items():
        planned = row["planned"]
        cells = [
            *(f"{name}, {row['layers_of_model']} layers", row["layers"]),
            *(f"{row['gpus']}, {row['layout']}", f"{row['tokens_per_second']:,.0f}"),
            *(f"{row['tflops']:.3g}", "" if row["mfu"] is None else f"{row['mfu']:.0%}"),
            *(
                f"{times[role]:.3g}"
                for times in (row["seconds"], planned["seconds"])
                for role in times
            ),
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            f"{planned['peak_gib']:.1f}",
            f"{row['export_seconds']:.2g} ({row['export_gib']:.2g} GiB)",
            f"{row['losses'][0]:.4g} to {row['losses'][-1]:.4g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def generation_table(figures: dict[str, Any]) -> list[str]:
    lines = [GENERATION, "|" + "---|" * 7]
    for name, row in figures.items():
        cells = [name, f"{row['start_seconds']:.0f}", f"{row['tokens_per_second']:,.0f}"]
        keys = ("sync_gib", "first_sync_seconds", "sync_seconds")
        numbers = [f"{row[key]:.3g}" for key in keys] if "sync" in row else [""] * 3
        lines.append("| " + " | ".join([*cells, row.get("sync", ""), *numbers]) + " |")
    return lines


def listed(entries: list[dict[str, str]], what: str) -> list[str]:
    return [f"- {entry['part']}: {entry[what]}" for entry in entries] or ["nothing"]
