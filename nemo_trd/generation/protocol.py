"""The protocol by which the loop asks for samples, whatever runs behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from nemo_trd.config.schema import Sampling
from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.generation.pending import Pending

if TYPE_CHECKING:
    import torch


class GenerationFailed(RuntimeError):
    """The generators cannot go on, for a reason that lies with them: servers are gone, or refuse.

    What has been trained is whole and can be saved.
    """


Done = Callable[[int, Completion], None]  # (position of the request, its completion)


class Generator(Protocol):
    """Samples continuations of token sequences."""

    weight_version: int  # of the weights that sample; 0 for a frozen teacher

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        description: str,
        done: Done | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests.

        A completion depends on its request, the sampling and the weights, not on what else is
        asked for at the same time. `description` says in progress bars and errors what is
        generated ("rollouts", "refinements", ...). `done` hears of each as soon as it is there.
        """
        ...

    async def stream(
        self, requests: Sequence[Pending], sampling: Sampling, description: str, done: Done
    ) -> None:
        """Complete requests that become known in any order; `done` hears of each completion.

        The completions are those of `generate`. Servers take a request as soon as it is known; a
        generator that works in batches waits for all of them.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by full tensors under their Hugging Face names."""
        ...


def request_seed(*parts: int | str) -> int:
    """A seed in 0 .. 2**63 - 1 that is a pure function of what the sample is for.

    For example `request_seed(run_seed, "rollout", step, prompt.index, sample_index)`: distinct
    parts give independent seeds, and no order or batch enters.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
