"""Wall time of sampling that rewrites each rollout when it ends, beside that of two phases.

    python benchmarks/generation.py
    python benchmarks/generation.py --repeats 6 --json generation.json

Two vLLM servers, of a student and of a teacher, each on a core of its own, answer the same requests
twice: streamed, as a run asks for them, and in two phases, all rollouts before the first rewrite.

    ratio        seconds of the streamed samples / those of two phases
    ideal_ratio  max(a, b) / (a + b): a = all rollouts, b = all rewrites, of the two phases

Both are ratios of sums over `--repeats` pairs, which take turns in who comes first: what one of a
pair has left in the servers' prefix caches, and what else the machine does, falls on both alike.

Student and teacher are random Qwen3 models that know few tokens and often say EOS: lengths
vary, up to `--max-tokens`. `--concurrency` requests are with a server at a time. Everything has one
thread (OMP_NUM_THREADS=1). The exit status is 1 when `ratio` exceeds 1.15 times `ideal_ratio`.
Everything that is started ends with this process.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from overlap import HEAD_DIM, LIMIT, machine, make_inputs, run, servers, settings
from pydantic import SecretStr

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.prompts import load_prompts, prompts_of_step
from nemo_trd.generation.pending import Pending, known
from nemo_trd.generation.protocol import Done, Generator
from nemo_trd.models.read import read_tokenizer
from nemo_trd.run.sampling import Drawn, Sampler
from nemo_trd.serve.open import Servers, generator_on_servers

Seconds = dict[str, float]  # of one step's sampling, as `Drawn.seconds`
KINDS = ("two_phases", "streamed")


class AfterTheLast:
    """Asks a generator for nothing before all requests are known."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.weight_version = generator.weight_version

    async def stream(
        self, requests: Sequence[Pending], sampling: Sampling, description: str, done: Done
    ) -> None:
        asked = [await request for request in requests]
        pending = [known(request) for request in asked]
        await self._generator.stream(pending, sampling, description, done)


def whole(seconds: Seconds) -> float:
    return seconds["rollout"] + seconds["refinement"]


def ratios(pairs: Sequence[Mapping[str, Seconds]]) -> dict[str, float]:
    """`ratio` and `ideal_ratio` of pairs of "two_phases" and "streamed"."""
    a = sum(pair["two_phases"]["rollout"] for pair in pairs)
    b = sum(pair["two_phases"]["refinement"] for pair in pairs)
    return {
        "ratio": sum(whole(pair["streamed"]) for pair in pairs) / (a + b),
        "ideal_ratio": max(a, b) / (a + b),
    }


def sampler(config: Config, urls: Mapping[str, str], key: str, streams: bool) -> Sampler:
    assert config.generation.vllm is not None
    sources = config.model.student, config.teacher_source
    made: list[Any] = [
        generator_on_servers(source, Servers([url], SecretStr(key)), config.generation.vllm.client)
        for source, url in zip(sources, (urls["student"], urls["teacher"]), strict=True)
    ]
    if not streams:
        made[1] = AfterTheLast(made[1])
    tokenizer = read_tokenizer(config.model.student.path, trust_remote_code=False)
    return Sampler(config, *made, tokenizer, tokenizer)


def sampled(drawn: Drawn) -> list[Any]:
    """Token ids of each rollout and its rewrite."""
    return [
        (r.request.rollout.completion.token_ids, r.completion and r.completion.token_ids)
        for r in drawn.refinements
    ]


def configured(args: argparse.Namespace, root: Path, urls: Mapping[str, str]) -> Config:
    return compose(
        [
            *settings(args, root, urls, root / "run", 0),
            *(f"generation.{kind}.top_k=0" for kind in ("rollout", "refinement")),
            *(f"generation.{kind}.top_p=1" for kind in ("rollout", "refinement")),
            f"generation.vllm.client.max_concurrency={args.concurrency}",
        ]
    )


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All pairs, after one that does not count."""
    key = secrets.token_urlsafe(32)
    os.environ |= {"NEMO_TRD_API_KEY": key, "OMP_NUM_THREADS": "1"}
    make_inputs(args, root)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    cores = {"student": args.student_cores, "teacher": args.teacher_cores}
    pairs: list[dict[str, Seconds]] = []
    different = 0
    with servers(args, root, key, cores) as urls:
        config = configured(args, root, urls)
        by_kind = {kind: sampler(config, urls, key, kind == "streamed") for kind in KINDS}
        tokenizer = read_tokenizer(config.model.student.path, trust_remote_code=False)
        prompts = load_prompts(config.data.train, "data.train", config.data, tokenizer).prompts
        for repeat in range(args.repeats + 1):
            of_step = prompts_of_step(prompts, repeat, args.prompts, config.run.seed)
            drawn = {
                kind: by_kind[kind].sample(of_step, repeat)
                for kind in (KINDS if repeat % 2 else reversed(KINDS))
            }
            pair = {kind: drawn[kind].seconds for kind in KINDS}
            print({kind: round(whole(pair[kind]), 2) for kind in KINDS}, file=sys.stderr)
            if repeat:
                pairs.append(pair)
                both = zip(*(sampled(drawn[kind]) for kind in KINDS), strict=True)
                different += sum(one != other for one, other in both)
    dist.destroy_process_group()
    sizes = ("hidden", "layers", "vocabulary", "prompts", "max_tokens", "concurrency")
    return {
        **ratios(pairs),
        "limit": LIMIT,
        "different_samples": different,
        "pairs": [{**pair, **ratios([pair])} for pair in pairs],
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in sizes},
    }


def table(result: Mapping[str, Any]) -> str:
    """Mean seconds of a step's sampling, and the ratios, as Markdown."""
    pairs = result["pairs"]
    lines = ["| mean seconds | two phases | streamed |", "|---|---|---|"]
    for name in ("rollout", "refinement"):
        means = (sum(pair[kind][name] for pair in pairs) / len(pairs) for kind in KINDS)
        lines.append(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    ratio, ideal = result["ratio"], result["ideal_ratio"]
    verdict = f"{'at most' if ratio <= LIMIT * ideal else 'MORE THAN'} {LIMIT}"
    return "\n".join(
        [
            *lines,
            "",
            f"ratio {ratio:.3f}, ideal {ideal:.3f}: {ratio / ideal:.2f} times it, {verdict}",
            "by pair: " + ", ".join(f"{p['ratio']:.3f} ({p['ideal_ratio']:.3f})" for p in pairs),
            f"samples that differ: {result['different_samples']}",
        ]
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=384, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=64, help="tokens, the EOS among them")
    parser.add_argument("--prompts", type=int, default=48, help="of each of a pair")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a rollout and of a rewrite")
    parser.add_argument("--concurrency", type=int, default=8, help="requests with one server")
    parser.add_argument("--repeats", type=int, default=4, help="pairs")
    parser.add_argument("--student-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher-cores", type=int, nargs="+", default=[1])
    parser.add_argument("--time-limit", type=float, default=600.0, help="of a start, in seconds")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    args.warm_up, args.steps = 0, args.repeats  # `make_inputs` writes prompts for one more
    return args


def main() -> int:
    args = arguments()
    return run(args, measure, table, f"{args.repeats} pairs")


if __name__ == "__main__":
    sys.exit(main())
