"""Memory and time of the distillation loss, forward and backward, beside other ways to do it.

    python benchmarks/loss.py                        # the sizes that the README quotes
    python benchmarks/loss.py --tokens 512 --vocab 32000 --plot memory.png --json loss.json

Strategies, each in a process of its own, on the same inputs (hidden states and output weights of
student and teacher):

    dense     logits and log-probabilities of all positions, autograd
    chunked   logits of all positions, the divergence in chunks of 512 (common in trainers)
    modelopt  NVIDIA ModelOpt's LogitsKLLoss on logits
    trl       TRL's generalized_jsd_loss on logits
    liger     Liger's fused linear JSD: from hidden states, in chunks
    ours      nemo_trd.loss.fused.fused_divergence

`peak_gb` is the peak of resident memory (on a GPU: of allocated memory) above the inputs, in 1e9
bytes; gradients count. `seconds` is the fastest of `--repeats` passes; the JSON file also has
`cpu_seconds`, over all threads, for machines that do other work. `grad_error` is the
largest error of a gradient entry relative to the largest entry, on the first 64 tokens and 4,096
ids, against dense float64. Strategies that cannot run are listed with the reason: benchmarks/
requirements.txt pins what they need.

With a CUDA device everything runs there, Liger compiled. That path has only been run on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from nemo_trd.config.schema import Loss
from nemo_trd.loss.formulas import CLOSED_FORMS, dense_divergence
from nemo_trd.loss.fused import fused_divergence

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE_TOKENS, SLICE_VOCAB = 64, 4096
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # student hidden, weight, teacher hidden, weight


def dense(inputs: Inputs, loss: Loss) -> Tensor:
    student, teacher = logits(inputs)
    return dense_divergence(student.float(), teacher.float(), loss).sum()


def chunked(inputs: Inputs, loss: Loss) -> Tensor:
    student, teacher = logits(inputs)
    parts = []
    for i in range(0, len(student), 512):
        s, t = student[i : i + 512].float(), teacher[i : i + 512].float()
        if loss.divergence == "forward_kl":  # sum p z - log-normaliser, of teacher and student
            p = t.softmax(-1)
            cross = [torch.einsum("nv,nv->n", p, z) - z.logsumexp(-1) for z in (t, s)]
            parts.append(cross[0] - cross[1])
        else:
            parts.append(dense_divergence(s, t, loss))
    return torch.cat(parts).sum()


def modelopt(inputs: Inputs, loss: Loss) -> Tensor:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    if loss.divergence == "jsd":
        raise NotImplementedError("it has no JSD")
    unsharded = SimpleNamespace(tensor_model_parallel_size=1)
    criterion = LogitsKLLoss(unsharded, reverse=loss.divergence == "reverse_kl")
    student, teacher = logits(inputs)
    per_token, *_ = criterion(student[:, None], teacher[:, None])
    return per_token.sum()


def trl(inputs: Inputs, loss: Loss) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(inputs)
    return GKDTrainer.generalized_jsd_loss(
        student[None].float(), teacher[None].float(), beta=beta_of(loss), reduction="sum"
    )


def liger(inputs: Inputs, loss: Loss) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    tokens, device = inputs[0].shape[0], inputs[0].device
    criterion = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta_of(loss),
        compiled=device.type == "cuda",
        chunk_size=loss.chunk_size,
    )
    mean = criterion(*inputs, torch.zeros(tokens, dtype=torch.int64, device=device))
    return mean * tokens


def ours(inputs: Inputs, loss: Loss) -> Tensor:
    tokens, vocab_size = inputs[0].shape[0], inputs[1].shape[0]
    labels = torch.zeros(tokens, dtype=torch.int64, device=inputs[0].device)
    return fused_divergence(*inputs, labels, loss, vocab_size).loss_sum


STRATEGIES: dict[str, Callable[[Inputs, Loss], Tensor]] = {
    f.__name__: f for f in (dense, chunked, modelopt, trl, liger, ours)
}


def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    student_hidden, student_weight, teacher_hidden, teacher_weight = inputs
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.t()
    return student_hidden @ student_weight.t(), teacher


def beta_of(loss: Loss) -> float:
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": loss.beta}[loss.divergence]


def make_inputs(args: argparse.Namespace, device: str) -> Inputs:
    torch.manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        empty = torch.empty(rows, args.hidden, dtype=DTYPES[args.dtype], device=device)
        return empty.normal_().mul_(scale)

    student = normal(args.tokens, 0.5).requires_grad_(), normal(args.vocab, 0.05).requires_grad_()
    return *student, normal(args.tokens, 0.5), normal(args.vocab, 0.05)


def peak_bytes(device: str, reset: bool = False) -> int:
    """Peak memory since the last reset, which sets it to what is in use now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gradient_error(strategy: Callable[[Inputs, Loss], Tensor], inputs: Inputs, loss: Loss) -> float:
    """Against dense float64 on the same (rounded) inputs; the worse of hidden state and weight."""
    slices = (SLICE_TOKENS, SLICE_VOCAB) * 2
    small = [x.detach()[:rows].clone() for x, rows in zip(inputs, slices, strict=True)]
    exact = [x.double() for x in small]
    for pair in (small, exact):
        for x in pair[:2]:
            x.requires_grad_()
    strategy(tuple(small), loss).backward()
    dense_divergence(*(h @ w.t() for h, w in (exact[:2], exact[2:])), loss).sum().backward()
    errors = [
        ((x.grad.double() - reference.grad).abs().max() / reference.grad.abs().max()).item()
        for x, reference in zip(small[:2], exact[:2], strict=True)
    ]
    return max(errors)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run one strategy in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(args.threads)
    loss = Loss(
        divergence=args.divergence,
        beta=args.beta if args.divergence == "jsd" else 0.5,
        top_k=None,
        top_k_tail="bucket",
        token_clip=None,
        temperature=1.0,
        chunk_size=args.chunk_size,
    )
    inputs, strategy = make_inputs(args, device), STRATEGIES[args.strategy]
    # Imports, and pages that libraries touch once, belong to nobody's loss.
    error = gradient_error(strategy, inputs, loss)
    before = peak_bytes(device, reset=True)
    seconds, cpu_seconds = [], []
    for _ in range(args.repeats):
        inputs[0].grad = inputs[1].grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        value = strategy(inputs, loss)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "name": args.strategy,
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        # Linux resets to what it counts and then notes its estimate, which may lie below.
        "peak_gb": max(0, peak_bytes(device) - before) / 1e9,
        "grad_error": error,
        "tokens": args.tokens,
        "loss": value.item(),
    }


def measure_apart(args: argparse.Namespace, strategy: str, tokens: int) -> dict[str, object]:
    """Run one strategy in a process of its own."""
    command = [sys.executable, __file__, "--strategy", strategy, "--tokens", str(tokens)]
    for name in ("vocab", "hidden", "dtype", "divergence", "beta", "chunk_size", "threads"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    command += ["--repeats", str(args.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}, out of memory?"
        return {"name": strategy, "failed": reason}
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, object]]) -> str:
    """Rows with their ratios to `chunked`, as Markdown."""
    base = next((r for r in rows if r["name"] == "chunked" and "failed" not in r), None)
    lines = [
        "| strategy | peak GB | ratio | seconds | ratio | max gradient error |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | not run: {row['failed']} | | | | |")
            continue
        peak, seconds = (
            f"{row[key]:.2f} | " + (f"{row[key] / base[key]:.2f}" if base and base[key] else "")  # type: ignore
            for key in ("peak_gb", "seconds")
        )
        lines.append(f"| {row['name']} | {peak} | {seconds} | {row['grad_error']:.1e} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    """Peak memory against sequence length, one line a strategy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted((r["tokens"], r["peak_gb"]) for r in rows if r["name"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(
        xlabel="tokens",
        ylabel="peak memory above the inputs, GB",
        title=f"{args.divergence}, vocabulary {args.vocab:,}, hidden {args.hidden}, {args.dtype}",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.plot, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--divergence", choices=list(CLOSED_FORMS), default="forward_kl")
    parser.add_argument("--beta", type=float, default=0.5, help="of jsd")
    parser.add_argument("--chunk-size", type=int, default=256, help="of liger and ours")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts (GPU: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="memory over 1/8, 1/4, 1/2 and all tokens")
    parser.add_argument("--strategy", choices=STRATEGIES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.strategy:
        print(json.dumps(measure(args)))
        return
    rows, shorter = [], []
    for name in args.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(measure_apart(args, name, args.tokens))
        if args.plot and "failed" not in rows[-1]:
            lengths = [args.tokens // part for part in (8, 4, 2)]
            shorter += [measure_apart(args, name, tokens) for tokens in lengths]
    print(
        f"{args.divergence}, {args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}, "
        f"{args.dtype}, {args.threads} threads; ratios to chunked\n\n{table(rows)}"
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.plot:
        plot([row for row in rows + shorter if "failed" not in row], args)


if __name__ == "__main__":
    main()
