"""Texts that end a completion: what is kept before them, in this process and from servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVllm
from pooled_generator import SAMPLING, expected, requests
from pooled_generator import generator as on_servers
from tiny_models import byte_tokenizer, make_model

from nemo_trd.algorithm.acceptance import read_refinements, read_rollout
from nemo_trd.algorithm.trajectories import pair
from nemo_trd.config.load import compose
from nemo_trd.config.schema import LocalGeneration, Sampling
from nemo_trd.data.types import Completion, GenerationRequest, Prompt, RefinementPrompt
from nemo_trd.generation.api import generation_body
from nemo_trd.generation.local import LocalGenerator
from nemo_trd.generation.session import RequestFailed
from nemo_trd.generation.stop_strings import Cut, StopStrings

torch.set_num_threads(1)
PIECES = ["4", "2", "}\n\n", "\n", "</", "ans", "wer>", " so", "<eos>"]


def decode(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in token_ids)


def ids(text: str) -> tuple[int, ...]:
    return tuple(PIECES.index(piece) for piece in text.split("|"))


@pytest.mark.parametrize(
    ("generated", "stop", "kept", "tail"),
    [
        ("4|2|}\n\n|4", ["\n\n"], "4|2", "}"),  # one token has the end and the stop
        ("4|2|\n|</|ans|wer>|2", ["</answer>"], "4|2|\n", ""),  # a stop of three tokens
        ("4|</|ans|wer>", ["</answer>", "ans"], "4|</", ""),  # complete before the longer one
        ("4|}\n\n", ["\n\n", "\n"], "4", "}"),  # of one token: the one that ends first
        ("4|}\n\n", ["}\n", "\n"], "4", ""),  # both end there: the first of the list
        ("4|\n|2|\n", ["\n"], "4", ""),  # the first of several
        ("2|4", ["2"], "", ""),  # nothing is left
        ("4|2| so", ["so"], "4|2", " "),
        ("4|</|ans", ["</answer>"], None, ""),  # not complete
    ],
)
def test_tokens_before_a_stop_are_kept_and_the_text_is_cut_exactly(
    generated: str, stop: list[str], kept: str | None, tail: str
) -> None:
    tokens = ids(generated)
    stops = StopStrings(stop, decode)
    found = stops.cut(ids(" so|4"), tokens)
    assert found == (None if kept is None else Cut(ids(kept) if kept else (), tail))
    # While it is generated, it is noticed with the token that completes it and not before.
    ended = [n for n in range(1, len(tokens) + 1) if stops.ends((), tokens[:n])]
    text = [decode(tokens[:n]) for n in range(len(tokens) + 1)]
    assert ended == [n for n, t in enumerate(text) if any(s in t for s in stop)]


def test_half_a_character_is_no_text() -> None:
    tokenizer = byte_tokenizer()
    stops = StopStrings(["\ufffd", "é"], tokenizer.decode)
    letters = tuple(tokenizer("aéb")["input_ids"])
    assert len(letters) == 4
    assert [n for n in range(5) if stops.ends((), letters[:n])] == [3, 4]
    assert stops.cut((), letters) == Cut(letters[:1], "")


def test_a_local_completion_ends_where_its_text_would(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", tokenizer=True, num_hidden_layers=2, eos_token_id=None)
    tokenizer = byte_tokenizer()
    asked = [GenerationRequest(tuple(range(5 + i, 9 + 3 * i)), i) for i in range(9)]

    def drawn(batch: int, **settings: object) -> list[Completion]:
        local = LocalGeneration(batch_size=batch, dtype="fp32")
        sampling = Sampling(temperature=0.8, top_p=1, top_k=0, max_tokens=40)
        here = LocalGenerator(str(model), local, trust_remote_code=False, progress=False)
        return here.generate(asked, sampling.model_copy(update=settings), "rollouts")

    free = drawn(9)
    stop = [tokenizer.decode(free[0].token_ids[7:9]), tokenizer.decode(free[1].token_ids[3:4]), "e"]
    together = drawn(9, stop=stop)
    assert drawn(4, stop=stop) == together
    assert {c.finish_reason for c in together} >= {"stop_string"}
    for whole, completion in zip(free, together, strict=True):
        before = whole.token_ids[:-1] if whole.finish_reason == "stop" else whole.token_ids
        texts = [tokenizer.decode(before[:n]).rstrip("\ufffd") for n in range(len(before) + 1)]
        complete = [n for n, text in enumerate(texts) if any(s in text for s in stop)]
        if not complete:
            assert completion == whole
            continue
        text = tokenizer.decode(completion.token_ids) + completion.tail
        assert completion.token_ids == before[: len(completion.token_ids)]
        assert len(completion.token_ids) < complete[0]
        assert not any(s in text for s in stop) and texts[complete[0]].startswith(text)
        assert any(texts[complete[0]].startswith(text + s) for s in stop)


def characters(token_ids: Sequence[int]) -> str:
    return "".join(chr(0x100 + token) for token in token_ids)


def test_a_completion_of_a_server_is_cut_alike() -> None:
    asked = requests(12)
    whole = expected(asked)
    token = next(c.token_ids[1] for c in whole if len(c.token_ids) > 2)
    sampling = SAMPLING.model_copy(update={"stop": [chr(0x100 + token)]})
    with FakeVllm() as server:
        pool = on_servers(server, logprobs=True, decode=characters)
        found = pool.generate(asked, sampling, "rollouts")
    for before, after in zip(whole, found, strict=True):
        if token in before.token_ids:
            kept = before.token_ids[: before.token_ids.index(token)]
            assert (after.token_ids, after.finish_reason) == (kept, "stop_string")
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, "stop")
        assert after.logprobs == (-0.5,) * len(after.token_ids)
    assert "stop_string" in {completion.finish_reason for completion in found}


def test_a_completion_that_ends_for_no_reason_is_asked_for_again() -> None:
    sampling = SAMPLING.model_copy(update={"stop": ["never"]})
    with FakeVllm(lambda number: "cut") as server:
        pool = on_servers(server, decode=characters, client={"max_attempts": 2})
        with pytest.raises(RequestFailed, match="at none of \\['never'\\]"):
            pool.generate(requests(1), sampling, "rollouts")


def test_a_server_is_told_everything_that_changes_a_sample() -> None:
    request = GenerationRequest((5,), seed=7)
    off = {"min_p": 0, "presence_penalty": 0, "repetition_penalty": 1, "detokenize": False}
    plain = generation_body(request, SAMPLING, frozenset({3}), False)["sampling_params"]
    assert off.items() <= plain.items() and "stop" not in plain
    given = {"min_p": 0.1, "presence_penalty": 0.5, "repetition_penalty": 1.2, "stop": ["\n\n"]}
    sampling = SAMPLING.model_copy(update=given)
    told = generation_body(request, sampling, frozenset({3}), False)["sampling_params"]
    assert {**given, "detokenize": True, "skip_special_tokens": False}.items() <= told.items()


def test_what_a_stop_has_left_is_text_and_labels_without_an_eos() -> None:
    tokenizer = byte_tokenizer()
    prompt = Prompt(0, "6*7?", (9, 9), answer="42}")
    context = RefinementPrompt(
        read_rollout(prompt, 0, Completion((), "stop_string", 0), tokenizer, str.__eq__), (9, 8)
    )
    words = tuple(tokenizer("42")["input_ids"])
    config = compose(["refinement.on_failure=rollout"])
    judged = [
        read_refinements([context], [completion], config, tokenizer, str.__eq__)[0]
        for completion in (
            Completion(words, "stop_string", 0, tail="}"),
            Completion((), "stop_string", 0, tail="}"),
        )
    ]
    assert [(r.text, r.correct, r.rejection) for r in judged] == [
        ("42}", True, None),
        ("}", None, "empty"),
    ]
    (trajectory,) = pair(judged, config, lambda prompt: prompt.token_ids)
    assert trajectory.labels == words  # and there is nothing of the empty rollout to fall back on
