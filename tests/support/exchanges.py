"""What fake ranks ask of their communicators, and whether real ones would get through with it.

NCCL runs what a rank asks of a communicator in the order in which it was asked, and needs all
members for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# An exchange by kind, members, and its number among those: its partners name it alike.
Exchange = tuple[str, tuple[int, ...], int]


class Exchanges:
    """Notes what a rank asks of its communicators, batch by batch, in order."""

    def __init__(self) -> None:
        self.asked: list[list[Exchange]] = []
        self._numbers: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._in_batch = False

    def note(self, kind: str, members: tuple[int, ...]) -> None:
        number = self._numbers[kind, members]
        self._numbers[kind, members] += 1
        if not self._in_batch:
            self.asked.append([])
        self.asked[-1].append((kind, members, number))

    def one_batch(self, original: Any) -> Any:
        def batch(operations: Any) -> Any:
            self.asked.append([])
            self._in_batch = True
            works = original(operations)
            self._in_batch = False
            return works

        return batch

    def followed(self) -> Any:
        """Mode in which each operation on a process group is noted."""
        import torch.distributed as dist
        from torch import ScriptObject
        from torch.utils._python_dispatch import TorchDispatchMode

        exchanges = self

        class Followed(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
                if func.namespace == "c10d":
                    kind = func.overloadpacket.__name__
                    group = next(a for a in args if isinstance(a, ScriptObject))
                    members = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
                    if kind in ("send", "recv_"):
                        peer, me = members[args[2]], dist.get_rank()
                        pair = (me, peer) if kind == "send" else (peer, me)
                        kind, members = f"to one of {len(members)}", pair
                    exchanges.note(kind, members)
                return func(*args, **(kwargs or {}))

        return Followed()


def check_no_circle(ranks: Sequence[list[list[Exchange]]], name: str) -> None:
    """Let each rank run one batch after the other, as far as the partners in it have come."""
    left = [list(asked) for asked in ranks]
    done: set[Exchange] = set()
    while any(left):
        running = Counter(key for asked in left if asked for key in asked[0])
        done |= {key for key, members in running.items() if members == len(key[1])}
        ready = [asked for asked in left if asked and done.issuperset(asked[0])]
        assert ready, f"{name}: all wait: {[asked[:1] for asked in left]}"
        for asked in ready:
            del asked[0]
