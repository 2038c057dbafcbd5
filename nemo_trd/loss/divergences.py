"""The divergences by name: what everything but their formulas knows of them. Imports no torch.

To add one: its name in `FullDivergenceName` or `EstimatorName` of `config.schema`, its record here,
its formulas in `formulas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_trd.config.schema import DivergenceName, FullDivergenceName, Loss


@dataclass(frozen=True)
class Divergence:
    """One divergence D(pi_T, pi_theta).

    title: its name for people.
    workspace: number of fp32 tensors [chunk, V/tp] that its closed form holds at one time beside
        the logits of both models, where its operators run one by one.
    moved: bytes for one logit of both models that its kernels read and write on a GPU, with a
        gradient in bf16 (docs/loss.md).
    estimates: the divergence that it is an estimate of, from the label's token alone.
    """

    title: str
    workspace: float
    moved: int
    estimates: FullDivergenceName | None = None


DIVERGENCES: dict[DivergenceName, Divergence] = {
    "forward_kl": Divergence("forward KL", workspace=5, moved=18),
    "reverse_kl": Divergence("reverse KL", workspace=5, moved=30),
    "jsd": Divergence("JSD", workspace=6.25, moved=30),
    "k1": Divergence("k1", workspace=5, moved=26, estimates="reverse_kl"),
    "k3": Divergence("k3", workspace=5, moved=26, estimates="reverse_kl"),
}

TOP_K_WORKSPACE = 5.0  # of any divergence on the teacher's top k
ENTRY_CLIP_WORKSPACE = 0.25  # which entries are beyond loss.entry_clip, a byte each

# Label positions of a chunk where loss.chunk_size is null. A CPU works on blocks of them in any
# case. On a GPU a chunk reads and writes the whole gradient of the output weight, and above 2048
# positions that no longer counts beside the matrix products.
CPU_CHUNK = 256
GPU_CHUNK = range(256, 2048)
GPU_CHUNK_BYTES = 4 << 30


def logit_bytes(loss: Loss) -> float:
    """Most bytes in use for one logit of both models and what is computed from it.

    That is with operators run one by one; compiled, the comparison holds less (docs/loss.md).
    """
    if loss.top_k is not None:
        return 4 * (2 + TOP_K_WORKSPACE)
    clip = 0.0 if loss.entry_clip is None else ENTRY_CLIP_WORKSPACE
    return 4 * (2 + DIVERGENCES[loss.divergence].workspace + clip)


def chunk_size(loss: Loss, rows: int, on_gpu: bool) -> int:
    """Number of label positions whose logits exist at one time.

    Args:
        rows: of the output weight on one rank.
    """
    if loss.chunk_size is not None:
        return loss.chunk_size
    if not on_gpu:
        return CPU_CHUNK
    fitting = int(GPU_CHUNK_BYTES / (rows * logit_bytes(loss)))
    return min(GPU_CHUNK.stop, max(GPU_CHUNK.start, fitting))
