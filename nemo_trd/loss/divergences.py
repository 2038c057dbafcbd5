"""The divergences by name: what everything but their formulas knows of them. Imports no torch.

To add one: its name in `config.schema.DivergenceName`, its record here, its formulas in
`formulas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_trd.config.schema import DivergenceName


@dataclass(frozen=True)
class Divergence:
    """One divergence D(pi_T, pi_theta).

    title: its name for people.
    workspace: number of fp32 tensors [chunk, V/tp] that its closed form holds at one time beside
        the logits of both models.
    """

    title: str
    workspace: float


DIVERGENCES: dict[DivergenceName, Divergence] = {
    "forward_kl": Divergence("forward KL", workspace=5),
    "reverse_kl": Divergence("reverse KL", workspace=5),
    "jsd": Divergence("JSD", workspace=6.25),
}
