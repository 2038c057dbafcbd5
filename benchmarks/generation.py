"""Wall time of sampling that rewrites each rollout when it ends, beside that of two phases.

    python benchmarks/generation.py
    python benchmarks/generation.py --repeats 6 --json generation.json
    python benchmarks/generation.py --drafts runs/smollm2 --problems gsm8k.jsonl

Two vLLM servers, of a student and of a teacher, each on a core of its own, answer the same requests
twice: streamed, as a run asks for them, and in two phases, all rollouts before the first rewrite.

    ratio        seconds of the streamed samples / those of two phases
    ideal_ratio  max(a, b) / (a + b): a = all rollouts, b = all rewrites, of the two phases

Both are ratios of sums over `--repeats` pairs, which take turns in who comes first: what one of a
pair has left in the servers' prefix caches, and what else the machine does, falls on both alike.

No step reaches the ideal. The teacher has nothing to do until the first rollout has ended, and the
student after the last one, whose rewrite still takes its time. Where all completions are equally
long that is `--concurrency` / `--prompts` of either phase: with 8 of 32 a streamed step takes 1.25
times the ideal at best, with the default of 8 of 128 1.06 times. So the ratio tells about the way
of asking only where a step has many times as many prompts as requests are under way. This process
is not free either, where two servers hold two cores:

    client_seconds  processor seconds of this process for a sample, its rollout and its rewrite

Then the same teacher's server is asked for its log-probabilities of 64 ids a label, in every way:

    bytes    a label takes in JSON and in binary
    client   processor seconds of this process for 1,000 labels, in both forms
    seconds  for 1,000 labels: writing them; writing them with scores (scoring=generation);
             scoring them when they are written (scoring=server); the pass of the same teacher in
             Megatron, in this process (scoring=megatron)

With `--drafts` two other servers then rewrite with drafts and without: what benchmarks/drafts.py
tells, whose defaults it has. That takes a model that copies, so it is not measured without one.

Student and teacher are random Qwen3 models that know few tokens and often say EOS: lengths
vary, up to `--max-tokens`. `--concurrency` requests are with a server at a time. Everything has one
thread (OMP_NUM_THREADS=1). The exit status is 1 when `ratio` exceeds 1.15 times `ideal_ratio`.
Everything that is started ends with this process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import drafts
import httpx
import torch.distributed as dist
from overlap import (
    HEAD_DIM,
    LIMIT,
    context_length,
    machine,
    make_inputs,
    run,
    servers,
    settings,
)
from pydantic import SecretStr

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.prompts import load_prompts, prompts_of_step
from nemo_trd.data.types import GenerationRequest, Trajectory
from nemo_trd.generation.api import (
    ARRAYS,
    GENERATE,
    Connection,
    Wanted,
    read_scores,
    scoring_body,
)
from nemo_trd.generation.pending import Pending, known
from nemo_trd.generation.protocol import Done, Generator
from nemo_trd.megatron.student import Student
from nemo_trd.megatron.teacher import Teacher
from nemo_trd.models.read import read_tokenizer
from nemo_trd.run.sampling import Drawn, Sampler
from nemo_trd.serve.open import Servers, generator_on_servers

Seconds = dict[str, float]  # of one step's sampling, as `Drawn.seconds`
KINDS = ("two_phases", "streamed")
TOP_K = 64
FORMS = ("json", "binary")


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


def transport(args: argparse.Namespace, url: str, key: str) -> dict[str, dict[str, float]]:
    """Bytes a label, and processor seconds of this process for 1,000 labels, by form of the answer.

    A half of each text is context, the other half labels.
    """
    rng, count = random.Random(0), context_length(args) - 1
    text = tuple(rng.randrange(args.vocabulary) for _ in range(count))
    start, wanted = count // 2, Wanted(min(TOP_K, args.vocabulary))
    binary = scoring_body(text, start, wanted)
    bodies = {"json": {k: v for k, v in binary.items() if k != "scores"}, "binary": binary}
    secret, labels = SecretStr(key), count - start
    headers = {"Authorization": f"Bearer {key}"}
    figures: dict[str, dict[str, float]] = {"bytes": {}, "client": {}}

    async def ask(body: Any) -> float:
        connection = Connection(secret, 1, secure=False)
        begin = time.process_time()
        for _ in range(args.answers):
            content = await connection.call("POST", url, GENERATE, body, args.time_limit)
            read_scores(content, url, text, start, wanted)
        seconds = time.process_time() - begin
        await connection.close()
        return seconds

    for form in FORMS:
        accept = {"Accept": ARRAYS} if form == "binary" else {}
        answer = httpx.post(
            url + GENERATE, json=bodies[form], headers=headers | accept, timeout=args.time_limit
        )
        figures["bytes"][form] = len(answer.content) / labels
        asyncio.run(ask(bodies[form]))  # the first time something is imported
        figures["client"][form] = asyncio.run(ask(bodies[form])) * 1000 / (args.answers * labels)
    return figures


def second_pass(args: argparse.Namespace, config: Config, url: str, key: str) -> dict[str, float]:
    """Seconds for 1,000 labels: to write them, without and with scores, and to score them then."""
    assert config.generation.vllm is not None
    client, wanted = config.generation.vllm.client, Wanted(min(TOP_K, args.vocabulary))
    source, server = config.teacher_source, Servers([url], SecretStr(key))
    plain = generator_on_servers(source, server, client)
    scored = generator_on_servers(source, server, client, wanted=wanted)
    rng, sampling = random.Random(1), config.generation.refinement
    names = ("written", "with_scores", "scored_afterwards", "in_megatron")
    taken, labels = dict.fromkeys(names, 0.0), 0
    student = Student(config)
    teacher = Teacher(config, student.groups)
    for repeat in range(args.repeats + 1):
        texts = [
            tuple(rng.randrange(args.vocabulary) for _ in range(args.max_tokens))
            for _ in range(args.texts)
        ]
        asked = [GenerationRequest(text, seed) for seed, text in enumerate(texts)]
        times = [time.perf_counter()]
        for generator in (plain, scored):
            written = generator.generate(asked, sampling, "rewrites")
            times.append(time.perf_counter())
        pairs = [(t + c.token_ids, len(t)) for t, c in zip(texts, written, strict=True)]
        plain.score(pairs, wanted, "scores")
        times.append(time.perf_counter())
        trajectories = [
            Trajectory(n, 0, "refinement", text, text, completion.token_ids, 0)
            for n, (text, completion) in enumerate(zip(texts, written, strict=True))
        ]
        teacher.states(student.pack(trajectories))
        times.append(time.perf_counter())
        if repeat:  # the first one does not count
            labels += sum(len(completion.token_ids) for completion in written)
            for name, begin, end in zip(taken, times, times[1:], strict=False):
                taken[name] += end - begin
    return {name: 1000 * seconds / labels for name, seconds in taken.items()}


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
    different, client = 0, 0.0
    with servers(args, root, key, cores) as urls:
        config = configured(args, root, urls)
        by_kind = {kind: sampler(config, urls, key, kind == "streamed") for kind in KINDS}
        tokenizer = read_tokenizer(config.model.student.path, trust_remote_code=False)
        prompts = load_prompts(config.data.train, "data.train", config.data, tokenizer).prompts
        for repeat in range(args.repeats + 1):
            of_step = prompts_of_step(prompts, repeat, args.prompts, config.run.seed)
            begin = time.process_time()
            drawn = {
                kind: by_kind[kind].sample(of_step, repeat)
                for kind in (KINDS if repeat % 2 else reversed(KINDS))
            }
            pair = {kind: drawn[kind].seconds for kind in KINDS}
            print({kind: round(whole(pair[kind]), 2) for kind in KINDS}, file=sys.stderr)
            if repeat:
                client += time.process_time() - begin
                pairs.append(pair)
                both = zip(*(sampled(drawn[kind]) for kind in KINDS), strict=True)
                different += sum(one != other for one, other in both)
        scores = transport(args, urls["teacher"], key)
        scores["seconds"] = second_pass(args, config, urls["teacher"], key)
    dist.destroy_process_group()
    of_drafts: dict[str, Any] = {}
    if args.drafts is not None:
        of_drafts["drafts"] = drafts.measure(drafts_arguments(args), root)
    sizes = ("hidden", "layers", "vocabulary", "prompts", "max_tokens", "concurrency", "texts")
    return of_drafts | {
        **ratios(pairs),
        "limit": LIMIT,
        "client_seconds": client / (len(KINDS) * args.repeats * args.prompts),
        "different_samples": different,
        "scores": scores,
        "pairs": [{**pair, **ratios([pair])} for pair in pairs],
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in sizes},
    }


def drafts_arguments(args: argparse.Namespace) -> argparse.Namespace:
    return drafts.arguments(["--model", str(args.drafts), "--problems", str(args.problems)])


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
            f"client: {1000 * result['client_seconds']:.1f} ms of a processor for a sample",
            "",
            *score_lines(result["scores"]),
            *(["", drafts.table(result["drafts"])] if "drafts" in result else []),
        ]
    )


def score_lines(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Figures of `transport` and `second_pass`, as Markdown."""
    bytes_, client, seconds = scores["bytes"], scores["client"], scores["seconds"]
    return [
        f"| {TOP_K} log-probabilities a label | JSON | binary | ratio |",
        "|---|---|---|---|",
        f"| bytes a label | {bytes_['json']:.0f} | {bytes_['binary']:.0f} "
        f"| {bytes_['json'] / bytes_['binary']:.1f} |",
        f"| client's seconds for 1,000 labels | {client['json']:.4f} | {client['binary']:.4f} "
        f"| {client['json'] / client['binary']:.1f} |",
        "",
        *(f"{name.replace('_', ' ')}: {s:.2f} s for 1,000 labels" for name, s in seconds.items()),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=384, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=64, help="tokens, the EOS among them")
    parser.add_argument("--prompts", type=int, default=128, help="of each of a pair")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a rollout and of a rewrite")
    parser.add_argument("--concurrency", type=int, default=8, help="requests with one server")
    parser.add_argument("--repeats", type=int, default=4, help="pairs")
    parser.add_argument("--texts", type=int, default=48, help="to write and score")
    parser.add_argument("--answers", type=int, default=20, help="with scores, of each form")
    parser.add_argument("--student-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher-cores", type=int, nargs="+", default=[1])
    parser.add_argument("--time-limit", type=float, default=600.0, help="of a start, in seconds")
    parser.add_argument("--drafts", type=Path, metavar="MODEL", help="a Hugging Face directory")
    parser.add_argument("--problems", type=Path, help="for --drafts, in the format of GSM8K")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if (args.drafts is None) != (args.problems is None):
        parser.error("--drafts and --problems go together")
    args.warm_up, args.steps = 0, args.repeats  # `make_inputs` writes prompts for one more
    return args


def main() -> int:
    args = arguments()
    return run(args, measure, table, f"{args.repeats} pairs")


if __name__ == "__main__":
    sys.exit(main())
