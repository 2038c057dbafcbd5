"""Seconds in which a vLLM server rewrites rollouts, with drafts from them and without.

    python -m nemo_trd.smollm2 runs/smollm2
    python benchmarks/drafts.py --model runs/smollm2 --problems gsm8k.jsonl --json drafts.json

Two servers of one model, one of them with `speculation`, rewrite the same rollouts of that model,
in turns: what else the machine does falls on both alike. Rollouts and rewrites are those of
experiment=smollm2_gsm8k (the teacher sees the reference solution), at most `--max-tokens` long.
Both are greedy, so that tokens can be compared; then the rewrites are also sampled at
`--temperature`, where they differ. Each server has a thread; the one that is not asked idles.

    ratio              seconds with drafts / seconds without, at temperature 0
    draft_acceptance, tokens_per_decode_step    as in metrics.jsonl (docs/report.md)

The exit status is 1 when a token differs at temperature 0.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overlap import machine
from pydantic import SecretStr

from nemo_trd.algorithm.acceptance import read_rollout
from nemo_trd.algorithm.change import draft_metrics
from nemo_trd.algorithm.refinement import refinement_prompt
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config, Sampling, Speculation
from nemo_trd.data.prompts import load_prompts
from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.models.read import read_tokenizer
from nemo_trd.serve.open import Servers, generator_on_servers
from nemo_trd.serve.server import Server, start_all, stop_all

DRAFTS = Speculation(method="ngram", tokens=5, lookup_max=4, lookup_min=2)
KINDS = ("without", "with")


def configured(args: argparse.Namespace) -> Config:
    return compose(
        [
            *("experiment=smollm2_gsm8k", "generation=vllm", f"model.student.path={args.model}"),
            *(f"data.train.path={args.problems}", "data.verifier=none"),
            *(
                f"generation.{kind}.max_tokens={args.max_tokens}"
                for kind in ("rollout", "refinement")
            ),
            *("generation.vllm.server.dtype=fp32", "generation.vllm.server.max_model_len=2048"),
        ]
    )


def sampling(args: argparse.Namespace, temperature: float) -> Sampling:
    return Sampling(temperature=temperature, top_p=1, top_k=0, max_tokens=args.max_tokens)


def requests(
    args: argparse.Namespace, config: Config, generator: VllmGenerator
) -> list[GenerationRequest]:
    """Rewrites to ask for: of a greedy rollout of each problem."""
    tokenizer = read_tokenizer(config.model.student.path, trust_remote_code=False)
    data = load_prompts(config.data.train, "data.train", config.data, tokenizer)
    prompts = data.prompts[: args.count]
    asked = [GenerationRequest(prompt.token_ids, 0) for prompt in prompts]
    rollouts = generator.generate(asked, sampling(args, 0), "rollouts")
    contexts = [
        refinement_prompt(
            read_rollout(prompt, 0, rollout, tokenizer, lambda *_: None), config, tokenizer
        )
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
    return [GenerationRequest(c.token_ids, n) for n, c in enumerate(contexts) if c.token_ids]


def rewrite(
    generators: dict[str, VllmGenerator],
    asked: Sequence[GenerationRequest],
    sampling: Sampling,
    repeats: int,
) -> tuple[dict[str, Any], dict[str, list[Completion]]]:
    """Seconds of each kind over all repeats but a first one, and acceptance; the last rewrites."""
    seconds = dict.fromkeys(KINDS, 0.0)
    rewrites: dict[str, list[Completion]] = {}
    for repeat in range(repeats + 1):
        for kind in KINDS if repeat % 2 else reversed(KINDS):
            begin = time.perf_counter()
            rewrites[kind] = generators[kind].generate(asked, sampling, "rewrites")
            if repeat:  # the first time drafts are looked up, that is compiled
                seconds[kind] += time.perf_counter() - begin
    tokens = {kind: sum(len(c.token_ids) for c in rewrites[kind]) for kind in KINDS}
    per_token = {kind: seconds[kind] / (repeats * tokens[kind]) for kind in KINDS}
    figures = {
        "seconds": seconds,
        "tokens": tokens,
        "ratio": per_token["with"] / per_token["without"],
    }
    return figures | draft_metrics(rewrites["with"]), rewrites


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    key = SecretStr(secrets.token_urlsafe(32))
    os.environ["OMP_NUM_THREADS"] = "1"
    config = configured(args)
    assert config.generation.vllm is not None
    settings = config.generation.vllm.server
    drafting = settings.model_copy(update={"speculation": DRAFTS})
    started = {
        kind: Server(str(args.model), server, root / f"{kind}.log", api_key=key)
        for kind, server in zip(KINDS, (settings, drafting), strict=True)
    }
    try:
        start_all(list(started.values()))
        generators = {
            kind: generator_on_servers(
                config.model.student,
                Servers([server.url], key),
                config.generation.vllm.client,
                drafts=kind == "with",
            )
            for kind, server in started.items()
        }
        asked = requests(args, config, generators["without"])
        greedy, rewrites = rewrite(generators, asked, sampling(args, 0), args.repeats)
        different = sum(one != other for one, other in zip(*rewrites.values(), strict=True))
        sampled, _ = rewrite(generators, asked, sampling(args, args.temperature), args.repeats)
    finally:
        stop_all(list(started.values()))
    return {
        "greedy": greedy,
        "different": different,
        "sampled": sampled,
        "rewrites": len(asked),
        "temperature": args.temperature,
        "machine": machine(),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | without | with drafts | ratio | accepted | tokens a step |",
        "|---|---|---|---|---|---|",
    ]
    sampled = f"T = {result['temperature']:g}"
    for name, row in (("greedy", result["greedy"]), (sampled, result["sampled"])):
        seconds, accepted = row["seconds"], row.get("draft_acceptance", 0.0)
        lines.append(
            f"| {name} | {seconds['without']:.1f} s | {seconds['with']:.1f} s | {row['ratio']:.2f} "
            f"| {accepted:.1%} | {row['tokens_per_decode_step']:.2f} |"
        )
    return "\n".join([*lines, "", f"{result['rewrites']} rewrites, {result['different']} differ"])


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--problems", type=Path, required=True, help="in the format of GSM8K")
    parser.add_argument("--count", type=int, default=8, help="problems")
    parser.add_argument("--max-tokens", type=int, default=160, help="of rollouts and of rewrites")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled rewrites")
    parser.add_argument("--repeats", type=int, default=2, help="of each kind, in turns")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args(given)


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="drafts-") as root:
        result = measure(args, Path(root))
    print(f"{result['machine']['cpu']}\n\n{table(result)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
