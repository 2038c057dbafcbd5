"""Gives the memory of tensors on a device back for a while; their values wait on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def offloaded(kept: Iterable[Tensor], forgotten: Iterable[Tensor] = ()) -> Iterator[None]:
    """Keep no memory on the device for these tensors, nor for any that shares theirs.

    Tensors stay the same objects, views stay views: their storage is empty within the context,
    where nobody may use them, and has its bytes again behind it.

    Args:
        kept: have their values again behind the context.
        forgotten: have any values behind it.
    """
    storages = _storages(kept)
    empty = [s for p, s in _storages(forgotten).items() if p not in storages]
    sizes = [storage.nbytes() for storage in (*storages.values(), *empty)]
    copies = [_copy_on_host(_bytes_of(storage)) for storage in storages.values()]
    for storage in (*storages.values(), *empty):
        storage.resize_(0)
    _give_back()
    try:
        yield
    finally:
        for storage, size in zip((*storages.values(), *empty), sizes, strict=True):
            storage.resize_(size)
        for storage, copy in zip(storages.values(), copies, strict=True):
            _bytes_of(storage).copy_(copy)


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Storages by address, each once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _copy_on_host(content: Tensor) -> Tensor:
    return torch.empty(content.shape, dtype=content.dtype, pin_memory=content.is_cuda).copy_(
        content
    )


def _give_back() -> None:
    """Return the memory to the device, for another process to take."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB a thread on Hopper, made again when needed
        torch.cuda.empty_cache()
