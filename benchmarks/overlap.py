"""Wall time of a training step that samples the next one meanwhile, beside one that does not.

    python benchmarks/overlap.py                     # the figures that docs/servers.md quotes
    python benchmarks/overlap.py --repeats 3 --json overlap.json

Two real runs of nemo_trd.train on the same vLLM servers, `generation.max_staleness` 0 and then 1,
on the same prompts with the same seeds:

    ratio        seconds per step of staleness 1 / those of staleness 0
    ideal_ratio  max(generate, train) / (generate + train), both of the run of staleness 0:
                 generate = rollout + refinement, train = teacher + student

Weight sync, comparing log-probabilities and records are in `ratio`, not in `ideal_ratio`.

The servers, one of the student and one of the teacher, are pinned to `--server-cores` and the
trainer to `--trainer-cores`: two cores that stand for two sets of nodes. Everything has one thread
(OMP_NUM_THREADS=1). Student and teacher are random Qwen3 models of `--layers` and `--hidden`; with
the default sizes, neither generating nor training takes twice as long as the other. They hardly
ever say EOS, so that most answers are `--max-tokens` long and a step is about the same work in both
runs. Rewrites are then all
unfinished, and the rollouts are trained on (`refinement.on_failure=rollout`).

The first `--warm-up` steps do not count, nor does the last one, which has nothing to sample ahead.
The exit status is 1 when `ratio` exceeds 1.15 times `ideal_ratio`. Everything that is started ends
with this process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from nemo_trd.config.schema import VllmServer
from nemo_trd.serve import guard
from nemo_trd.serve.server import Server, stop_all

LIMIT = 1.15  # times the ideal ratio
HEAD_DIM = 32
PROMPT_WORDS = 48
TEMPLATE_TOKENS = 16  # of a chat template and a refinement prompt, generously
GENERATE, TRAIN = ("rollout", "refinement"), ("teacher", "student")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|user|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Seconds = dict[str, float]  # per step, by phase; "step" is all of it


def mean_seconds(lines: Sequence[Mapping[str, Any]], warm_up: int) -> Seconds:
    """Means per step of `seconds/*` in metrics.jsonl, without warm-up and without the last step."""
    counted = lines[warm_up:-1]
    if not counted:
        raise ValueError(f"{len(lines)} steps, {warm_up} of them warm-up, leave none to count")
    phases = dict.fromkeys(name for line in counted for name in line if name.startswith("seconds/"))
    return {
        phase.removeprefix("seconds/"): sum(line.get(phase, 0.0) for line in counted) / len(counted)
        for phase in phases
    }


def ratios(on_policy: Seconds, overlapped: Seconds) -> dict[str, float]:
    """`ratio` and `ideal_ratio` from the seconds of staleness 0 and of staleness 1."""
    generate = sum(on_policy[phase] for phase in GENERATE)
    train = sum(on_policy[phase] for phase in TRAIN)
    return {
        "ratio": overlapped["step"] / on_policy["step"],
        "ideal_ratio": max(generate, train) / (generate + train),
    }


def pooled(runs: Sequence[Seconds]) -> Seconds:
    """Means over repeats of equally many steps."""
    return {phase: sum(run[phase] for run in runs) / len(runs) for phase in runs[0]}


def make_inputs(args: argparse.Namespace, root: Path) -> None:
    """Write student, teacher and prompts into `root`."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ("<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>")
    words = [f"w{number}" for number in range(args.vocabulary - len(special))]
    ids = {word: number for number, word in enumerate((*special, *words))}
    core = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=list(special[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    heads = args.hidden // HEAD_DIM
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=context_length(args),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids["<|end|>"],
        pad_token_id=ids["<pad>"],
    )
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    rng = random.Random(0)
    with (root / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(args.prompts * num_steps(args)):
            problem = " ".join(rng.choices(words, k=PROMPT_WORDS))
            file.write(json.dumps({"question": problem, "answer": "#### w0"}) + "\n")


def num_steps(args: argparse.Namespace) -> int:
    """Of one run: warm-up, those that count, and the last one."""
    return args.warm_up + args.steps + 1


def context_length(args: argparse.Namespace) -> int:
    """Tokens of a refinement prompt and its rewrite."""
    return PROMPT_WORDS + TEMPLATE_TOKENS + 2 * args.max_tokens


def settings(
    args: argparse.Namespace, root: Path, urls: Mapping[str, str], run_dir: Path, staleness: int
) -> list[str]:
    """Overrides of one run."""
    return [
        *("model=local", "data=gsm8k", "data.verifier=none", "generation=vllm"),
        *(f"model.{role}.path={root / role}" for role in urls),
        *(f"generation.vllm.{role}.urls=[{url}]" for role, url in urls.items()),
        *(f"generation.vllm.{role}.replicas=0" for role in urls),
        *("generation.vllm.weight_sync.backend=file", "generation.vllm.compared_rollouts=1"),
        *(f"generation.{kind}.max_tokens={args.max_tokens}" for kind in ("rollout", "refinement")),
        *(f"generation.{kind}.temperature=1" for kind in ("rollout", "refinement")),
        *(f"generation.max_staleness={staleness}", f"run.dir={run_dir}"),
        *(f"data.train.path={root / 'prompts.jsonl'}", "refinement.on_failure=rollout"),
        f"data.max_prompt_tokens={PROMPT_WORDS + TEMPLATE_TOKENS}",
        *("refinement.templates.opd='{problem} {rollout}'", "refinement.templates.system=null"),
        f"refinement.max_context_tokens={context_length(args) - args.max_tokens}",
        *("precision.dtype=fp32", "optimizer.lr=1e-6", f"train.num_steps={num_steps(args)}"),
        f"train.prompts_per_step={args.prompts}",
        *(f"checkpoint.save_interval={num_steps(args)}", "checkpoint.export_hf=false"),
        *(f"logging.samples_interval={num_steps(args)}", "logging.tensorboard=false"),
        "logging.progress=false",
    ]


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What is started in the block runs on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def servers(
    args: argparse.Namespace, root: Path, key: str, cores: Mapping[str, Sequence[int]]
) -> Iterator[dict[str, str]]:
    """A server of the student and one of the teacher, each on its cores; their URLs by role."""
    server = VllmServer(
        python=None,
        dtype="fp32",
        tensor_parallel_size=1,
        max_model_len=context_length(args),
        max_num_seqs=args.prompts,
        arguments=[],
        start_timeout_seconds=args.time_limit,
        stop_timeout_seconds=10,
    )
    by_role = {
        role: Server(
            str(root / role),
            server,
            root / f"{role}.log",
            api_key=SecretStr(key),
            weight_backend="file" if role == "student" else None,
        )
        for role in ("student", "teacher")
    }
    try:
        for role, started in by_role.items():
            with on_cores(cores[role]):
                started.start()
        for started in by_role.values():
            started.wait_until_healthy()
        yield {role: started.url for role, started in by_role.items()}
    finally:
        stop_all(list(by_role.values()))


def train(args: argparse.Namespace, overrides: Sequence[str], run_dir: Path) -> Seconds:
    """One run, in a process of its own: mean seconds per step.

    Raises:
        RuntimeError: it failed, or took longer than `--time-limit`; with the end of its output.
    """
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-I", guard.__file__, str(os.getpid()), "5"]
    command += [sys.executable, "-m", "nemo_trd.train", *overrides]
    output = run_dir / "output.txt"
    with output.open("wb") as file, on_cores(args.trainer_cores):
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        status: int | str = process.wait(args.time_limit)
    except subprocess.TimeoutExpired:
        status = f"none within {args.time_limit:g} s"
    finally:
        process.terminate()  # the guard, which ends everything below itself
        process.wait()
    if status != 0:
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"a run failed, exit status {status}. Its output ends:\n{tail}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return mean_seconds([json.loads(line) for line in lines], args.warm_up)


def machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cores": os.cpu_count(), "cpu": names[0] if names else "unknown"}


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Both runs, `--repeats` times in turn."""
    key = secrets.token_urlsafe(32)
    # Inherited by servers and trainers.
    os.environ |= {"NEMO_TRD_API_KEY": key, "OMP_NUM_THREADS": "1"}
    checkout = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [checkout, os.environ.get("PYTHONPATH")])
    )
    make_inputs(args, root)
    repeats: list[dict[str, Any]] = []
    cores = dict.fromkeys(("student", "teacher"), args.server_cores)
    with servers(args, root, key, cores) as urls:
        for repeat in range(args.repeats):
            load = os.getloadavg()[0]
            by_staleness = {}
            for staleness in (0, 1):
                print(f"staleness {staleness}, run {repeat + 1} ...", file=sys.stderr, flush=True)
                run_dir = root / f"repeat_{repeat}" / f"staleness_{staleness}"
                overrides = settings(args, root, urls, run_dir, staleness)
                by_staleness[str(staleness)] = train(args, overrides, run_dir)
            found = ratios(by_staleness["0"], by_staleness["1"])
            repeats.append({**found, "load_before": load, "seconds": by_staleness})
    together = {kind: pooled([repeat["seconds"][kind] for repeat in repeats]) for kind in "01"}
    sizes = ("hidden", "layers", "prompts", "max_tokens", "server_cores", "trainer_cores")
    return {
        **ratios(together["0"], together["1"]),
        "limit": LIMIT,
        "seconds": together,
        "steps": args.steps,
        "warm_up": args.warm_up,
        "repeats": repeats,
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in sizes},
    }


def table(result: Mapping[str, Any]) -> str:
    """Seconds per step by phase, and the ratios, as Markdown."""
    seconds = result["seconds"]
    lines = ["| seconds per step | staleness 0 | staleness 1 |", "|---|---|---|"]
    for phase in dict.fromkeys((*seconds["0"], *seconds["1"])):
        cells = (f"{seconds[k][phase]:.2f}" if phase in seconds[k] else "" for k in "01")
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    ratio, ideal = result["ratio"], result["ideal_ratio"]
    verdict = "at most" if ratio <= LIMIT * ideal else "MORE THAN"
    each = ", ".join(f"{r['ratio']:.3f} ({r['ideal_ratio']:.3f})" for r in result["repeats"])
    lines += [
        "",
        f"ratio {ratio:.3f}, ideal {ideal:.3f}: {ratio / ideal:.2f} times it, {verdict} {LIMIT}",
        f"by repeat, ideal in parentheses: {each}",
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=384, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens")
    parser.add_argument("--prompts", type=int, default=16, help="per step")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a rollout and of a rewrite")
    parser.add_argument("--steps", type=int, default=5, help="that count, in each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps")
    parser.add_argument("--repeats", type=int, default=1, help="of both runs; all steps count")
    parser.add_argument("--server-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--trainer-cores", type=int, nargs="+", default=[1])
    parser.add_argument("--time-limit", type=float, default=600.0, help="of each wait, in seconds")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    amount: str,
) -> int:
    """Measure below a directory that goes again, show the table, write `args.json`.

    Returns the exit code: 1 when the ratio is more than `LIMIT` times the ideal one.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix=f"{Path(sys.argv[0]).stem}-") as root:
        result = measure(args, Path(root))
    where = result["machine"]
    print(f"{where['cpu']}, {where['cores']} cores; {amount}\n\n{table(result)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["ratio"] > LIMIT * result["ideal_ratio"])


def main() -> int:
    args = arguments()
    return run(args, measure, table, f"{args.steps} steps")


if __name__ == "__main__":
    sys.exit(main())
