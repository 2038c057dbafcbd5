"""Stand-in for TransformerEngine's compiled extension of this name, in PyTorch on a CPU.

TransformerEngine's own Python, all of it, runs above this. What the models of this project call is
here; anything else raises NotImplementedError, by name. It says nothing about speed, about CUDA
streams, nor about the last digit of a kernel.

`matrix_products` counts what ran by the formats of both factors, so that a test can tell FP8 from
its absence.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import fp8_formats as formats
import torch
import torch.nn.functional as F
from fp8_formats import DType
from torch import Tensor

matrix_products: Counter[tuple[str, str]] = Counter()


def _numbered(name: str, members: str, start: int = 0) -> Any:
    return enum.IntEnum(name, members.split(), start=start, module=__name__)


_FORMATS = "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D "
_FORMATS += "BSHD_BSHD_BSHD T3HD TH3D THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD "
_FORMATS += "THD_BSHD_BSHD THD_SBHD_SBHD Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD "
_FORMATS += "Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD Paged_KV_THD_BSHD_BSHD "
_FORMATS += "Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD"
_MASKS = "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK "
_MASKS += "PADDING_CAUSAL_BOTTOM_RIGHT_MASK"
_OVERLAPS = "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS "
_OVERLAPS += "SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P "
_OVERLAPS += "EXTERNAL_BULK_OVERLAP_AG"


def _nvte(name: str, members: str) -> Any:
    return _numbered(name, " ".join(f"NVTE_{member}" for member in members.split()))


FP8FwdTensors = _numbered(
    "FP8FwdTensors",
    " ".join(f"GEMM{i}_{t}" for i in (1, 2, 3) for t in ("INPUT", "WEIGHT", "OUTPUT")),
)
FP8BwdTensors = _numbered(
    "FP8BwdTensors", " ".join(f"GRAD_{t}{i}" for i in (1, 2, 3) for t in ("OUTPUT", "INPUT"))
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
    module=__name__,
)
NVTE_Bias_Type = _nvte("NVTE_Bias_Type", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI")
NVTE_Mask_Type = _nvte("NVTE_Mask_Type", _MASKS)
NVTE_Softmax_Type = _nvte(
    "NVTE_Softmax_Type", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX"
)
NVTE_QKV_Format = _nvte(
    "NVTE_QKV_Format",
    "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD BHSD QKV_Format_NOT_SET",
)
NVTE_QKV_Layout = _nvte("NVTE_QKV_Layout", _FORMATS)
Float8BlockScaleTensorFormat = _numbered(
    "Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID"
)
CommOverlapType = _numbered("CommOverlapType", "RS AG")
CommOverlapAlgo = _numbered("CommOverlapAlgo", _OVERLAPS)


class _Unknown:
    """A function of the extension that the stand-in does not have."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"transformer_engine_torch.{self._name}: not in the stand-in on a CPU"
        )

    def __or__(self, other: Any) -> Any:  # in annotations
        return Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Unknown(name)


# Part of a choice that TransformerEngine makes by name.
layernorm_fwd, layernorm_bwd = _Unknown("layernorm_fwd"), _Unknown("layernorm_bwd")
CommOverlap = CommOverlapP2P = CommOverlapHelper = object  # named in annotations


def get_cublasLt_version() -> int:
    return 130000


def get_cudnn_version() -> int:
    return 91300


def get_num_cublas_streams() -> int:
    return 4


def ubuf_built_with_mpi() -> bool:
    return False


def get_fused_attn_backend(*args: Any) -> Any:
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    return formats.empty(quantizer, list(shape), dtype, device)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    if noop is not None:
        raise NotImplementedError("quantize with a flag that skips it: not in the stand-in")
    if output is None:
        output = formats.empty(quantizer, list(tensor.shape), tensor.dtype, tensor.device)
    formats.quantize(tensor, quantizer, output)
    return output


def dequantize(tensor: Any, dtype: DType) -> Tensor:
    by_rows = getattr(tensor, "_data", getattr(tensor, "_rowwise_data", None)) is not None
    return (
        formats.matrix(tensor, by_rows=by_rows)
        .reshape(tensor.size())
        .to(formats.TORCH_DTYPES[dtype])
    )


def split_quantize(tensor: Tensor, sizes: list[int], quantizers: list[Any], **_: Any) -> list[Any]:
    return [quantize(x, q) for x, q in zip(torch.split(tensor, sizes), quantizers, strict=True)]


def multi_tensor_quantize(tensors: list[Tensor], quantizers: list[Any]) -> list[Any]:
    return [quantize(x, q) for x, q in zip(tensors, quantizers, strict=True)]


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the gradient of the layer's output in FP8."""
    bias = gradient.float().reshape(-1, gradient.shape[-1]).sum(0).to(gradient.dtype)
    return bias, quantize(gradient, quantizer)


def fp8_transpose(data: Tensor, dtype: DType, *, out: Tensor | None = None) -> Tensor:
    transposed = data.reshape(-1, data.shape[-1]).t().reshape(data.shape[-1], *data.shape[:-1])
    return transposed.contiguous() if out is None else out.copy_(transposed)


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor,
    histories: list[Tensor],
    scales: list[Tensor],
    algorithm: str,
    dtype: DType,
    margin: int,
) -> None:
    """Delayed scaling at the end of a step: new scales from the history of maxima, which moves on.

    Args:
        reduced: this step's maxima of all tensors, over the ranks.
        histories: [steps, tensors] each; row 0 is this step's, and is cleared for the next.
    """
    largest = torch.finfo(formats.TORCH_DTYPES[dtype]).max / 2.0**margin
    newest = reduced.split([history.shape[1] for history in histories])
    for history, scale, maxima in zip(histories, scales, newest, strict=True):
        history[0] = maxima
        amax = history.amax(0) if algorithm == "max" else history[0]
        usable = (amax > 0) & amax.isfinite()
        scale.copy_(torch.where(usable, largest / amax, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Tensor | None]:
    """b' a', where ' transposes a factor if its flag says so; with a bias, or the bias's gradient.

    Raises:
        RuntimeError: FP8 matrices that cuBLASLt refuses.
    """
    if gelu or comm_overlap is not None or alpha != 1.0 or beta not in (None, 0.0, 1.0):
        raise NotImplementedError("a product with GELU, overlap or a factor: not in the stand-in")
    left = formats.matrix(b, by_rows=not transpose_b)
    right = formats.matrix(a, by_rows=transpose_a)
    left = left.t() if transpose_b else left
    right = right.t() if transpose_a else right
    _check_alignment(a, b, left, right)
    matrix_products[_format(a), _format(b)] += 1
    common = torch.promote_types(left.dtype, right.dtype)
    product = left.to(common) @ right.to(common)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = formats.matrix(b, by_rows=not transpose_b).sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.to(product.dtype)
    if not transpose_b:
        product = product.reshape(*b.size()[:-1], product.shape[-1])
    if out is not None:
        out.add_(product) if accumulate else out.copy_(product)
        product = out
    else:
        product = product.to(_result_dtype(a, b, product, out_dtype))
    if quantizer is not None:
        product = quantize(product, quantizer)
    return product, bias_gradient, None, extra_output


def te_general_grouped_gemm(
    a: list[Any],
    transpose_a: bool,
    b: list[Any],
    transpose_b: bool,
    out: list[Tensor],
    out_dtype: DType,
    rows: list[int] | None,
    bias: list[Tensor],
    bias_dtype: DType,
    single_output: bool,
    gelu_in: list[Tensor],
    grad: bool,
    workspaces: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    multiprocessors: int,
) -> list[Tensor]:
    """`generic_gemm` of each pair; with a single output into rows of that one."""
    if any(x.numel() for x in bias):
        raise NotImplementedError("a grouped product with a bias: not in the stand-in")
    results = torch.split(out[0], rows) if single_output else out
    for x, y, result, space in zip(a, b, results, workspaces * len(a), strict=False):
        common = (None, out_dtype, None, bias_dtype, False, None, grad, space, workspace_size)
        generic_gemm(
            *(x, transpose_a, y, transpose_b, result, *common, accumulate, use_split_accumulator)
        )
    return bias


def _format(tensor: Any) -> str:
    return (
        tensor._fp8_dtype.name if formats.is_quantized(tensor) else str(tensor.dtype)
    ).removeprefix("torch.")


def _result_dtype(a: Any, b: Any, product: Tensor, wanted: DType | None) -> torch.dtype:
    if wanted is not None:
        return formats.TORCH_DTYPES[wanted]
    return torch.bfloat16 if formats.is_quantized(a) or formats.is_quantized(b) else product.dtype


def _check_alignment(a: Any, b: Any, left: Tensor, right: Tensor) -> None:
    """cuBLASLt's rules for FP8: rows of both factors and of the result begin at 16 bytes.

    The factors have one byte an element, and both lie along the dimension that is summed over; the
    result has two.
    """
    if formats.is_quantized(a) != formats.is_quantized(b):
        raise RuntimeError(f"a product of {_format(a)} and {_format(b)}: cuBLASLt has none")
    if formats.is_quantized(a) and (right.shape[0] % 16 or right.shape[1] % 8):
        raise RuntimeError(
            f"FP8 product {tuple(left.shape)} x {tuple(right.shape)}: cuBLASLt wants the inner "
            "dimension a multiple of 16, and the last one a multiple of 8"
        )


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: DType,
    sm_margin: int,
    zero_centered: bool,
) -> list[Any]:
    """RMSNorm of the last dimension: [result, no mean, reciprocal root mean square]."""
    reciprocal = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    result = (x.float() * reciprocal * (weight.float() + zero_centered)).to(
        formats.TORCH_DTYPES[dtype]
    )
    if quantizer is not None:
        return [quantize(result, quantizer, out), None, reciprocal.flatten()]
    return [result if out is None else out.copy_(result), None, reciprocal.flatten()]


def rmsnorm_bwd(
    gradient: Tensor,
    x: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> list[Tensor]:
    """[gradient of x, gradient of the weight]."""
    reciprocal = reciprocal.reshape(*x.shape[:-1], 1)
    normed = x.float() * reciprocal
    scaled = gradient.float() * (weight.float() + zero_centered)
    of_x = reciprocal * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    of_weight = (gradient.float() * normed).reshape(-1, x.shape[-1]).sum(0)
    return [of_x.to(x.dtype), of_weight.to(weight.dtype)]


def swiglu(x: Tensor, quantizer: Any, *_: Any) -> Any:
    gate, up = x.float().chunk(2, -1)
    result = (F.silu(gate) * up).to(x.dtype)
    return result if quantizer is None else quantize(result, quantizer)


def fused_attn_fwd(
    longest_q: int,
    longest_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    out_format: Any,
    scale_format: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: tuple[int, int],
    bottom_right: bool,
    borders: Tensor,
    borders_kv: Tensor,
    query: Any,
    key: Any,
    value: Any,
    *rest: Any,
) -> list[Tensor]:
    """Attention within packed sequences: [result, log normalisers [tokens, heads, 1], no state]."""
    causal = _check_attention(dropout, layout, mask, (query, key, value))
    _check_gaps((rest[1], borders), (rest[2], borders_kv))
    parts = [
        _attend(query[rows], key[columns], value[columns], scale, causal)
        for rows, columns in _pairs(borders, borders_kv)
    ]
    result, normalisers = map(torch.cat, zip(*parts, strict=True))
    return [result, normalisers[..., None], torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q: int,
    longest_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    out_format: Any,
    gradient_format: Any,
    gradients_layout: Any,
    scale_format: Any,
    gradient_scale_format: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: tuple[int, int],
    bottom_right: bool,
    deterministic: bool,
    borders: Tensor,
    borders_kv: Tensor,
    query: Any,
    key: Any,
    value: Any,
    out: Tensor,
    gradient: Tensor,
    dtype: Any,
    saved: list[Tensor],
    *rest: Any,
) -> list[Tensor | None]:
    """Gradients of query, key and value; none of a bias and of an offset.

    `out` and the normalisers in `saved` may be of attention to more keys than these: this is the
    share that these have in the gradients.
    """
    causal = _check_attention(dropout, layout, mask, (query, key, value))
    _check_gaps((rest[0], borders), (rest[1], borders_kv))
    gradient = gradient.reshape(out.shape)
    parts = [
        _attend_backward(
            *(query[rows], key[columns], value[columns]),
            *(out[rows], gradient[rows], saved[0][rows, :, 0]),
            scale,
            causal,
        )
        for rows, columns in _pairs(borders, borders_kv)
    ]
    return [*map(torch.cat, zip(*parts, strict=True)), None, None]


def _check_attention(dropout: float, layout: Any, mask: Any, inputs: Any) -> bool:
    """Whether attention is causal; refuse what is not packed sequences."""
    masks = {
        NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK: True,
        NVTE_Mask_Type.NVTE_PADDING_MASK: False,
    }
    packed = layout.name.startswith("NVTE_T")
    if mask not in masks or not packed or dropout or any(map(formats.is_quantized, inputs)):
        raise NotImplementedError(f"attention of {layout!r} with {mask!r}: not in the stand-in")
    return masks[mask]


def _check_gaps(*borders: tuple[Tensor | None, Tensor]) -> None:
    for padded, real in borders:
        if padded is not None and padded is not real and not torch.equal(padded, real):
            raise NotImplementedError("attention with gaps between sequences: not in the stand-in")


def _pairs(borders: Tensor, borders_kv: Tensor) -> list[tuple[slice, slice]]:
    """Where the queries of each sequence are, and its keys."""
    both = zip(_sequences(borders), _sequences(borders_kv), strict=True)
    return [(slice(*rows), slice(*columns)) for rows, columns in both]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of [q, heads, d] to [k, heads, d]: the same, and log normalisers [q, heads]."""
    scores, _, values = _scores(query, key, value, scale, causal)
    normalisers = scores.logsumexp(-1)
    probabilities = (scores - normalisers[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", probabilities, values).to(query.dtype), normalisers.t()


def _attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gradient: Tensor,
    normalisers: Tensor,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """Gradients of query, key and value."""
    scores, keys, values = _scores(query, key, value, scale, causal)
    gradient = gradient.float()
    probabilities = (scores - normalisers.t()[..., None]).exp()
    of_probabilities = torch.einsum("qhd,khd->hqk", gradient, values)
    mean = (gradient * out.float()).sum(-1).t()[..., None]
    of_scores = scale * probabilities * (of_probabilities - mean)
    gradients = [
        torch.einsum("hqk,khd->qhd", of_scores, keys),
        torch.einsum("hqk,qhd->khd", of_scores, query.float()),
        torch.einsum("hqk,qhd->khd", probabilities, gradient),
    ]
    return [
        x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
        for x, like in zip(gradients, (query, key, value), strict=True)
    ]


def _scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [heads, q, k]; keys and values in fp32, one for each head of the queries."""
    shared = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(shared, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores, keys, values


# Of context parallel ranks: each holds two parts of every sequence, its first half and its second.


def thd_read_half_tensor(tokens: Tensor, borders: Tensor, half: int) -> Tensor:
    """One half of each sequence of [tokens, ...]."""
    return torch.cat([tokens[rows] for rows, _ in _halves(borders, half)])


def thd_read_second_half_lse(
    normalisers: Tensor, borders: Tensor, packed: bool, length: int
) -> Tensor:
    """[heads, tokens] -> [heads, `length`], those of the second halves."""
    assert packed
    halves = torch.cat([normalisers[:, rows] for rows, _ in _halves(borders, 1)], 1)
    assert halves.shape[1] == length
    return halves


def thd_second_half_lse_correction(
    normalisers: Tensor, of_step: Tensor, borders: Tensor, packed: bool
) -> None:
    """Add attention to more keys, in the second halves, to log normalisers [heads, tokens]."""
    assert packed
    for rows, places in _halves(borders, 1):
        normalisers[:, rows] = torch.logaddexp(normalisers[:, rows], of_step[:, places])


def thd_out_correction(
    out: Tensor,
    of_step: Tensor,
    normalisers: Tensor,
    normalisers_of_step: Tensor,
    borders: Tensor,
    second_halves: bool,
    packed: bool,
) -> None:
    """Add the results of attention to some of the keys, each with its share in all."""
    assert packed
    whole = [(slice(None), slice(None))]
    for rows, places in _halves(borders, 1) if second_halves else whole:
        share = (normalisers_of_step[:, places] - normalisers[:, rows]).exp().t()[..., None]
        out[rows] += (of_step[places] * share).to(out.dtype)


def thd_grad_correction(
    gradient: Tensor, of_step: Tensor, borders: Tensor, first: str, second: str
) -> None:
    """Add to each half of the sequences, overwrite it, or leave it ("add", "copy", "none").

    `of_step` has what there is for both halves, or for the one that is not left.
    """
    both = "none" not in (first, second)
    for half, what in enumerate((first, second)):
        for rows, places in _halves(borders, half) if what != "none" else ():
            new = of_step[rows if both else places]
            gradient[rows] = gradient[rows] + new if what == "add" else new


def _halves(borders: Tensor, half: int) -> list[tuple[slice, slice]]:
    """Where a half of each sequence is, and where among the halves alone."""
    halves = []
    for start, end in _sequences(borders):
        edges = (start, (start + end) // 2, end)
        halves.append((slice(*edges[half : half + 2]), slice(start // 2, end // 2)))
    return halves


def convert_thd_to_bshd(tokens: Tensor, borders: Tensor, batch: int, longest: int) -> Tensor:
    """[tokens, ...], one sequence after the other, -> [batch, longest, ...], padded with zeros."""
    padded = tokens.new_zeros(batch, longest, *tokens.shape[1:])
    for row, (start, end) in enumerate(_sequences(borders)):
        padded[row, : end - start] = tokens[start:end]
    return padded


def convert_bshd_to_thd(padded: Tensor, borders: Tensor, count: int) -> Tensor:
    """The inverse of `convert_thd_to_bshd`."""
    tokens = padded.new_zeros(count, *padded.shape[2:])
    for row, (start, end) in enumerate(_sequences(borders)):
        tokens[start:end] = padded[row, : end - start]
    return tokens


def _sequences(borders: Tensor) -> list[tuple[int, int]]:
    edges = borders.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def fused_rope_forward(x: Tensor, frequencies: Tensor, *settings: Any) -> Tensor:
    return _rotate(x, frequencies, 1, *settings)


def fused_rope_backward(gradient: Tensor, frequencies: Tensor, *settings: Any) -> Tensor:
    return _rotate(gradient, frequencies, -1, *settings)


def _rotate(
    x: Tensor,
    frequencies: Tensor,
    direction: int,
    starts: Tensor | None,
    layout: Any,
    interleaved: bool,
    borders: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Rotary position embedding of packed sequences, [tokens, heads, d].

    With context parallelism the tokens are this rank's, and the borders those of whole sequences.
    """
    if starts is not None or interleaved or layout != NVTE_QKV_Format.NVTE_THD or borders is None:
        raise NotImplementedError("this rotary position embedding: not in the stand-in")
    angles = frequencies.reshape(frequencies.shape[0], -1)
    lengths = [end - start for start, end in _sequences(borders)]
    places = torch.cat([_places(length, cp_size, cp_rank) for length in lengths])
    angles = angles[places][:, None]
    turned, rest = x.split([angles.shape[-1], x.shape[-1] - angles.shape[-1]], -1)
    first, second = turned.float().chunk(2, -1)
    quarter = torch.cat([-second, first], -1)
    result = turned.float() * angles.cos() + direction * quarter * angles.sin()
    return torch.cat([result.to(x.dtype), rest], -1)


def _places(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Positions in a sequence of the tokens that a context parallel rank holds."""
    if cp_size == 1:
        return torch.arange(length)
    parts = torch.arange(length).chunk(2 * cp_size)
    return torch.cat([parts[cp_rank], parts[2 * cp_size - 1 - cp_rank]])


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of Adam on (gradients, parameters, means, variances); AdamW if `decoupled`."""
    correction1, correction2 = (1 - beta**step if bias_correction else 1 for beta in (beta1, beta2))
    for gradient, parameter, mean, variance in zip(*lists, strict=True):
        gradient, value = gradient.float(), parameter.float()
        if not decoupled:
            gradient = gradient + weight_decay * value
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        variance.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / correction1) / ((variance / correction2).sqrt() + eps)
        if decoupled:
            update = update + weight_decay * value
        parameter.copy_(value - lr * update)


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([x.float().norm() for x in lists[0]] or [torch.zeros(())])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(
    chunk_size: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], scale: float | Tensor
) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale
