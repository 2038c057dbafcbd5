"""Servers and trainer on the same GPUs, one after the other (`generation.colocate`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch.distributed as dist

from nemo_trd.distributed.exchange import fail_together
from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.generation.sleep import PARTS, SleepingServers
from nemo_trd.megatron.student import Student

log = logging.getLogger(__name__)

Turn: TypeAlias = Callable[[], AbstractContextManager[None]]  # within it servers may be asked


class Turns:
    """Whose turn it is: the trainer's, but within `generating`. All methods are collective.

    The first rank asks the servers. When servers fail, all ranks raise GenerationFailed, with the
    trainer's memory in its place: what has been trained can be saved.

    Args:
        servers: by role, awake. They are put to sleep at once.
    """

    def __init__(self, student: Student, servers: Mapping[str, SleepingServers]) -> None:
        self._student = student
        self._servers = servers
        self._ask(self._sleep)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The servers' turn: the trainer holds no memory of weights, gradients and optimizer."""
        with self._student.offloaded():
            dist.barrier()  # every rank has given back
            try:
                self._ask(self._wake)
                yield
            except BaseException:
                self._sleep_if_possible()
                raise
            self._ask(self._sleep)

    def make_room_for_new_weights(self) -> None:
        """Wake the weights of the student's servers beside the trainer's, until their next turn."""
        self._ask(lambda: self._servers["student"].wake("weights"))

    def _wake(self) -> None:
        for servers in self._servers.values():
            servers.wake(*PARTS)

    def _sleep(self) -> None:
        for servers in self._servers.values():
            servers.sleep()

    def _sleep_if_possible(self) -> None:
        """Not collective: ranks may have failed one by one."""
        if dist.get_rank() == 0:
            try:
                self._sleep()
            except GenerationFailed as error:
                log.warning("servers do not give the memory of the GPUs back: %s", error)

    def _ask(self, action: Callable[[], object]) -> None:
        """Do something on the first rank, while the others wait."""

        def share() -> list[None]:
            if dist.get_rank() == 0:
                action()
            return []

        fail_together(share)
