"""The entry decorator: Hydra's own, or NeMo's where it is installed.

Runs in both kinds of environment: in that of the trainer, without NeMo, and in NeMo-Aligner's.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

THINKING = "data.chat_template_kwargs.enable_thinking=false"
HAS_NEMO = importlib.util.find_spec("nemo") is not None
PROGRAM = """
import sys
from nemo_trd.config.hydra_entry import hydra_entry, has_hydra_runner
from nemo_trd.config.load import compose, validate

def task(cfg):
    config = validate(cfg)
    print("used NeMo:", "nemo.core.config.hydra_runner" in sys.modules, has_hydra_runner())
    print(config.train.prompts_per_step, config.train.num_steps, config.loss.divergence)
    print(config.data.chat_template_kwargs)
    print("and again:", compose(["train.num_steps=7"]).train.num_steps)

hydra_entry(task)()
"""


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_entry_takes_overrides_and_resolvers_of_nemo() -> None:
    sizes = ["train.prompts_per_step=${multiply:4,16}", "train.num_steps=${sum:2,3}"]
    done = run("experiment=quickstart", *sizes, "loss.divergence=reverse_kl", THINKING)
    assert done.returncode == 0, done.stderr
    assert f"used NeMo: {HAS_NEMO} {HAS_NEMO}\n64 5 reverse_kl\n" in done.stdout
    assert "{'enable_thinking': False}\nand again: 7\n" in done.stdout


@pytest.mark.parametrize("override", ["train.nm_steps=3", "experiment=no_such"])
def test_entry_refuses_what_does_not_exist(override: str) -> None:
    done = run(override)
    assert done.returncode != 0
    assert override.split("=")[-1 if "such" in override else 0] in done.stderr
