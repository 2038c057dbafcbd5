"""Training rows of the warm start, in exactly the texts that a run makes of the templates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerFast

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import RefinementTemplates
from nemo_trd.data.templates import fill_template
from nemo_trd.toy import derivations, task
from nemo_trd.toy.tokenizer import unknown_words

IGNORED = -100  # a position without a label


class Row(NamedTuple):
    """Token ids. Nothing is learnt at `unlearnt`, which are indices into `labels`."""

    context: list[int]
    labels: list[int]
    unlearnt: tuple[int, ...] = ()


def check_templates(templates: RefinementTemplates) -> None:
    """Refuse templates that the tokenizer cannot spell.

    Raises:
        ConfigError: naming the template and its unknown words.
    """
    nothing = {"problem": "", "rollout": "", "reference_solution": ""}
    for name, template in templates.model_dump().items():
        if template is not None and (unknown := unknown_words(fill_template(template, **nothing))):
            raise rule_broken(
                f"refinement.templates.{name}",
                template,
                f"the toy's vocabulary has no {', '.join(unknown)}",
                "use other words, or add these to INSTRUCTIONS in nemo_trd/toy/tokenizer.py",
            )


class RowMaker:
    """Makes training rows of each kind from warm-start problems.

    solve: problem -> solution. recover: problem -> solution with slips, but nothing is learnt at
    the wrong numbers themselves. rewrite: problem and attempt -> solution. follow: problem and
    reference solution -> solution. follow_attempt: all three -> solution. A kind may end with the
    number of products of its problems: solve@24. A row has one order of the products: a rewrite
    keeps that of the attempt.

    Args:
        noticed: how often a slip is taken back.
        orders: weights of the first orders (nemo_trd/toy/derivations.py); rows have no other.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        templates: RefinementTemplates,
        noticed: float = task.NOTICED,
        orders: Sequence[int] = (1,),
    ) -> None:
        check_templates(templates)
        self.tokenizer = tokenizer
        self.noticed = noticed
        self.orders = orders
        self.system = templates.system
        self.templates = {
            "rewrite": templates.opd,
            "follow": templates.privileged_prompt,
            "follow_attempt": templates.opsd,
        }

    def row(self, kind: str, rng: random.Random) -> Row:
        """One row; the attempt that is shown has 0 to 3 errors."""
        return self._row(kind, rng)[0]

    def right_rows(self, kind: str, rng: random.Random) -> list[Row]:
        """As `row`, once for each order; of the kind "recover" in one order alone, as `row`."""
        row, factors = self._row(kind, rng)
        if kind.startswith("recover"):
            return [row]
        orders = derivations.first_orders(len(factors), len(self.orders))
        solutions = (derivations.solution(factors, order) for order in orders)
        return [Row(row.context, self.labels(solution)) for solution in solutions]

    def _row(self, kind: str, rng: random.Random) -> tuple[Row, task.Factors]:
        kind, _, products = kind.partition("@")
        factors = task.draw_problem(rng, "warm_start", int(products or task.USUAL))
        order = derivations.draw_order(rng, len(factors), self.orders)
        problem, ordered = task.problem_text(factors), derivations.reordered(factors, order)
        if kind == "recover":
            text, wrong = task.slips(ordered, rng, self.noticed)
            labels = self.labels(derivations.relabelled(text, order))
            return Row(self.context("solve", problem, "", ""), labels, wrong), factors
        solution = derivations.solution(factors, order)
        errors = rng.choices((0, 1, 2, 3), weights=(30, 30, 25, 15))[0]
        attempt = task.corrupted(ordered, rng, errors, self.noticed)
        rollout = derivations.relabelled(attempt, order)
        context = self.context(kind, problem, rollout, solution)
        return Row(context, self.labels(solution)), factors

    def context(self, kind: str, problem: str, rollout: str, solution: str) -> list[int]:
        """Token ids before the labels, the generation prompt included."""
        messages = [{"role": "user", "content": problem}]
        if kind != "solve":
            fields = {"problem": problem, "rollout": rollout, "reference_solution": solution}
            messages[0]["content"] = fill_template(self.templates[kind], **fields)
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": self.system})
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return cast(list[int], ids)

    def labels(self, solution: str) -> list[int]:
        """The solution and the EOS token."""
        return [*self.tokenizer(solution).input_ids, self.tokenizer.eos_token_id]


def as_tensors(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and next-token labels, both int64 [rows, longest - 1]."""
    length = max(len(row.context) + len(row.labels) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, (context, labels, unlearnt) in enumerate(rows):
        end = len(context) + len(labels)
        tokens[i, :end] = torch.tensor(context + labels)
        targets[i, len(context) : end] = torch.tensor(labels)
        targets[i, [len(context) + place for place in unlearnt]] = IGNORED
    return tokens[:, :-1], targets[:, 1:]
