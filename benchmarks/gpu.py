"""What a GPU machine does with this code, on one page: loss, training, memory, weights, generation.

    make gpu                                         # the tests of tests/gpu, then this
    python benchmarks/gpu.py --output runs/gpu       # this alone
    python benchmarks/gpu.py --output /tmp/gpu --tiny --only training

Each case runs in a process of its own and has a time limit. One that fails is listed with its
error, one that this machine cannot run with the reason, and the others go on. DIR/gpu.md and
DIR/gpu.json have the figures, with the card and the versions; DIR/logs/ has what cases printed.
Exit code: 1 where a case, or a test of `--tests`, failed; else 0.

Models have random weights and the shapes that nemo_trd.plan ships; what does not fit into the card
by the plan's count is cut to fewer layers, and the page says to how many. All GPUs train, as many
as the greatest power of two among them; `--gpus` takes fewer.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_page import markdown
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.distributed.parent import end_with_parent
from nemo_trd.doctor import probe
from nemo_trd.models.family import expected_tensors, family_of
from nemo_trd.plan.advice import capacity, peak
from nemo_trd.plan.memory import training_memory
from nemo_trd.plan.shapes import SHIPPED, as_namespace
from nemo_trd.preflight.machine import missing_for_transformer_engine
from nemo_trd.serve.environment import find_vllm

HERE = Path(__file__).resolve().parent
PARTS = ("loss", "training", "generation")
SHOWN = ("torch", "megatron-core", "transformer-engine", "transformers", "liger_kernel", "nemo_trd")
FP8_CAPABILITY = [8, 9]


@dataclass(frozen=True)
class Sizes:
    """What is measured: a small and a large shape, lengths in tokens, and arguments of cases."""

    shapes: tuple[str, str]  # names in nemo_trd/plan/models
    prompt: int
    answer: int
    context: int  # the teacher's
    micro_batch: int  # trajectories
    trajectories: int  # of a step, for each replica
    loss: str  # arguments of loss.py
    chunks: tuple[tuple[str, int], ...]  # (divergence, label positions in a chunk of the loss)
    generation: str  # arguments of gpu_generation.py


FULL = Sizes(
    ("Qwen3-1.7B", "Qwen3-8B"),
    *(512, 1536, 2048, 4, 8),
    "--tokens 4096 --vocab 151936 --hidden 4096 --dtype bf16 --repeats 3",
    (("forward_kl", 256), ("forward_kl", 2048), ("jsd", 2048)),
    "--requests 128 --prompt 512 --tokens 512",
)
TINY = Sizes(
    ("toy-student", "toy-teacher"),
    *(8, 24, 32, 2, 2),
    "--tokens 96 --vocab 500 --hidden 16 --dtype fp32 --threads 1",
    (("jsd", 32),),
    "--requests 2 --prompt 16 --tokens 8",
)


@dataclass(frozen=True)
class Case:
    part: str
    name: str
    command: list[str]  # of a script beside this one, which writes its figures to --json FILE
    missing: str | None = None  # what this machine lacks for it
    seconds: float = 300.0  # its limit


def loss_cases(sizes: Sizes) -> list[Case]:
    has_liger = find_spec("liger_kernel") is not None
    strategies = ["chunked", *(["liger"] if has_liger else []), "ours"]
    cases = []
    for divergence, chunk in sizes.chunks:
        settings = ["--divergence", divergence, "--chunk-size", str(chunk), *sizes.loss.split()]
        command = ["loss.py", *settings, "--only", *strategies]
        cases.append(Case("loss", f"{divergence}, chunks of {chunk}", command))
    if not has_liger:
        cases.append(Case("loss", "Liger", [], missing="liger_kernel is not installed"))
    return cases


def training_cases(sizes: Sizes, machine: Machine, directory: Path) -> list[Case]:
    cases = []
    for number, shape in enumerate(sizes.shapes):
        overrides = training_settings(sizes, machine, tp=machine.gpus if number else 1)
        model = fitting_model(shape, overrides, directory)
        for precision in ("bf16", "fp8"):
            command = ["gpu_training.py", "--model", str(model), "--ranks", str(machine.gpus)]
            command += [f"precision={precision}", *overrides]
            missing = machine.without_fp8 if precision == "fp8" else None
            cases.append(Case("training", f"{shape} {precision}", command, missing))
    return cases


def training_settings(sizes: Sizes, machine: Machine, tp: int) -> list[str]:
    replicas = machine.gpus // tp
    # Without fused attention the scores of all positions would be kept for the backward pass.
    recompute = "none" if machine.has_transformer_engine else "full"
    return [
        *("generation=vllm", "cluster=h100", f"cluster.gpus_per_node={machine.gpus}"),
        *("cluster.student_server_nodes=0", "cluster.teacher_server_nodes=0"),
        *(f"cluster.gpu_memory_gib={machine.memory_gib}", "cluster.assumptions.mean_length=1.0"),
        *(f"data.max_prompt_tokens={sizes.prompt}", f"train.recompute={recompute}"),
        f"refinement.max_context_tokens={sizes.context}",
        *(f"generation.{kind}.max_tokens={sizes.answer}" for kind in ("rollout", "refinement")),
        *("train.max_tokens_per_micro_batch=null", f"train.micro_batch_size={sizes.micro_batch}"),
        f"train.prompts_per_step={sizes.trajectories * replicas}",
        f"optimizer.distributed={str(replicas > 1).lower()}",
        *(f"parallel.{role}.tensor_model_parallel_size={tp}" for role in ("student", "teacher")),
        f"parallel.student.sequence_parallel={str(tp > 1).lower()}",
    ]


def generation_cases(sizes: Sizes, machine: Machine, directory: Path) -> list[Case]:
    """One server by itself and with files as the way of weights, one with drafts, one over NCCL."""
    missing = on_gpu = None
    try:
        _, is_cpu = find_vllm(None)
        on_gpu = "it takes a vLLM for GPUs" if is_cpu else None
    except ConfigError as error:
        missing = str(error)
    model = directory / sizes.shapes[0]
    if not missing and not model.exists():
        fitting_model(sizes.shapes[0], training_settings(sizes, machine, tp=1), directory)
    command = ["gpu_generation.py", "--model", str(model), *sizes.generation.split()]
    on_gpu = missing or on_gpu
    two = on_gpu or (None if machine.gpus > 1 else "trainer and server need a GPU each")
    cases = [
        Case("generation", "plain, weights through files", [*command, "--sync", "file"], missing),
        Case("generation", "drafts of n-grams", [*command, "--drafts"], on_gpu),
        Case("generation", "weights over NCCL", [*command, "--sync", "nccl"], two),
    ]
    return [dataclasses.replace(case, seconds=420.0) for case in cases]


@dataclass(frozen=True)
class Machine:
    card: str
    gpus: int  # that are used; on a CPU: ranks
    memory_gib: float  # of one
    has_transformer_engine: bool
    without_fp8: str | None  # why there is none
    versions: dict[str, str]


def this_machine(gpus: int | None) -> Machine:
    """What `nemo_trd.doctor` sees here, in a process of its own: this one holds no GPU."""
    command = [sys.executable, "-P", "-W", "ignore", str(probe.__file__)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    facts = json.loads(printed.stdout.splitlines()[-1])
    cards = facts["gpus"]
    layers = missing_layers()
    old = cards and cards[0]["compute_capability"] < FP8_CAPABILITY
    versions = {"python": facts["python"], "CUDA": facts["torch_cuda"] or "none"}
    found = {canonicalize_name(name): number for name, number in facts["versions"].items()}
    versions |= {name: found.get(canonicalize_name(name), "absent") for name in SHOWN}
    count = gpus or 2 ** int(math.log2(len(cards) or 1))
    return Machine(
        card=cards[0]["name"] if cards else f"CPU ({platform.machine()})",
        gpus=count,
        memory_gib=cards[0]["memory_gib"] if cards else 80.0,
        has_transformer_engine=not layers,
        without_fp8=layers or ("the card has no FP8" if old else None),
        versions=versions,
    )


def missing_layers() -> str | None:
    """Why models here have the local layers; None where they have TransformerEngine's."""
    missing = missing_for_transformer_engine()
    return f"no {' and no '.join(missing)}" if missing else None


def fitting_model(shape: str, overrides: list[str], directory: Path) -> Path:
    """Write a model of a shipped shape, with as many of its layers as the plan says fit."""
    settings = json.loads((SHIPPED / f"{shape}.json").read_text())
    # FP8 takes more memory. Of the models that these settings name nothing is read.
    config = compose([*overrides, "precision=fp8"])
    while settings["num_hidden_layers"] > 1:
        hf = as_namespace(settings, directory / shape, shape)
        if peak(training_memory(config, hf, hf)).total <= capacity(config):
            break
        settings["num_hidden_layers"] -= 1
    write_model(directory / shape, settings)
    return directory / shape


def write_model(directory: Path, settings: dict[str, Any]) -> None:
    """A Hugging Face directory with random weights in bf16, and a tokenizer of one-word tokens."""
    directory.mkdir(parents=True)
    hf = as_namespace(settings, directory, directory.name)
    settings["architectures"] = [family_of(hf).architecture]  # else vLLM does not generate with it
    (directory / "config.json").write_text(json.dumps(settings))
    # Drawing each of billions of numbers would take minutes: a prime number of them, repeated.
    pool = (torch.randn(16_777_213, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    tensors = {}
    for name, tensor in expected_tensors(hf).items():
        size = math.prod(tensor.shape)
        numbers = pool.repeat(-(-size // len(pool)))[:size].clone()
        is_norm = len(tensor.shape) == 1
        tensors[name] = torch.ones_like(numbers) if is_norm else numbers.view(tensor.shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    words = {f"t{number}": number for number in range(hf.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t0")
    fast.save_pretrained(directory)


def run_case(case: Case, number: int, output: Path) -> Any:
    """The figures that the case wrote; what it printed goes to a file of `output`/logs.

    Raises:
        RuntimeError: it failed, or took longer than its limit. Nothing that it started is left.
    """
    logs = output / "logs"
    log, figures = logs / f"{number:02d}.log", logs / f"{number:02d}.json"
    script, *arguments = case.command
    command = [sys.executable, str(HERE / script), *arguments, "--json", str(figures)]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    with log.open("w") as printed:
        print(*command, file=printed, flush=True)
        process = subprocess.Popen(
            command,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            code = process.wait(case.seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end within {case.seconds:g} s; see {log}") from None
        finally:
            # What it started has sessions of its own, and ends with its parent.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines
        raise RuntimeError(f"exit code {code}: {errors[-1].strip()[:500]}; see {log}")
    return json.loads(figures.read_text())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all cases: figures by part, failures and what was left out."""
    sizes = TINY if args.tiny else FULL
    found: dict[str, Any] = {"figures": {}, "failures": [], "left_out": []}

    def failed(part: str, error: object) -> None:
        found["failures"].append({"part": part, "error": str(error)})
        print(f"{part}: FAILED: {error}", file=sys.stderr, flush=True)

    try:
        machine = this_machine(args.gpus)
    except Exception as error:
        failed("machine", error)
        return found
    found["machine"] = dataclasses.asdict(machine)
    models_directory = args.output / "models"
    make = {
        "loss": lambda: loss_cases(sizes),
        "training": lambda: training_cases(sizes, machine, models_directory),
        "generation": lambda: generation_cases(sizes, machine, models_directory),
    }
    number = 0
    for part in args.only:
        try:
            cases = make[part]()
        except Exception as error:  # any: the other parts go on
            traceback.print_exc()
            failed(part, f"{type(error).__name__}: {error}")
            continue
        for case in cases:
            number += 1
            name = f"{part}: {case.name}"
            if case.missing:
                found["left_out"].append({"part": name, "reason": case.missing})
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                result = run_case(case, number, args.output)
            except Exception as error:
                failed(name, error)
                continue
            found["figures"].setdefault(part, {})[case.name] = result
            for row in result if part == "loss" else []:
                if "failed" in row:
                    failed(f"{name}: {row['name']}", row["failed"])
    return found


def add_tests(found: dict[str, Any], file: Path) -> None:
    """Add what a JUnit file of pytest tells: numbers of tests, failures, and what was skipped."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    skipped: dict[str, list[str]] = {}
    try:
        tests = list(ElementTree.parse(file).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        found["failures"].insert(0, {"part": "tests", "error": f"they wrote no results: {error}"})
        return
    for test in tests:
        results = {child.tag: child.get("message") or "" for child in test}
        error, reason = results.get("failure", results.get("error")), results.get("skipped")
        if error is not None:
            counts["failed"] += 1
            entry = {"part": f"test {test.get('name')}", "error": error.splitlines()[0][:500]}
            found["failures"].append(entry)
        elif reason is not None:
            counts["skipped"] += 1
            skipped.setdefault(reason, []).append(str(test.get("name")))
        else:
            counts["passed"] += 1
    for reason, names in skipped.items():
        found["left_out"].append({"part": f"tests: {', '.join(names)}", "reason": reason})
    found["tests"] = counts


def commit() -> str:
    command = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gpus", type=int, help="use so many; on a CPU: ranks")
    parser.add_argument("--tests", type=Path, help="JUnit file of tests that ran before")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can compute")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    started = time.monotonic()
    for directory in ("logs", "models"):  # of a run before
        shutil.rmtree(args.output / directory, ignore_errors=True)
    (args.output / "logs").mkdir(parents=True)
    try:
        found = measure(args)
    finally:
        shutil.rmtree(args.output / "models", ignore_errors=True)  # gigabytes
    if args.tests:
        add_tests(found, args.tests)
    found |= {"date": f"{datetime.date.today()}", "commit": commit(), "tiny": args.tiny}
    found["seconds"] = time.monotonic() - started
    (args.output / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.output / "gpu.md").write_text(markdown(found))
    print((args.output / "gpu.md").read_text())
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
