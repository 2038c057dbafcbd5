"""Token ids that a model may sample, and those that end a completion."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from nemo_trd.config.schema import ModelSource
from nemo_trd.models.read import read_generation_config, read_tokenizer
from nemo_trd.models.served import read_served

logger = logging.getLogger(__name__)

NEVER = -100.0  # the smallest bias of a logit that vLLM takes


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a model may sample, of the `columns` that it has logits for.

    never: ids that are not sampled: they have no token, or none that the student knows.
    ends: id that ends a completion -> id that takes its place in the completion.
    """

    columns: int
    never: tuple[int, ...]
    ends: Mapping[int, int]

    def constraint(self, *, biases: bool = True) -> dict[str, Any]:
        """Sampling parameters of vLLM that keep `never` from being sampled; the shorter list.

        Args:
            biases: the server takes biases of logits.
        """
        if not self.never:
            return {}
        if biases and len(self.never) <= self.columns // 2:
            return {"logit_bias": dict.fromkeys(map(str, self.never), NEVER)}
        return {"allowed_token_ids": sorted(set(range(self.columns)) - set(self.never))}

    def ended(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The completion with its last token replaced as `ends` says, if it has ended by itself."""
        if not token_ids:
            return token_ids
        return (*token_ids[:-1], self.ends.get(token_ids[-1], token_ids[-1]))


def read_vocabulary(source: ModelSource, student: ModelSource | None = None) -> Vocabulary:
    """Vocabulary of a model by itself, or of a teacher in the words of its `student`.

    Such a teacher samples no token that the student does not know: it would be a label without a
    meaning. Its completions end with whatever ends its own turn or the student's. Where a token
    ends the teacher's alone, the student's EOS token takes its place, and a warning says so.

    Raises:
        ConfigError: a generation_config.json that cannot be read.
    """
    tokenizer, hf = load_tokenizer(source), _load_config(source)
    own, stops = _tokens(tokenizer), stop_ids(Path(source.path), hf, tokenizer)
    if not stops:
        logger.warning("%s names no EOS token: completions end at max_tokens only", source.path)
    known, ends = set(own), {stop: stop for stop in stops}
    if student is not None and student.path != source.path:
        reader = load_tokenizer(student)
        words = _tokens(reader)
        if own and words:
            known = {index for index, token in own.items() if words.get(index) == token}
        of_student = stop_ids(Path(student.path), _load_config(student), reader)
        ends |= {stop: stop for stop in of_student} | _translated(stops, of_student, reader)
        _tell(source, student, own, known, ends)
    columns = (hf.get_text_config() if hasattr(hf, "get_text_config") else hf).vocab_size
    sampled = known | (stops & set(own))
    never = tuple(index for index in range(columns) if own and index not in sampled)
    return Vocabulary(columns, never, ends)


def stop_ids(directory: Path, hf: Any, tokenizer: Any | None) -> set[int]:
    """Every id that ends a completion: the generation config's and the tokenizer's.

    Without a generation_config.json, the model's configuration `hf` tells.

    Raises:
        ConfigError: the file cannot be read, or its eos_token_id is neither an id nor a list.
    """
    generation = read_generation_config(directory)
    if generation is not None:
        configured = generation.eos_token_id
    else:
        text = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
        configured = getattr(text, "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else configured or ()
    own = None if tokenizer is None else tokenizer.eos_token_id
    return set(ids) | (set() if own is None else {own})


def load_tokenizer(source: ModelSource) -> Any | None:
    """Tokenizer of a model directory; None where it has none.

    Raises:
        ConfigError: transformers cannot read it.
    """
    directory = Path(source.path)
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return read_tokenizer(directory, source.trust_remote_code)


def _load_config(source: ModelSource) -> Any:
    """config.json; of an architecture that transformers does not know, what it tells of sizes."""
    try:
        return AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except ValueError:
        return read_served(source, "path of the model", None)


def _tokens(tokenizer: Any | None) -> dict[int, str]:
    """Token of each id."""
    return {} if tokenizer is None else {i: token for token, i in tokenizer.get_vocab().items()}


def _translated(stops: set[int], of_student: set[int], tokenizer: Any | None) -> dict[int, int]:
    """The student's end for each of the teacher's that would not stop it."""
    if not of_student:
        return {}
    eos = None if tokenizer is None else tokenizer.eos_token_id
    return dict.fromkeys(stops - of_student, min(of_student) if eos is None else eos)


def _tell(
    source: ModelSource,
    student: ModelSource,
    own: dict[int, str],
    known: set[int],
    ends: dict[int, int],
) -> None:
    for stop, end in sorted(ends.items()):
        if stop != end:
            logger.warning(
                "%s ends its turn with %r (id %d), at which %s is not stopped: rewrites that end "
                "so end with id %d instead. The teacher's distribution there is still about its "
                "own token; if the student is to stop at it, add it to eos_token_id in the "
                "student's generation_config.json",
                *(source.path, own.get(stop, "?"), stop, student.path, end),
            )
    more = [own[index] for index in sorted(own.keys() - known)]
    if more:
        logger.warning(
            "%s has %d tokens that %s does not know, %s: it never samples them, and they have no "
            "part in the divergence",
            *(source.path, len(more), student.path, ", ".join(more[:5])),
        )
