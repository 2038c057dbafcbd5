"""Bytes and seconds of bringing a LoRA adapter to a vLLM server, merged into all weights or alone.

    python -m nemo_trd.smollm2 runs/smollm2
    python benchmarks/weight_sync.py --model runs/smollm2 --json weight_sync.json

A student on Megatron, in this process, with an adapter of `--rank` on all linear layers, and two
servers of its base: one for `weight_sync.what=merged`, one for `adapter`. In each of `--repeats`
rounds A and B are drawn anew and go to both servers, in turns; then each is asked for one token,
which is when vLLM puts an adapter in use, for one after another prompt, and for more with their
log-probabilities, which are compared. One round before them warms up.

    bytes        that leave the trainer
    sync         seconds from the first tensor until the server answers again
    first_token  seconds of the first request after it, one token after a prompt of 256
    next_token   seconds of the second one, after another prompt of 256

Each server has a thread; the one that is not asked idles. The exit status is 1 when the adapter
alone is not `LESS` times fewer bytes, or log-probabilities of the servers differ by more than
`CLOSE`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from overlap import machine
from pydantic import SecretStr
from torch import Tensor

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.types import GenerationRequest
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.generation.weight_sync import WeightSync
from nemo_trd.megatron.student import Student
from nemo_trd.serve.open import Servers, generator_on_servers
from nemo_trd.serve.server import Server, start_all, stop_all

KINDS = ("merged", "adapter")
LESS = 10  # times fewer bytes
CLOSE = 1e-4  # nats
SECONDS = ("sync", "first_token", "next_token")


def configured(args: argparse.Namespace, root: Path, what: str) -> Config:
    return compose(
        [
            *("model=local", "generation=vllm", "data=gsm8k", "data.train.path=unread.jsonl"),
            *(f"model.{role}.path={args.model}" for role in ("student", "teacher")),
            *("student.adapter=lora", f"student.adapter.rank={args.rank}"),
            *("precision.dtype=fp32", "generation.vllm.server.dtype=fp32"),
            *("generation.vllm.server.max_model_len=512", "generation.vllm.server.max_num_seqs=4"),
            f"generation.vllm.weight_sync.what={what}",
            f"generation.vllm.weight_sync.backend={args.backend}",
            f"generation.vllm.weight_sync.directory={root / what}",
        ]
    )


def draw(student: Student, seed: int) -> None:
    """Give the adapter's A and B random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in student.models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02, generator=generator)


def weights(student: Student, what: str) -> Iterator[tuple[str, Tensor]]:
    return student.export_scaled_adapter() if what == "adapter" else student.export_hf_weights()


def counted(
    tensors: Iterable[tuple[str, Tensor]], sizes: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors; appends the bytes of each."""
    for name, tensor in tensors:
        sizes.append(tensor.nbytes)
        yield name, tensor


def one_round(
    student: Student, generators: Mapping[str, VllmGenerator], prompt: Sequence[int], version: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Figures by kind, and the largest difference of log-probabilities between the servers."""
    figures, told = {}, []
    for what, generator in generators.items():
        sizes: list[int] = []
        started = time.monotonic()
        generator.load_weights(counted(weights(student, what), sizes), version)
        synced = time.monotonic()
        ask(generator, prompt, 1)
        figures[what] = {"bytes": float(sum(sizes)), "sync": synced - started}
        answered = time.monotonic()
        figures[what]["first_token"] = answered - synced
        ask(generator, prompt[::-1], 1)
        figures[what]["next_token"] = time.monotonic() - answered
        told.append(ask(generator, prompt, 16))
    pairs = zip(*told, strict=True)
    return figures, max(abs(merged - alone) for merged, alone in pairs)


def ask(generator: VllmGenerator, prompt: Sequence[int], count: int) -> tuple[float, ...]:
    """Log-probabilities of tokens that are drawn: with one seed the same ones of equal weights."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=count)
    request = GenerationRequest(tuple(prompt), 1)
    (completion,) = generator.generate([request], sampling, "log-probabilities")
    assert completion.logprobs is not None
    return completion.logprobs


def summed_up(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Bytes by kind, and the median seconds of all rounds but the first."""
    result: dict[str, Any] = {}
    for what in KINDS:
        counted = [figures[what] for figures in rounds[1:]]
        result[what] = {"bytes": int(counted[0]["bytes"])}
        for name in SECONDS:
            ordered = sorted(figures[name] for figures in counted)
            result[what][name] = ordered[len(ordered) // 2]
    result["times_fewer_bytes"] = result["merged"]["bytes"] / result["adapter"]["bytes"]
    return result


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All rounds, on servers that end with this call."""
    configs = {what: configured(args, root, what) for what in KINDS}
    key = SecretStr(secrets.token_urlsafe(32))
    servers = {what: server(config, root / f"{what}.log", key) for what, config in configs.items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        start_all(list(servers.values()))
        student = Student(configs["adapter"])
        generators = {what: generator(configs[what], servers[what].url, key) for what in KINDS}
        prompt = [1 + n % (student.hf.vocab_size - 1) for n in range(100, 356)]
        rounds, differences = [], []
        for version in range(args.repeats + 1):
            draw(student, version)
            figures, difference = one_round(student, generators, prompt, version)
            rounds.append(figures)
            differences.append(difference)
    finally:
        stop_all(list(servers.values()))
        dist.destroy_process_group()
    return {
        **summed_up(rounds),
        "difference": max(differences),
        "rounds": rounds,
        "machine": machine(),
        "settings": {"rank": args.rank, "backend": args.backend, "repeats": args.repeats},
    }


def server(config: Config, log_file: Path, key: SecretStr) -> Server:
    assert config.generation.vllm is not None
    adapter = config.served_adapter
    return Server(
        config.model.student.path,
        config.generation.vllm.student.server,
        log_file,
        api_key=key,
        weight_backend=config.generation.vllm.weight_sync.backend,
        adapter_rank=adapter.rank if adapter else None,
    )


def generator(config: Config, url: str, key: SecretStr) -> VllmGenerator:
    vllm = config.generation.vllm
    assert vllm is not None
    return generator_on_servers(
        config.model.student,
        Servers([url], key),
        vllm.client,
        sync=WeightSync([url], vllm.weight_sync, key),
        adapted=config.served_adapter is not None,
        logprobs=True,
    )


def table(result: Mapping[str, Any]) -> str:
    """Bytes and seconds by kind, as Markdown."""
    lines = ["| | MB | sync, s | first token, s | next token, s |", "|---|---:|---:|---:|---:|"]
    for what in KINDS:
        row = result[what]
        seconds = " | ".join(f"{row[name]:.2f}" for name in SECONDS)
        lines.append(f"| `{what}` | {row['bytes'] / 1e6:,.1f} | {seconds} |")
    lines += [
        "",
        f"{result['times_fewer_bytes']:.1f} times fewer bytes; log-probabilities of the servers "
        f"differ by at most {result['difference']:.1e}",
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--backend", choices=("gloo", "file"), default="gloo")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.environ["OMP_NUM_THREADS"] = "1"  # the servers inherit it
    with tempfile.TemporaryDirectory(prefix="weight-sync-") as root:
        result = measure(args, Path(root))
    where = result["machine"]
    print(
        f"{where['cpu']}, {where['cores']} cores; {args.model}, {args.backend}\n\n{table(result)}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["times_fewer_bytes"] < LESS or result["difference"] > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
