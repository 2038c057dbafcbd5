"""Tokens a second of one vLLM server, and the seconds in which new weights reach it.

    python benchmarks/gpu_generation.py --model DIR --json generation.json [--drafts] [--sync file]

benchmarks/gpu.py starts this for each of its cases. Needs an interpreter with vLLM, as runs do
(docs/servers.md). With `--drafts` the server guesses tokens from earlier ones (n-grams) and checks
several at a time. The model is random: greedy answers of such a model repeat themselves, so a gain
by drafts says nothing of a trained one. With `--sync nccl` the server is on the second GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr
from safetensors.torch import load_file

from nemo_trd.config.load import compose
from nemo_trd.config.schema import ModelSource, Sampling, Vllm
from nemo_trd.data.types import GenerationRequest
from nemo_trd.generation.weight_sync import WeightSync
from nemo_trd.plan.memory import GIB
from nemo_trd.serve.open import Servers, generator_on_servers
from nemo_trd.serve.server import Server

KEY = SecretStr("key-of-the-benchmark")
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
SHARE = "0.5"  # of a GPU's memory, for the server


def settings(args: argparse.Namespace) -> Vllm:
    arguments = ["--gpu-memory-utilization", SHARE] if torch.cuda.is_available() else []
    if args.drafts:
        arguments += ["--speculative-config", json.dumps(DRAFTS)]
    server = {
        "max_model_len": args.prompt + args.tokens,
        "start_timeout_seconds": 300,
        "arguments": json.dumps(arguments),
    }
    overrides = [f"generation.vllm.server.{name}={value}" for name, value in server.items()]
    overrides.append(f"generation.vllm.weight_sync.backend={args.sync or 'file'}")
    overrides.append(f"run.dir={args.json.parent / 'weight_sync'}")
    vllm = compose(["generation=vllm", *overrides]).generation.vllm
    assert vllm is not None
    return vllm


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the model, generate, and send it weights where that is asked for.

    Raises:
        ServerError, GenerationFailed: what the server could not do.
    """
    vllm = settings(args)
    devices = [1] if args.sync == "nccl" else [0] if torch.cuda.is_available() else []
    started = time.perf_counter()
    server = Server(
        str(args.model),
        vllm.server,
        args.json.with_suffix(".server.log"),
        api_key=KEY,
        devices=devices,
        weight_backend=args.sync,
    )
    with server:
        figures: dict[str, Any] = {"start_seconds": time.perf_counter() - started}
        figures |= generate(args, vllm, server.url)
        if args.sync:
            figures |= synchronise(args, vllm, server.url)
    return figures


def generate(args: argparse.Namespace, vllm: Vllm, url: str) -> dict[str, Any]:
    """Greedy answers to random prompts, twice: compiling is part of the first time."""
    source = ModelSource(path=str(args.model))
    generator = generator_on_servers(source, Servers([url], KEY), vllm.client)
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=args.tokens)
    rng = random.Random(0)
    columns = json.loads((args.model / "config.json").read_text())["vocab_size"]
    requests = [
        GenerationRequest(tuple(rng.randrange(columns) for _ in range(args.prompt)), seed)
        for seed in range(args.requests)
    ]
    for _ in range(2):
        start = time.perf_counter()
        completions = generator.generate(requests, sampling, "answers")
        seconds = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for completion in completions)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def synchronise(args: argparse.Namespace, vllm: Vllm, url: str) -> dict[str, Any]:
    """Send all weights twice: connecting is part of the first time."""
    sync = WeightSync([url], vllm.weight_sync, KEY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = load_file(args.model / "model.safetensors", device=device)
    seconds = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights.items()

    for version in (1, 2):
        start = time.perf_counter()
        sync.load_weights(tensors(), version)
        seconds.append(time.perf_counter() - start)
        if not sync.is_current(url):
            raise RuntimeError(f"the server has not taken version {version}: {sync.failures}")
    sync.close()
    size = sum(tensor.nbytes for tensor in weights.values()) / GIB
    return {"sync": args.sync, "first_sync_seconds": seconds[0], "sync_seconds": seconds[1]} | {
        "sync_gib": size
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--drafts", action="store_true", help="speculative decoding by n-grams")
    parser.add_argument("--sync", choices=("file", "gloo", "nccl"), help="also send weights")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=512, help="of each answer")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    args = parser.parse_args()
    args.json.write_text(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
