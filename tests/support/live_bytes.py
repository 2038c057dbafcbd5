"""Bytes of the tensors that live at one time, on a CPU, whose allocator does not tell."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Gloo's threads let go of the tensors of a collective a moment after it has ended.
LET_GO_SECONDS = 5.0


class LiveBytes(TorchDispatchMode):
    """Follows every tensor that operators return: `peak` is the most that lived at one time.

    The storages of `beside` are left out, and so are tensors above `limit` that only threads of
    collectives still have: what is held for longer than `LET_GO_SECONDS` counts.
    """

    def __init__(self, beside: Iterable[torch.Tensor], limit: float = math.inf) -> None:
        super().__init__()
        self.peak = 0
        self._limit = limit
        self._beside = {tensor.untyped_storage()._cdata for tensor in beside}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._beside:
                entry = (StorageWeakRef(storage), storage.nbytes())
                self._held.setdefault(storage._cdata, entry)
        live = self._live()
        deadline = time.monotonic() + LET_GO_SECONDS
        while live > self._limit >= self.peak and time.monotonic() < deadline:
            time.sleep(0.001)
            live = self._live()
        self.peak = max(self.peak, live)
        return result

    def _live(self) -> int:
        self._held = {k: held for k, held in self._held.items() if not held[0].expired()}
        return sum(size for _, size in self._held.values())
