"""A run whose servers and whose student take turns on one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from devices import EMULATED, on_devices, skip_without_vllm
from servers import ENVIRONMENT, make_inputs, settings_on

pytestmark = pytest.mark.gpu(emulated=True)

STEPS = 2
SHARE = 0.3  # of the device, for each of two servers
# Some 85 million parameters: weights, gradients and moments take more than a gigabyte.
LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
# Bytes that a student which gave its memory back may still hold. TransformerEngine keeps a work
# space of 32 MiB for its matrix products.
LEFT = 2**27


def run(overrides: list[str], record: str) -> None:
    """On one rank: a run, which records what the device holds for it at every turn of the servers.

    CUDA's own context stays, with what its libraries hold.
    """
    import torch

    from nemo_trd.config.load import compose
    from nemo_trd.run.turns import Turns
    from nemo_trd.train import launch

    held: list[int] = []
    wake = Turns._wake

    def measured(self: Turns) -> None:
        if torch.cuda.is_available():
            held.append(torch.cuda.memory_reserved())
        wake(self)

    Turns._wake = measured  # type: ignore[method-assign]
    assert launch(compose(overrides)) == 0
    Path(record).write_text(json.dumps(held))


def test_servers_and_student_share_a_device(tmp_path: Path) -> None:
    skip_without_vllm()
    inputs = make_inputs(tmp_path / "inputs", **({} if EMULATED else LARGE))
    overrides = [
        *settings_on(inputs, {}, tmp_path / "run"),
        *("generation.colocate=true", "teacher.offload_weights=true", f"train.num_steps={STEPS}"),
        *("generation.vllm.weight_sync.backend=gloo", "generation.vllm.server.dtype=fp32"),
        *(f"generation.vllm.{role}.devices=[0]" for role in ("student", "teacher")),
    ]
    if not EMULATED:
        shared = f"[--gpu-memory-utilization,'{SHARE}']"
        overrides.append(f"generation.vllm.server.arguments={shared}")
    record = tmp_path / "held.json"
    on_devices(1, run, overrides, str(record), environment=ENVIRONMENT, timeout=900)
    steps = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["staleness"] for step in steps] == [0] * STEPS
    assert max(step["logprob_difference"] for step in steps) < 1e-2
    held = json.loads(record.read_text())
    assert len(held) == (0 if EMULATED else STEPS + 1)  # a check, and the steps
    assert all(size < LEFT for size in held), held
