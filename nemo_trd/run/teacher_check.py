"""Whether the running servers of the teacher serve it: asked once, before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr

from nemo_trd.config.schema import Config, TeacherPool, VllmClient
from nemo_trd.data.types import TokenIds, Trajectory
from nemo_trd.distributed.exchange import from_first_rank, merge_shares
from nemo_trd.generation.api import Wanted
from nemo_trd.generation.identity import (
    ask,
    check_log_probabilities,
    check_name,
    check_weights_and_tokenizer,
)
from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.megatron.student import Student
from nemo_trd.megatron.teacher import Teacher
from nemo_trd.models.vocabulary import Vocabulary
from nemo_trd.run.open import FrozenTeacher
from nemo_trd.serve.open import Servers

log = logging.getLogger(__name__)

TEXT_TOKENS = 64  # of the text whose log-probabilities are compared
# Mean |difference| of a token's log-probability, in nats, that rounding explains, of any text: its
# improbable tokens differ by more than those that a model samples. Another model of the same family
# differs by about 1.
ALLOWED = {"fp32": 1e-3, "other": 0.3}
LOADED_BYTES = 2 << 30  # weights up to so many are loaded here, for this check alone


def check_teacher_servers(
    config: Config,
    servers: Servers,
    tokenizer: Any,
    text: TokenIds,
    student: Student,
    teacher: FrozenTeacher,
    step: int,
) -> None:
    """Compare what each server says with the teacher of `config`. Collective.

    By log-probabilities of `text` where its weights are at hand: in Megatron, as the student of
    step 0 (in opsd), or in a directory that is quickly loaded. Otherwise by the name that it
    reports.

    Raises:
        ConfigError: naming the server, what it serves and what was expected.
    """
    text = text[:TEXT_TOKENS]
    own = _own_log_probabilities(config, text, student, teacher, step)
    vllm = config.generation.vllm
    assert vllm is not None  # there are servers
    pool, client = vllm.teacher, vllm.client

    def check() -> None:
        for url in servers.urls:
            served = ask(url, servers.api_key)
            if served is None:
                continue
            check_weights_and_tokenizer(served, tokenizer)
            reported = None if own is None else _reported(client, url, servers.api_key, text)
            if own is None or reported is None:
                check_name(served, Path(config.teacher_source.path).absolute(), pool.served_name)
                log.info("%s serves the teacher, by the name of its model", url)
                continue
            tokens = [tokenizer.decode([token]) for token in text[1:]]
            allowed = _allowed(pool, config.precision.dtype)
            mean = check_log_probabilities(served, reported, own, allowed, tokens)
            log.info("%s serves the teacher: its log-probabilities differ by %.2g", url, mean)

    from_first_rank(check)


def _allowed(pool: TeacherPool, dtype: str) -> float:
    if pool.max_difference is not None:
        return pool.max_difference
    exact = dtype == pool.server.dtype == "fp32" and pool.server.quantization is None
    return ALLOWED["fp32" if exact else "other"]


def _reported(
    client: VllmClient, url: str, api_key: SecretStr | None, text: TokenIds
) -> list[float] | None:
    """Log-probabilities that one server gives `text`; None, with a warning, where it gives none."""
    client = client.model_copy(update={"recovery_timeout_seconds": 0.0, "stale_weights": "keep"})
    scorer = VllmGenerator([url], Vocabulary(0, (), {}), client, api_key=api_key)
    try:
        (scores,) = scorer.score([(text, 1)], Wanted(1), "check of the teacher's servers")
    except GenerationFailed as error:
        log.warning("%s did not score a text, and is known by its name alone: %s", url, error)
        return None
    return [float(value) for value in scores.label_logprobs]


def _own_log_probabilities(
    config: Config, text: TokenIds, student: Student, teacher: FrozenTeacher, step: int
) -> list[float] | None:
    """The teacher's, of all tokens of `text` but the first, in nats. Collective; on every rank."""
    if len(text) < 2:
        return None
    trajectory = Trajectory(0, 0, "rollout", text[:1], text[:1], text[1:], 0)
    if isinstance(teacher, Teacher):
        return _of_megatron(trajectory, student, teacher)
    if config.model.teacher is None:
        if step > 0:
            return None  # the student has moved
        (nll,) = student.token_nll([trajectory]).values()
        return [-value for value in nll]
    return from_first_rank(lambda: _of_directory(config, text))


def _of_megatron(trajectory: Trajectory, student: Student, teacher: Teacher) -> list[float]:
    plan = student.pack([trajectory])
    own = plan[student.groups.dp.rank()]
    log_probs: list[list[float]] = []
    for micro_batch, states in zip(own, teacher.states(plan), strict=True):
        if states is not None and len(micro_batch.labels):
            known = student.teacher_top_k(states, micro_batch, 1, padded=True)
            log_probs.append(known.label_log_probs.tolist())
    return merge_shares(log_probs)[0]


def _of_directory(config: Config, text: TokenIds) -> list[float] | None:
    """Those of weights that transformers loads within seconds; None where there are none such."""
    from nemo_trd.generation.local import load_model

    source = config.teacher_source
    files = list(Path(source.path).glob("*.safetensors"))
    if not files or sum(file.stat().st_size for file in files) > LOADED_BYTES:
        return None
    try:
        model = load_model(source.path, torch.float32, source.trust_remote_code)
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0, :-1]
    except Exception as error:  # of an architecture that is not ours anything is raised
        log.warning("the teacher's weights cannot be compared with its servers': %s", error)
        return None
    rows = logits.float().log_softmax(-1)
    return rows.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
