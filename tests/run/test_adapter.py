"""Whole runs that train an adapter: their files, going on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import KEY, FakeVllm
from launch import launch
from pooled_generator import SAMPLING, requests
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from training_run import settings
from transformers import AutoModelForCausalLM

from nemo_trd.generation.pool import AllReplicasDown

pytestmark = pytest.mark.distributed

OPSD = ["algorithm.mode=opsd", "model.teacher=null"]
ADAPTER = ["student.adapter=lora", "student.adapter.rank=4", "student.adapter.targets=[q,v,down]"]


def run_in_turn(runs: list[list[str]]) -> None:
    """On one rank: a run for each list of settings, also after one that is refused."""
    from nemo_trd.config.errors import ConfigError
    from nemo_trd.config.load import compose
    from nemo_trd.train import launch

    for overrides in runs:
        try:
            assert launch(compose(overrides)) == 0
        except ConfigError as error:
            print(f"refused: {error}", flush=True)


def convert(run_dir: str, model: str, out: str) -> None:
    """The newest checkpoint of a run, as its evaluation makes a model of it."""
    from nemo_trd.config.evaluation import EvaluatedModel
    from nemo_trd.evaluate.source import find_source
    from nemo_trd.megatron.checkpoint_export import export_checkpoint

    source = find_source(EvaluatedModel(path=run_dir, hf_path=None, trust_remote_code=False))
    assert source.hf.path == model and source.checkpoint is not None
    export_checkpoint(source.checkpoint, source.hf, source.dtype, Path(out), source.adapter)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that teaches itself, with a dense layer and experts, and problems with solutions."""
    root = tmp_path_factory.mktemp("inputs")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    make_model(root / "student", "qwen3_moe", tokenizer=True, mlp_only_layers=[1], **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def adapted(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    fitting = ["refinement.templates.opsd='{problem} {reference_solution} {rollout}'"]
    fitting += ["refinement.templates.privileged_prompt='{problem} {reference_solution}'"]
    own = settings(inputs, run_dir, *ADAPTER, *fitting, "train.num_steps=2", *overrides)
    return [s for s in own if not s.startswith("model.teacher.path")] + OPSD


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits


def test_a_run_trains_an_adapter_and_writes_it_and_the_merged_model(
    inputs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    base, run = shutil.copytree(inputs, tmp_path / "inputs"), tmp_path / "run"
    two = adapted(base, run, "checkpoint.export_merged=true")
    output = launch(1, run_in_turn, [two, two])
    assert "nothing left to do: step 2 is done" in output, output
    files = {path.name for path in (run / "export").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    launch(1, convert, str(run), str(base / "student"), str(tmp_path / "converted"))

    def model(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    merged = logits(model(run / "export_merged"))
    untrained = logits(model(base / "student"))
    assert (merged - untrained).abs().max() > 1e-4
    read = logits(PeftModel.from_pretrained(model(base / "student"), run / "export"))
    torch.testing.assert_close(read, merged, rtol=0, atol=1e-5)
    assert torch.equal(logits(model(tmp_path / "converted")), merged)

    more = adapted(base, run, "train.num_steps=3")
    from_export = [s for s in more if s not in OPSD] + [
        *(f"model.teacher.path={base}/student", f"run.dir={tmp_path}/new"),
        f"student.adapter.init={run}/export",
    ]
    refused = [[*more, "student.adapter.rank=8"], [*more, "student.adapter=null"]]
    refused.append([*from_export, "student.adapter.rank=8"])
    first = launch(1, run_in_turn, [*refused, from_export, more])
    for part in ("rank = 4, and the student has 8", "alpha = 128.0, and the student has None"):
        assert f"it holds a model with adapter.{part}" in first
    assert f"student.adapter.rank = 8: the adapter in {run}/export has 4" in first
    assert first.count("refused") == 3
    begun = json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0])
    assert begun["loss"] > 1e-6  # the teacher is the base

    weights = base / "student" / "model.safetensors"
    changed = load_file(weights)
    changed["model.norm.weight"] += 1
    save_file(changed, weights, metadata={"format": "pt"})
    again = [*from_export, f"run.dir={tmp_path}/newer"]
    second = launch(1, run_in_turn, [[*more, "train.num_steps=4"], again])
    assert "refused: checkpoint.resume = " in second and "adapter is one of other weights" in second
    assert f"refused: student.adapter.init = '{run}/export': it was trained on other" in second


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_a_server_that_has_loaded_the_base_alone_is_not_asked_for_a_trained_adapter(
    what: str, inputs: Path, tmp_path: Path, one_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has started again since it was given the weights that the run begins with."""
    from nemo_trd.config.load import compose
    from nemo_trd.run.generators import Generators

    monkeypatch.setenv("NEMO_TRD_API_KEY", KEY)
    with FakeVllm() as server:
        on_servers = ["generation=vllm", f"generation.vllm.weight_sync.what={what}"]
        for role, url in (("student", server.url), ("teacher", "http://127.0.0.1:9")):
            on_servers.append(f"generation.vllm.{role}.urls=[{url!r}]")
            on_servers.append(f"generation.vllm.{role}.replicas=0")
        on_servers.append("generation.vllm.client.recovery_timeout_seconds=0.1")

        def answers(init: str) -> Any:
            run = adapted(inputs, tmp_path / "run", *on_servers, f"student.adapter.init={init}")
            run = [s for s in run if s not in OPSD] + [f"model.teacher.path={inputs}/student"]
            generators = Generators(compose(run), stopping=lambda: False)
            try:
                return generators.student.generate(requests(2), SAMPLING, "rollouts")
            finally:
                generators.close()

        assert len(answers("kaiming")) == 2
        with pytest.raises(AllReplicasDown, match="its weights are default, current is 0"):
            answers(str(tmp_path))
