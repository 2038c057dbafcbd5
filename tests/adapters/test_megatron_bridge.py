"""The adapter for Megatron-Bridge: its forward step on megatron-core, its names on Bridge's source.

Bridge itself needs Python 3.12 and TransformerEngine: a run with it is in tests/gpu.
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from tiny_models import make_model

TP2 = ["parallel.student.tensor_model_parallel_size=2", "parallel.student.sequence_parallel=true"]
PP2 = ["parallel.student.pipeline_model_parallel_size=2"]


def forward_step_as_ours(inputs: str, layout: list[str]) -> None:
    """On each of two ranks: gradients and reports of both over the same micro-batches."""
    from functools import partial

    import torch
    from megatron.core.models.gpt import GPTModel

    from nemo_trd.adapters.megatron_bridge import TRD, next_micro_batches, returning_hidden_states
    from nemo_trd.config.load import compose
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.schedule import is_last_stage, run_schedule
    from nemo_trd.megatron.student import Student

    watch = init_distributed(5)
    config = compose(
        [
            *("model=local", "data=gsm8k", "precision.dtype=fp32", "refinement.on_failure=rollout"),
            *(f"model.{role}.path={inputs}/{role}" for role in ("student", "teacher")),
            *(f"data.train.path={inputs}/data.jsonl", "run.dir=unused", "data.verifier=none"),
            *(
                "refinement.templates.opd='{problem} {rollout}'",
                "refinement.max_context_tokens=200",
            ),
            *("train.prompts_per_step=6", "train.micro_batch_size=2", "logging.progress=false"),
            *("train.max_tokens_per_micro_batch=null", "data.max_prompt_tokens=64"),
            *("generation.rollout.max_tokens=12", "generation.refinement.max_tokens=12"),
            *("generation.local.dtype=fp32", "loss.divergence=jsd", *layout),
        ]
    )
    student = Student(config)
    trd = TRD(config)
    trd.start(student.groups)
    trd.read_teacher_head(student.chunks[-1])
    counts = trd.draw(0, 4)  # three have labels, and one is a filler
    assert sum(value for name, value in counts.items() if name.startswith("rejected_")) == 6
    items = list(trd.micro_batches)
    assert [len(batch.trajectories) for batch, _ in items] == [2, 2, 2, 0]
    plan, states = [[batch for batch, _ in items]], [state for _, state in items]
    expected = student.compute_gradients(plan, states)
    wanted = [p.main_grad.clone() for model in student.models for p in model.parameters()]

    for chunk in student.chunks:
        chunk.zero_grad_buffer()
    for model in student.models:
        model.__class__ = GPTModel  # as Bridge makes them
    returning_hidden_states(student.models)
    assert {type(model).__name__ for model in student.models} == {"GPTModel"}
    # Bridge binds its state as the first argument; here there is none.
    reports = run_schedule(
        student.chunks,
        partial(trd.forward_step, None),
        list(next_micro_batches_of(trd, next_micro_batches)),
        [batch.student for batch in plan[0]],
        student.groups,
        forward_only=False,
    )
    found = [p.main_grad for model in student.models for p in model.parameters()]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert max(gradient.abs().max() for gradient in wanted) > 1e-4
    if is_last_stage(student.groups):
        total, count = torch.stack([report["loss"] for report in reports]).sum(0).tolist()
        assert count == expected.metrics["label_tokens"]
        assert abs(total / count - expected.metrics["loss"]) < 1e-6
    watch.close()


def next_micro_batches_of(trd: Any, iterate: Any) -> Any:
    """All that Bridge would take in one step."""
    source = iterate(lambda: trd.micro_batches)
    while trd.micro_batches:
        yield next(source)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [TP2, PP2])
def test_forward_step_has_the_gradients_of_our_own_step(layout: list[str], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    for seed, role in enumerate(("student", "teacher")):
        make_model(tmp_path / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    rows = [f'{{"question": "{n}+1?", "answer": "so #### {n + 1}"}}\n' for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    launch(2, forward_step_as_ours, str(tmp_path), layout)


SOURCE = Path(os.environ.get("NEMO_TRD_BRIDGE_SOURCE", "none")) / "megatron" / "bridge"
needs_source = pytest.mark.skipif(
    not SOURCE.is_dir(), reason="`make test-adapters` brings Megatron-Bridge's source"
)


def parsed(module: str) -> dict[str, ast.AST]:
    """Top-level definitions of a module, and methods as Class.method."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse((SOURCE / module).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner
                if isinstance(inner, ast.AnnAssign):
                    found[f"{node.name}.{ast.unparse(inner.target)}"] = inner
    return found


def arguments(node: ast.AST) -> list[str]:
    assert isinstance(node, ast.FunctionDef)
    return [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]


@needs_source
def test_callback_and_context_are_those_of_bridge() -> None:
    found = parsed("training/callbacks.py")
    for event in ("on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end"):
        assert arguments(found[f"Callback.{event}"]) == ["self", "context"]
    assert {f"CallbackContext.{name}" for name in ("state", "model", "user_state")} <= found.keys()


@needs_source
def test_dataset_provider_is_that_of_bridge() -> None:
    found = parsed("data/base.py")
    assert arguments(found["DatasetProvider.build_datasets"]) == ["self", "context"]
    assert '"external"' in ast.unparse(found["DataloaderConfig.dataloader_type"]).replace("'", '"')
    assert "DatasetBuildContext" in found


@needs_source
def test_recipe_sets_what_bridge_reads() -> None:
    found = parsed("training/config.py")
    for name in ("dataset", "model", "ddp", "train", "validation", "optimizer", "comm_overlap"):
        assert f"ConfigContainer.{name}" in found
    # Their fields are megatron-core's own, from a newer version than is here; Bridge names them.
    text = (SOURCE / "training/config.py").read_text()
    used = (SOURCE / "training/train.py").read_text() + (SOURCE / "training/eval.py").read_text()
    for name in ("train_iters", "micro_batch_size", "global_batch_size"):
        assert f"self.train.{name}" in text
    assert "validation.eval_iters" in text + used + (SOURCE / "data/loaders.py").read_text()
    providers = parsed("models/model_provider.py")
    (hook,) = [key for key in providers if key.endswith(".register_pre_wrap_hook")]
    assert arguments(providers[hook])[:2] == ["self", "hook"]


@needs_source
def test_forward_step_gets_bridges_state_first() -> None:
    import inspect

    from nemo_trd.adapters.megatron_bridge import TRDForwardStep

    names = list(inspect.signature(TRDForwardStep.__call__).parameters)[1:]
    found = parsed("training/gpt_step.py")
    assert names == arguments(found["forward_step"])
    injection = ast.unparse(parsed("training/utils/train_utils.py")["needs_global_state_injection"])
    assert "'state'" in injection
    assert arguments(parsed("training/pretrain.py")["pretrain"]) == [
        *("config", "forward_step_func", "callbacks")
    ]


@needs_source
def test_weights_are_exported_as_bridge_names_them() -> None:
    found = parsed("models/conversion/auto_bridge.py")
    assert arguments(found["AutoBridge.from_hf_pretrained"])[:2] == ["cls", "path"]
    export = arguments(found["AutoBridge.export_hf_weights"])
    assert export[:4] == ["self", "model", "cpu", "show_progress"]
    fields = parsed("models/conversion/model_bridge.py")
    assert {"HFWeightTuple.param_name", "HFWeightTuple.weight"} <= fields.keys()


def test_recipe_is_amended_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins with the fields that the tests above find in Bridge's source."""
    from types import ModuleType, SimpleNamespace

    from nemo_trd.adapters.megatron_bridge import TRD, returning_hidden_states, trd_recipe
    from nemo_trd.config.errors import ConfigError
    from nemo_trd.config.load import compose

    @dataclass
    class DatasetProvider:
        dataloader_type: str | None = None
        num_workers: int = 2

    module = ModuleType("megatron.bridge.data.base")
    module.DatasetProvider = DatasetProvider  # type: ignore[attr-defined]
    module.DatasetBuildContext = object  # type: ignore[attr-defined]
    for name in ("megatron.bridge", "megatron.bridge.data"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def recipe(tp: int, sp: bool = False, virtual: int | None = None) -> Any:
        hooks: list[Any] = []
        model = SimpleNamespace(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            virtual_pipeline_model_parallel_size=virtual,
            sequence_parallel=sp,
            seq_length=4096,
            hooks=hooks,
            register_pre_wrap_hook=hooks.append,
        )
        sections = {name: SimpleNamespace() for name in ("ddp", "train", "validation")}
        optimizer, overlap = SimpleNamespace(), SimpleNamespace(overlap_param_gather=None)
        return SimpleNamespace(
            model=model, dataset="SFT", optimizer=optimizer, comm_overlap=overlap, **sections
        )

    settings = ["train.micro_batch_size=2", "train.max_tokens_per_micro_batch=null"]
    settings += ["train.prompts_per_step=8", "train.rollouts_per_prompt=4", "train.num_steps=9"]
    trd = TRD(compose(settings))
    config = recipe(tp=1)
    assert trd_recipe(config, trd) is config
    assert vars(config.train) == dict(train_iters=9, micro_batch_size=2, global_batch_size=32)
    assert config.model.hooks == [returning_hidden_states]
    assert config.model.calculate_per_token_loss and not config.ddp.average_in_collective
    for section in (config.ddp, config.optimizer, config.comm_overlap):
        assert section.overlap_param_gather is False
    assert isinstance(config.dataset, DatasetProvider)
    assert config.dataset.dataloader_type == "external" and config.dataset.seq_length == 4096
    source, validation, test = config.dataset.build_datasets(None)
    assert validation is test is None
    trd.micro_batches.extend([("first", None), ("second", None)])  # type: ignore[list-item]
    assert [next(source)[0], next(source)[0]] == ["first", "second"]
    with pytest.raises(ConfigError, match="tensor_model_parallel_size = 1.*has 2"):
        trd_recipe(recipe(tp=2), trd)
    with pytest.raises(ConfigError, match="sequence_parallel = False.*has True"):
        trd_recipe(recipe(tp=1, sp=True), trd)
    with pytest.raises(ConfigError, match="virtual_pipeline.* = 2.*interleaved stages take one"):
        trd_recipe(recipe(tp=1, virtual=2), trd)
    for refused, words in (
        (
            "student.moe_aux_loss_coeff=0.1",
            "student.moe_aux_loss_coeff = 0.1.*Bridge's recipe says",
        ),
        ("refinement.max_student_nll_gap=2", "refinement.max_student_nll_gap = 2.*set it to null"),
    ):
        with pytest.raises(ConfigError, match=words):
            TRD(compose([*settings, refused]))
