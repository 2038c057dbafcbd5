"""The divergences by name: what everything but their formulas knows of them. Imports no torch.

To add one: its name in `config.schema.DivergenceName`, its record here, its closed form in
`formulas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_trd.config.schema import DivergenceName, Loss


@dataclass(frozen=True)
class Divergence:
    """One divergence D(pi_T, pi_theta).

    title: its name for people.
    beta: its place between KL(pi_T || pi_theta), 0, and KL(pi_theta || pi_T), 1; None where
        `loss.beta` says it.
    workspace: number of fp32 tensors [chunk, V/tp] that its closed form holds at one time beside
        the logits of both models. Two of them are copies, which logits in fp32 at temperature 1
        do not need.
    """

    title: str
    beta: float | None
    workspace: float


DIVERGENCES: dict[DivergenceName, Divergence] = {
    "forward_kl": Divergence("forward KL", beta=0.0, workspace=7),
    "reverse_kl": Divergence("reverse KL", beta=1.0, workspace=7),
    "jsd": Divergence("JSD", beta=None, workspace=8.25),
}


def beta_of(loss: Loss) -> float:
    """Place of the loss's divergence between forward KL, 0, and reverse KL, 1."""
    beta = DIVERGENCES[loss.divergence].beta
    return loss.beta if beta is None else beta
