"""Sampling whose randomness belongs to the request, not to the batch.

A token is drawn by the Gumbel-max trick: argmax(log p + Gumbel noise) is an exact sample of p.
The noise of a candidate is a hash of (seed of the request, position in the completion, token
id), computed for the whole batch in a few vector operations. No generator state exists, so the
composition and the order of batches cannot matter, and resuming needs nothing.
"""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessor

from nemo_trd.config.schema import Sampling

# The increment and the multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as
# signed integers: torch wraps int64 arithmetic around, which is arithmetic modulo 2**64.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_NUCLEUS_GUESS = 1024  # candidates among which top-p is looked for before everything is sorted
_CHUNK_ELEMENTS = 1 << 20  # noise over a whole vocabulary is made for so many logits at a time


def _wrap(number: int) -> int:
    """The signed 64-bit integer that equals `number` modulo 2**64."""
    return (number + 2**63) % 2**64 - 2**63


def _shift_right(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift; torch's own copies the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: every output bit depends on every input bit. int64, in place."""
    bits ^= _shift_right(bits, 30)
    bits *= _MULTIPLIERS[0]
    bits ^= _shift_right(bits, 27)
    bits *= _MULTIPLIERS[1]
    bits ^= _shift_right(bits, 31)
    return bits


def seed_tensor(seeds: list[int], device: torch.device) -> torch.Tensor:
    """Seeds of any size as int64 [b]."""
    return torch.tensor([_wrap(seed) for seed in seeds], dtype=torch.int64, device=device)


def gumbel_noise(seeds: torch.Tensor, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [b, n], of candidates `token_ids` ([b, n] or [n]).

    `seeds` is int64 [b]. -log(-log1p(-u)) with u in steps of 2**-53 keeps the upper tail, which
    decides between many improbable tokens, at full precision in float32.
    """
    keys = _mix(_mix(seeds + _INCREMENT) + _wrap(position * _INCREMENT))
    bits = _mix(keys[:, None] + token_ids * _INCREMENT)
    uniform = _shift_right(bits, 11).to(torch.float32).add_(0.5).mul_(2.0**-53)
    uniform.clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def sample(
    logits: torch.Tensor, seeds: torch.Tensor, position: int, sampling: Sampling
) -> torch.Tensor:
    """Draw one token id per row of float32 logits [b, v]: int64 [b].

    Temperature first, then min-p, then top-k, then top-p of what that left, as servers do it.
    `sampling.temperature` must be above 0.
    """
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        least = logits.amax(1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    vocabulary = logits.shape[1]
    if sampling.top_k:
        values, ids = logits.topk(min(sampling.top_k, vocabulary))
        values = _keep_nucleus(values, values.logsumexp(1, keepdim=True), sampling.top_p)
    elif sampling.top_p < 1:
        values, ids = _nucleus_of_all(logits, sampling.top_p)
    else:
        return _sample_from_all(logits, seeds, position)
    best = (values + gumbel_noise(seeds, position, ids)).argmax(1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def _keep_nucleus(values: torch.Tensor, log_total: torch.Tensor, top_p: float) -> torch.Tensor:
    """-inf for candidates that are not needed to reach `top_p`. `values` [b, n] descend."""
    if top_p >= 1:
        return values
    probs = (values - log_total).exp()
    mass_before = probs.cumsum(1) - probs
    mass_before[:, 0] = 0  # the most probable token always stays
    return values.masked_fill(mass_before >= top_p, -torch.inf)


def _nucleus_of_all(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_total = logits.logsumexp(1, keepdim=True)
    values, ids = logits.topk(min(_NUCLEUS_GUESS, logits.shape[1]))
    reached = (values - log_total).exp().sum(1)
    if values.shape[1] < logits.shape[1] and bool((reached < top_p).any()):
        values, ids = logits.sort(descending=True)
    return _keep_nucleus(values, log_total, top_p), ids


def _sample_from_all(logits: torch.Tensor, seeds: torch.Tensor, position: int) -> torch.Tensor:
    ids = torch.arange(logits.shape[1], device=logits.device)
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    chunks = zip(logits.split(rows), seeds.split(rows), strict=True)
    return torch.cat([(part + gumbel_noise(s, position, ids)).argmax(1) for part, s in chunks])


def penalized(
    logits: torch.Tensor, prompts: torch.Tensor, generated: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """Logits [b, v] after the penalties of `sampling`; the same tensor where both are off.

    Args:
        prompts: int64 [b, p], every prompt's tokens in any order and number.
        generated: int64 [b, n], what each row has so far.
    """
    factor, taken_off = sampling.repetition_penalty, sampling.presence_penalty
    if factor != 1:
        there = _marked(torch.cat([prompts, generated], 1), logits)
        weaker = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(there, weaker, logits)
    if taken_off != 0:
        logits = logits - taken_off * _marked(generated, logits)
    return logits


def _marked(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """bool [b, v]: where a row has the token."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, token_ids, True)


class SeededSampler(LogitsProcessor):
    """Makes greedy decoding sample: raises the drawn token of every row to +inf.

    With `temperature: 0` it leaves the logits alone, but for penalties. `saw_nan` (bool []) is set
    by logits that are not a number. `mask` [b, p] is 0 where a prompt is padded.
    """

    def __init__(
        self, seeds: torch.Tensor, prompts: torch.Tensor, mask: torch.Tensor, sampling: Sampling
    ) -> None:
        self.seeds = seeds
        self.prompt_width = prompts.shape[1]
        # Padding is no token of the prompt: its last one, which is none, stands there instead.
        self.prompts = torch.where(mask.bool(), prompts, prompts[:, -1:])
        self.sampling = sampling
        self.saw_nan = torch.zeros((), dtype=torch.bool, device=seeds.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.saw_nan |= scores[:, 0].isnan().any()
        scores = penalized(scores, self.prompts, input_ids[:, self.prompt_width :], self.sampling)
        if self.sampling.temperature == 0:
            return scores
        position = input_ids.shape[1] - self.prompt_width
        drawn = sample(scores, self.seeds, position, self.sampling)
        return scores.scatter(1, drawn[:, None], torch.inf)
