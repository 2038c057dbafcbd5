"""While the passes of a step run the host reads nothing back: on a GPU a read empties its queue.

A CPU shows reads, but not copies for which a host would wait: no place here would find one.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from tiny_models import make_model

import nemo_trd

pytestmark = pytest.mark.distributed

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
PACKAGE = str(Path(nemo_trd.__file__).parent)
NO_CALLERS = ("/torch/", __file__, f"{PACKAGE}/distributed/", f"{PACKAGE}/megatron/cpu_support.py")
EXPERTS = "megatron/core/transformer/moe/"  # how many tokens each gets is only known on the device
LENGTHS = (5, 1, 6, 3, 4, 2)  # of the labels


def run_without_reads(inputs: str, layout: list[str]) -> None:
    """On each rank: every pass of student and teacher, for each kind of loss."""

    from nemo_trd.config.load import compose
    from nemo_trd.data.types import Trajectory
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron import student as student_module
    from nemo_trd.megatron import teacher as teacher_module
    from nemo_trd.megatron.context_parallel import label_holders

    watch = init_distributed(timeout_minutes=2)
    seen = reads_within_schedules(student_module, teacher_module)
    trajectories = [
        Trajectory(i, 0, "refinement", (i, 7, 9), (i, 8, 9, 11), tuple(range(i, i + n)), 0)
        for i, n in enumerate(LENGTHS)
    ]
    names = [t.name for t in trajectories]
    settings = ["model=local", "precision.dtype=fp32", "teacher.offload_states=true", *layout]
    settings += ["train.max_tokens_per_micro_batch=null", "train.micro_batch_size=2"]
    settings += [f"model.{role}.path={inputs}/{role}" for role in ("student", "teacher")]
    for loss in (["divergence=jsd", "temperature=1.7"], ["top_k=5", "token_clip=1"], ["top_k=5"]):
        config = compose([*settings, *(f"loss.{setting}" for setting in loss)])
        student = student_module.Student(config)
        teacher = teacher_module.Teacher(config, student.groups)
        plan = student.pack(trajectories)
        states: Any = teacher.states(plan)
        if loss == ["top_k=5"] and states[0] is not None:  # as servers give it, on the last stage
            batches, cp = zip(states, plan[0], strict=True), student.groups.cp
            states = [
                student.teacher_top_k(state, batch, 5)[
                    label_holders([batch.student], cp.size())[0] == cp.rank()
                ]
                for state, batch in batches
            ]
        result = student.train_step(plan, states, names)
        assert [len(result.watched[name].divergence) for name in names] == list(LENGTHS)
        student.compare(plan, states, names)
        student.token_nll(trajectories)
    assert seen.micro_batches == 3 * 4 * 3  # of four passes for each loss
    reads = [read for read in seen.reads if EXPERTS not in read]
    assert not reads, "\n".join(["", *sorted(reads)])
    watch.close()


def reads_within_schedules(*modules: Any) -> Any:
    """Follow `run_schedule` of these modules from the first micro-batch to the last."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.reads: set[str] = set()
            self.micro_batches = 0
            self.looking = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if self.looking and (name in READS or counts_a_mask(name, *args)):
                self.note(name)
            # `torch.tensor` makes a number on the host, which is then copied to the device.
            if self.looking and name == "lift_fresh" and caller().startswith(PACKAGE):
                self.note(name)
            return func(*args, **(kwargs or {}))

        def note(self, name: str) -> None:
            if self.looking:
                self.reads.add(f"{name}: {caller()}")

    seen = Seen()
    for owner, name in (
        (torch.Tensor, "tolist"),
        (torch.Tensor, "cpu"),
        (torch.cuda, "synchronize"),
    ):
        setattr(owner, name, noting(seen, name, getattr(owner, name)))  # no operations
    for module in modules:
        module.run_schedule = followed(module.run_schedule, seen)
    return seen


def counts_a_mask(name: str, *args: Any) -> bool:
    """Whether an operation indexes by a mask whose true entries it has to count.

    To put one number where a mask is true it need not: that is `masked_fill`.
    """
    import torch

    if name.startswith("index_put") or name.startswith("_index_put"):
        fills = args[2].numel() == 1 and not any(args[3:4])
        return not fills and counts_a_mask("index", *args[:2])
    kinds = (torch.bool, torch.uint8)
    return name == "index" and any(i is not None and i.dtype in kinds for i in args[1])


def noting(seen: Any, name: str, original: Any) -> Any:
    def read(*args: Any) -> Any:
        seen.note(name)
        return original(*args)

    return read


def followed(run_schedule: Callable[..., Any], seen: Any) -> Callable[..., Any]:
    def run(chunks: Any, forward_step: Any, *args: Any, **options: Any) -> Any:
        config = chunks[0].config
        finish = config.finalize_model_grads_func

        def behind_the_last(*args: Any, **kwargs: Any) -> None:
            seen.looking = False
            finish(*args, **kwargs)

        def step(*args: Any) -> Any:
            seen.micro_batches += 1
            seen.looking = True
            return forward_step(*args)

        config.finalize_model_grads_func = finish and behind_the_last
        with seen:
            result = run_schedule(chunks, step, *args, **options)
        seen.looking = False
        config.finalize_model_grads_func = finish
        return result

    return run


def caller() -> str:
    """The line at work of this package or megatron-core."""
    stack = traceback.extract_stack()
    frames = [f for f in stack if not any(part in f.filename for part in NO_CALLERS)]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}"


@pytest.mark.parametrize("layout", ["tp2 sp", "tp2 sp, experts", "pp2", "cp2"])
def test_nothing_is_read_between_the_first_micro_batch_and_the_last(
    layout: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    experts = layout.endswith("experts")
    for seed, role in enumerate(("student", "teacher")):
        family = "qwen3_moe" if experts and role == "student" else "qwen3"
        make_model(tmp_path / role, family, seed=seed, num_hidden_layers=2, **sizes)
    kind = {"tp2": "tensor_model", "pp2": "pipeline_model", "cp2": "context"}[layout[:3]]
    sizes_of = [f"parallel.{r}.{kind}_parallel_size=2" for r in ("student", "teacher")]
    if layout.startswith("tp2 sp"):
        sizes_of.append("parallel.student.sequence_parallel=true")
    if experts:
        sizes_of.append("student.moe_aux_loss_coeff=0.01")
    launch(2, run_without_reads, str(tmp_path), sizes_of)
