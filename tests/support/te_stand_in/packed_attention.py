"""Attention of the stand-in: of padded and packed sequences, and of their parts on several ranks.

Scores and their normalisers are in fp32. Results and gradients are those of a part of the keys too:
then the normalisers, and in the backward pass the result, are those of all keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequences(borders: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each packed sequence."""
    edges = borders.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    borders_kv: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """[t, heads, d] -> results of that shape, log normalisers fp32 [t, heads, 1]."""
    result = torch.zeros_like(query)
    normalisers = query.new_zeros(*query.shape[:2], 1, dtype=torch.float32)
    for (start, end), (first, last) in zip(sequences(borders), sequences(borders_kv), strict=True):
        q, k, v = _by_head(query[start:end], key[first:last], value[first:last])
        scores = _scores(q, k, scale, causal)
        log_sums = scores.logsumexp(-1, keepdim=True)
        result[start:end] = ((scores - log_sums).exp() @ v).transpose(0, 1).to(query.dtype)
        normalisers[start:end] = log_sums.transpose(0, 1)
    return result, normalisers


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    borders_kv: Tensor,
    scale: float,
    causal: bool,
    result: Tensor,
    normalisers: Tensor,
    gradient: Tensor,
) -> list[Tensor]:
    """Gradients of query, key and value."""
    gradients = [torch.zeros_like(x) for x in (query, key, value)]
    for (start, end), (first, last) in zip(sequences(borders), sequences(borders_kv), strict=True):
        own, seen = slice(start, end), slice(first, last)
        q, k, v = _by_head(query[own], key[seen], value[seen])
        out, of_out = (x[own].float().transpose(0, 1) for x in (result, gradient))
        log_sums = normalisers[own].transpose(0, 1)
        probabilities = (_scores(q, k, scale, causal) - log_sums).exp()
        of_scores = of_out @ v.transpose(1, 2) - (of_out * out).sum(-1, keepdim=True)
        of_scores = probabilities * of_scores * scale
        parts = of_scores @ k, of_scores.transpose(1, 2) @ q, probabilities.transpose(1, 2) @ of_out
        for whole, rows, part in zip(gradients, (own, seen, seen), parts, strict=True):
            by_group = part.transpose(0, 1).unflatten(1, (whole.shape[1], -1))
            whole[rows] = by_group.sum(2).to(whole.dtype)
    return gradients


def _by_head(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """fp32 [heads, n, d] of each, keys and values once for every head of queries."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    return [x.float().transpose(0, 1) for x in (query, key, value)]


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    scores = query @ key.transpose(1, 2) * scale
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf"))


# What TransformerEngine's AttnFuncWithCPAndKVP2P calls between attention to the parts that come
# around. Of each sequence a rank has two parts of equal length; normalisers are [heads, t].


def _half(borders: Tensor, half: int) -> Tensor:
    """Places of the first or second half of each sequence."""
    middles = [(start, (start + end) // 2, end) for start, end in sequences(borders)]
    return torch.cat([torch.arange(*edges[half : half + 2]) for edges in middles])


def thd_read_half_tensor(tokens: Tensor, borders: Tensor, half: int) -> Tensor:
    return tokens[_half(borders, half)]


def thd_read_second_half_lse(
    normalisers: Tensor, borders: Tensor, packed: bool, length: int
) -> Tensor:
    assert packed
    return normalisers[:, _half(borders, 1)]


def thd_second_half_lse_correction(
    normalisers: Tensor, of_part: Tensor, borders: Tensor, packed: bool
) -> None:
    assert packed
    rows = _half(borders, 1)
    normalisers[:, rows] = torch.logaddexp(normalisers[:, rows], of_part)


def thd_out_correction(
    result: Tensor,
    of_part: Tensor,
    normalisers: Tensor,
    normalisers_of_part: Tensor,
    borders: Tensor,
    only_second_half: bool,
    packed: bool,
) -> None:
    assert packed
    rows = _half(borders, 1) if only_second_half else torch.arange(len(result))
    share = (normalisers_of_part - normalisers[:, rows]).exp().t()[..., None]
    result[rows] += (of_part.view(len(rows), *result.shape[1:]) * share).to(result.dtype)


def thd_grad_correction(
    gradient: Tensor, of_part: Tensor, borders: Tensor, first: str, second: str
) -> None:
    """Add or copy the gradient that a part gives to both halves, or to one: that is all it has."""
    halves = [(half, what) for half, what in enumerate((first, second)) if what != "none"]
    for half, what in halves:
        rows = _half(borders, half)
        found = of_part[rows] if len(halves) == 2 else of_part
        gradient[rows] = found + (gradient[rows] if what == "add" else 0)
