"""Reads pairs of rollout and rewrite that were drawn before the run, out of rows of data.train.

A column holds a text, which has ended by itself, or an object as `nemo_trd.generate` writes it:
text, token_ids, finish_reason. Token ids are taken as they are; they must be those of the text.
"""

from __future__ import annotations

from typing import Any, get_args

from nemo_trd.config.schema import Generation, StoredPairs
from nemo_trd.data.row import RowReader, shown
from nemo_trd.data.types import Completion, FinishReason, StoredPair


def stored_form(completion: Completion, text: str) -> dict[str, Any]:
    """Object that `read_pair` reads as this completion, whose text is given. For JSON."""
    return {
        "text": text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def read_pair(
    reader: RowReader, generation: Generation, stored: StoredPairs, tokenizer: Any
) -> StoredPair:
    """Pair of a row.

    Args:
        generation: whose `max_tokens` hold for stored samples, too.
        tokenizer: the student's.

    Raises:
        BadRow: a sample is missing, too long, or not made of this tokenizer's tokens.
    """
    limit = generation.rollout.max_tokens
    rollout = _completion(reader, "rollout", stored.rollout, limit, tokenizer)
    column = stored.refinement
    if column is None or reader.value("refinement", column) is None:
        return StoredPair(rollout, None)
    limit = generation.refinement.max_tokens
    return StoredPair(rollout, _completion(reader, "refinement", column, limit, tokenizer))


def _completion(
    reader: RowReader, key: str, column: str, max_tokens: int, tokenizer: Any
) -> Completion:
    value = reader.value(key, column)
    if isinstance(value, dict):
        completion = _of_tokens(reader, key, column, value, tokenizer)
    else:
        completion = _of_text(reader, key, column, tokenizer)
    if len(completion.token_ids) > max_tokens:
        rule = (
            f"it has {len(completion.token_ids)} tokens, more than generation.{key}.max_tokens = "
            f"{max_tokens}"
        )
        raise reader.bad(key, column, value, rule)
    return completion


def _of_text(reader: RowReader, key: str, column: str, tokenizer: Any) -> Completion:
    """A text, and the EOS token behind it."""
    text = reader.text(key, column)
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(token_ids) & set(tokenizer.all_special_ids)
    if special:
        token = tokenizer.convert_ids_to_tokens(min(special))
        rule = f"it spells the special token {token!r}, and a stored text is the answer alone"
        raise reader.bad(key, column, text, rule)
    if tokenizer.eos_token_id is None:
        rule = f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to end a text with"
        raise reader.bad(key, column, text, rule)
    return Completion((*token_ids, tokenizer.eos_token_id), "stop", 0)


def _of_tokens(
    reader: RowReader, key: str, column: str, value: dict[str, Any], tokenizer: Any
) -> Completion:
    """An object that `stored_form` has made."""
    token_ids, reason, text = (value.get(k) for k in ("token_ids", "finish_reason", "text"))
    if reason is None or reason not in get_args(FinishReason):
        rule = f"its finish_reason must be one of {', '.join(get_args(FinishReason))}"
        raise reader.bad(key, column, value, rule)
    ids: list[Any] = token_ids if isinstance(token_ids, list) else [None]
    if not all(type(token) is int and 0 <= token < len(tokenizer) for token in ids):
        rule = f"its token_ids must be a list of ids below {len(tokenizer)}, the tokenizer's"
        raise reader.bad(key, column, value, rule)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    tail = text[len(decoded) :] if isinstance(text, str) else ""
    if not isinstance(text, str) or decoded + tail != text or (tail and reason != "stop_string"):
        rule = (
            f"its token_ids are {shown(decoded)} by the student's tokenizer, and its text is "
            f"{shown(text)}: another tokenizer has made them"
        )
        raise reader.bad(key, column, value, rule)
    return Completion(tuple(ids), reason, 0, tail=tail)
