"""Servers and trainer on the same GPUs: who is asked for what, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.run.turns import Turns


class Recorded:
    """A student, and servers of two models, that write down what is asked of them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.broken = ""

    def servers(self, role: str) -> Any:
        owner = self

        class Servers:
            def wake(self, *parts: str) -> None:
                owner.note(f"{role} wakes {' '.join(parts)}")

            def sleep(self) -> None:
                owner.note(f"{role} sleeps")

        return Servers()

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self.broken:
            raise GenerationFailed(event)

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        self.note("student gives way")
        try:
            yield
        finally:
            self.note("student is back")


@pytest.fixture
def recorded(one_rank: Any) -> Recorded:
    return Recorded()


def turns_of(recorded: Recorded) -> Turns:
    servers = {role: recorded.servers(role) for role in ("student", "teacher")}
    return Turns(cast(Any, recorded), servers)


WAKE = ["student wakes weights kv_cache", "teacher wakes weights kv_cache"]
SLEEP = ["student sleeps", "teacher sleeps"]


def test_memory_is_given_before_it_is_taken(recorded: Recorded) -> None:
    turns = turns_of(recorded)
    turns.make_room_for_new_weights()
    with turns.generating():
        recorded.note("samples are drawn")
    assert recorded.events == [
        *(*SLEEP, "student wakes weights", "student gives way", *WAKE),
        *("samples are drawn", *SLEEP, "student is back"),
    ]


@pytest.mark.parametrize("broken", [WAKE[1], "samples are drawn", SLEEP[0]])
def test_the_trainer_is_back_whatever_fails(broken: str, recorded: Recorded) -> None:
    turns = turns_of(recorded)
    recorded.broken = broken
    with pytest.raises(GenerationFailed, match=broken), turns.generating():
        recorded.note("samples are drawn")
    assert recorded.events[-1] == "student is back"
    assert broken == SLEEP[0] or recorded.events[-3:-1] == SLEEP
