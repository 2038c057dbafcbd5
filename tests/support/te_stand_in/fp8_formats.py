"""FP8 tensors of TransformerEngine on a CPU: quantisation and the value of a stored tensor.

TransformerEngine's own Python has the containers and says what is stored where; the arithmetic
here is what its CUDA kernels document. A tensor is stored by rows, by columns, or both:

    quantiser                       scales                        by columns
    Float8Quantizer                 one, of earlier maxima        a transposed copy
    Float8CurrentScalingQuantizer   one, of the tensor itself     a transposed copy
    Float8BlockQuantizer            of 1 x 128 or 128 x 128       a transposed copy, own scales
    MXFP8Quantizer                  of 32 in a row or a column,   own data and scales
                                    powers of two (E8M0)
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class DType(enum.IntEnum):
    """Types of elements, numbered as in TransformerEngine's header."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


BLOCK, MX_BLOCK = 128, 32
E8M0_BIAS = 127
TORCH_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor holds FP8 data."""
    return hasattr(tensor, "_fp8_dtype")


def matrix(tensor: Any, *, by_rows: bool) -> Tensor:
    """Value of a tensor as [rows, columns], from the copy that a kernel would read.

    Raises:
        RuntimeError: that copy is not there.
    """
    if not is_quantized(tensor):
        return tensor.reshape(-1, tensor.shape[-1])
    dtype = TORCH_DTYPES[tensor._fp8_dtype]
    if hasattr(tensor, "_scale_inv"):
        data = tensor._data if by_rows else tensor._transpose
        transposed, scales = not by_rows, tensor._scale_inv
    else:
        data = tensor._rowwise_data if by_rows else tensor._columnwise_data
        scales = tensor._rowwise_scale_inv if by_rows else tensor._columnwise_scale_inv
        transposed = not by_rows and hasattr(tensor, "_is_2D_scaled")
    if data is None:
        raise RuntimeError(
            f"{type(tensor).__name__} has no data by {'rows' if by_rows else 'columns'}"
        )
    if transposed:
        values = data.reshape(data.shape[0], -1).view(dtype).float()
    else:
        values = data.reshape(-1, data.shape[-1]).view(dtype).float()
    values = values * _spread(tensor, scales, values.shape, by_rows)
    return values.t() if transposed else values


def _spread(tensor: Any, scales: Tensor, shape: torch.Size, by_rows: bool) -> Tensor:
    """The scales of stored data, one for each element (or one for all)."""
    if hasattr(tensor, "_scale_inv"):
        return scales
    rows, columns = shape
    if not hasattr(tensor, "_is_2D_scaled"):
        factors = torch.exp2(scales.float() - E8M0_BIAS)
        spread = factors.repeat_interleave(MX_BLOCK, dim=1 if by_rows else 0)
    elif tensor._is_2D_scaled:
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    else:  # [blocks, rows]
        spread = scales.t().repeat_interleave(BLOCK, 1)
    return spread[:rows, :columns]


def empty(quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A quantised tensor whose data are not set, of the class that the quantiser makes.

    Raises:
        NotImplementedError: a quantiser that the stand-in does not know.
    """
    from transformer_engine.pytorch import tensor as te

    kind = type(quantizer).__name__
    layout = {"shape": shape, "dtype": dtype, "device": torch.device("cpu")}
    fields: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    rows, columns = quantizer.rowwise_usage, quantizer.columnwise_usage
    by_columns = quantizer.get_columnwise_shape(tuple(shape))

    def byte(size: Any, wanted: bool) -> Tensor | None:
        return torch.zeros(tuple(size), dtype=torch.uint8) if wanted else None

    if kind in ("Float8Quantizer", "Float8CurrentScalingQuantizer"):
        fields |= {"data": byte(shape, rows), "data_transpose": byte(by_columns, columns)}
        fields["fp8_scale_inv"] = torch.ones(1)
        whole, internal = te.Float8Tensor, te.Float8TensorStorage
    else:
        if kind == "Float8BlockQuantizer":
            fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
            scale_dtype = torch.float32
            whole, internal = te.Float8BlockwiseQTensor, te.Float8BlockwiseQTensorStorage
        elif kind == "MXFP8Quantizer":
            fields["with_gemm_swizzled_scales"] = False
            scale_dtype = torch.uint8
            whole, internal = te.MXFP8Tensor, te.MXFP8TensorStorage
        else:
            raise NotImplementedError(f"the stand-in for TransformerEngine has no {kind}")
        fields |= {"rowwise_data": byte(shape, rows), "columnwise_data": byte(by_columns, columns)}
        for name, wanted in (("rowwise", rows), ("columnwise", columns)):
            size = quantizer.get_scale_shape(shape, name == "columnwise")
            fields[f"{name}_scale_inv"] = torch.zeros(size, dtype=scale_dtype) if wanted else None
    if quantizer.internal:
        return internal(fake_dtype=dtype, **fields)
    return whole(**layout, **fields)


def quantize(tensor: Tensor, quantizer: Any, output: Any) -> None:
    """Fill `output`, which `empty` made, with the FP8 data of a tensor and their scales."""
    kind = type(quantizer).__name__
    values = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    output._fp8_dtype = quantizer.dtype
    if kind == "Float8BlockQuantizer":
        _quantize_blocks(values, quantizer, output)
    elif kind == "MXFP8Quantizer":
        _quantize_mx(values, quantizer, output)
    else:
        delayed = kind == "Float8Quantizer"
        scale = _delayed_scale(values, quantizer) if delayed else _current_scale(values, quantizer)
        data = _cast(values * scale, quantizer)
        output._scale_inv.copy_(1 / scale)
        if output._data is not None:
            output._data.copy_(data.reshape(output._data.shape))
        if output._transpose is not None:
            output._transpose.copy_(data.t().reshape(output._transpose.shape))
            output._transpose_invalid = False


def _delayed_scale(values: Tensor, quantizer: Any) -> Tensor:
    """The scale that earlier steps led to; this tensor's maximum is noted for later ones."""
    quantizer.amax.copy_(torch.maximum(quantizer.amax, values.abs().max()))
    return quantizer.scale.reshape(1)


def _current_scale(values: Tensor, quantizer: Any) -> Tensor:
    amax = values.abs().max() if values.numel() else torch.zeros(())
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    return _scale(amax, quantizer).reshape(1)


def _quantize_blocks(values: Tensor, quantizer: Any, output: Any) -> None:
    square = quantizer.block_scaling_dim == 2
    for name, by_rows in (("rowwise", True), ("columnwise", False)):
        data = getattr(output, f"_{name}_data")
        if data is None:
            continue
        stored = values if by_rows else values.t()
        blocks = _padded(stored, BLOCK if square else 1, BLOCK)
        scale = _scale(blocks.abs().amax((1, 3), keepdim=True), quantizer)
        whole = _cast(blocks * scale, quantizer).flatten(2).flatten(0, 1)
        data.copy_(whole[: stored.shape[0], : stored.shape[1]].reshape(data.shape))
        inverse = (1 / scale).squeeze(3).squeeze(1)
        if not square:
            inverse = inverse.t()
        target = getattr(output, f"_{name}_scale_inv")
        target[: inverse.shape[0], : inverse.shape[1]].copy_(inverse)


def _quantize_mx(values: Tensor, quantizer: Any, output: Any) -> None:
    rows, columns = values.shape
    if rows % MX_BLOCK or columns % MX_BLOCK:
        raise RuntimeError(f"MXFP8 has blocks of {MX_BLOCK}, and the matrix is {rows} x {columns}")
    largest = torch.finfo(TORCH_DTYPES[quantizer.dtype]).max
    for name, sizes in (("rowwise", (1, MX_BLOCK)), ("columnwise", (MX_BLOCK, 1))):
        data = getattr(output, f"_{name}_data")
        if data is None:
            continue
        blocks = _padded(values, *sizes)
        amax = blocks.abs().amax((1, 3), keepdim=True)
        exponent = torch.log2((amax / largest).clamp(min=2.0**-E8M0_BIAS)).ceil()
        data.copy_(_cast(blocks * torch.exp2(-exponent), quantizer).reshape(data.shape))
        stored = (exponent + E8M0_BIAS).squeeze(3).squeeze(1).to(torch.uint8)
        target = getattr(output, f"_{name}_scale_inv")
        target[: stored.shape[0], : stored.shape[1]].copy_(stored)


def _padded(values: Tensor, height: int, width: int) -> Tensor:
    """Values in blocks, [rows / height, height, columns / width, width], padded with zeros."""
    rows, columns = values.shape
    values = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
    return values.reshape(values.shape[0] // height, height, values.shape[1] // width, width)


def _scale(amax: Tensor, quantizer: Any) -> Tensor:
    """Factors with which values of this size fill the range of the FP8 format; 1 for zeros."""
    largest = torch.finfo(TORCH_DTYPES[quantizer.dtype]).max
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale


def _cast(values: Tensor, quantizer: Any) -> Tensor:
    """Bytes of the nearest FP8 numbers; beyond the largest: the largest."""
    dtype = TORCH_DTYPES[quantizer.dtype]
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).view(torch.uint8)
