"""Time of a step: streamed generation, what a run has measured, and what would save most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed_once import compose

from nemo_trd.config.errors import ConfigError
from nemo_trd.plan.cost import weight_sync
from nemo_trd.plan.faster import DRAFTS, savings
from nemo_trd.plan.main import main
from nemo_trd.plan.measured import measured_assumptions
from nemo_trd.plan.memory import GIB
from nemo_trd.plan.plan import Plan, make_plan
from nemo_trd.plan.shapes import adapter_parameters, parameters
from nemo_trd.plan.show import text

RECIPE = "experiment=paper_qwen3_8b"


def planned(*overrides: str) -> Plan:
    plan = make_plan(compose([RECIPE, *overrides]))
    assert not plan.findings.problems
    return plan


def test_generation_takes_as_long_as_its_busier_pool_or_its_longest_answers() -> None:
    plan = planned("train.prompts_per_step=4096", "cluster.teacher_server_nodes=8")
    assert plan.split is not None
    time = plan.split.time
    assert time.streamed and time.longest < time.refinement < time.rollout == time.generation
    one = planned("train.prompts_per_step=8").split
    assert one is not None  # one answer for each server: the longest of both is the whole time
    assert one.time.generation == one.time.longest > max(one.time.rollout, one.time.refinement)
    nodes = ("cluster.student_server_nodes=0", "cluster.teacher_server_nodes=0")
    local = planned("generation=local", *nodes).split
    assert local is not None and not local.time.streamed
    assert local.time.generation == local.time.rollout + local.time.refinement


def test_drafts_save_passes_over_the_weights_of_the_teacher() -> None:
    vllm = compose([RECIPE]).generation.vllm
    assert vllm is not None and vllm.teacher.server.speculation == DRAFTS  # of cluster recipes
    setting = "generation.vllm.teacher.server.speculation"
    without, with_them = (planned(*more).split for more in ([f"{setting}=null"], []))
    assert without is not None and with_them is not None
    assert with_them.time.refinement < without.time.refinement
    assert with_them.time.rollout == without.time.rollout


def test_an_adapter_alone_is_few_bytes_and_lets_one_pool_answer_for_both_models() -> None:
    lora, alone = "student.adapter=lora", "generation.vllm.weight_sync.what=adapter"
    merged, adapter = planned(lora), planned(lora, alone)
    assert merged.student is not None and merged.config.student.adapter is not None
    hf = merged.student.hf
    whole, part = (weight_sync(plan.config, hf) for plan in (merged, adapter))
    assert whole is not None and part is not None
    trained = adapter_parameters(hf, merged.config.student.adapter)
    assert (whole.bytes, part.bytes) == (2 * parameters(hf), 2 * trained)
    assert part.seconds < whole.seconds / 20
    assert f"the adapter, {2 * trained / GIB:.2f} GiB to each of" in text(adapter)

    own = ("generation.vllm.teacher.urls=[]", "generation.vllm.teacher.server.speculation=null")
    shared = planned(lora, alone, *own, "cluster.teacher_server_nodes=0")
    assert shared.split is not None and shared.evening is None
    time = shared.split.time
    assert time.generation == time.rollout + time.refinement and time.refinement > 0


def test_stored_samples_take_no_time_and_need_no_servers() -> None:
    servers = ("cluster.student_server_nodes=0", "cluster.teacher_server_nodes=0")
    plan = planned("generation=stored", *servers)
    assert plan.split is not None and plan.split.time.generation == 0
    assert plan.fastest is None and plan.evening is None
    phases = [parts for gpu in plan.memory for parts in gpu.phases.values()]
    assert phases and not any(parts.get("generation weights") for parts in phases)


def test_what_saves_most_is_shown_first_and_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned()
    assert plan.split is not None and plan.savings
    seconds = [saving.seconds for saving in plan.savings]
    assert seconds == sorted(seconds) and seconds[0] < plan.split.time.total
    for saving in plan.savings:  # each override is what it says
        changed = make_plan(compose([RECIPE, *saving.overrides]))
        assert changed.fits and changed.split is not None
        assert changed.split.time.total == pytest.approx(saving.seconds)
    told = {override for saving in plan.savings for override in saving.overrides}
    assert {"generation.max_staleness=1", "cluster.teacher_server_nodes=2"} <= told
    assert main([RECIPE]) == 0
    shown = capsys.readouterr().out
    assert f"saves most: {' '.join(plan.savings[0].overrides)}" in shown
    assert plan.student is not None and plan.teacher is not None
    asynchronous = compose([RECIPE, "generation.max_staleness=1"])
    again = savings(asynchronous, plan.student.hf, plan.teacher.hf)
    assert not any("max_staleness" in o for saving in again for o in saving.overrides)


def test_sampling_further_ahead_pays_where_both_sides_take_as_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([RECIPE])
    assert "max_staleness of 2 or more saves nothing: training waits for generation" in (
        capsys.readouterr().out
    )
    time = planned().split.time  # type: ignore[union-attr]
    as_long = time.generation / time.training  # so many times the compute of a step
    main([RECIPE, f"cluster.assumptions.mfu={0.35 / as_long}"])
    assert "max_staleness of 2 or more may pay" in capsys.readouterr().out


def test_a_run_tells_lengths_speeds_and_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([RECIPE, f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    step: dict[str, Any] = {"step": 1, "rollouts": 64, "rejected_subset": 14}
    step |= {"rollout_tokens": 2000.0, "refinement_tokens": 3000.0}
    step |= {"seconds/student_pool": 40.0, "seconds/teacher_pool": 100.0}
    step |= {"tokens_per_decode_step": 1.8}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    measured = measured_assumptions(tmp_path)
    assert measured == {
        "mean_length": pytest.approx(5000 / (2 * 16384), rel=1e-3),
        "student_tokens_per_second": 2000 * 64 / (40 * 8),
        "teacher_tokens_per_second": 3000 * 50 / (100 * 8),
        "tokens_per_decode_step": 1.8,
    }
    assert main([RECIPE, "--from", str(tmp_path)]) == 0
    assert "Measured: 400 tokens/s a GPU of the student's servers" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="--from = .*no step was recorded"):
        measured_assumptions(tmp_path)


def test_one_node_serves_on_the_gpus_that_do_not_train() -> None:
    recipe = "experiment=trd_8b_one_node"
    plan = make_plan(compose([recipe]))
    assert plan.fits and not plan.findings.problems
    assert not any("share the training GPUs" in note for note in plan.findings.notes)
    shared = make_plan(compose([recipe, "generation.vllm.student.devices=[3,4]"]))
    assert any("share the training GPUs" in note for note in shared.findings.notes)
