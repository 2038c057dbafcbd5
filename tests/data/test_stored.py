"""Pairs of rollout and rewrite in the rows of data.train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composed_once import compose
from tiny_models import byte_tokenizer

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.prompt_digests import PARTS, difference, digests
from nemo_trd.data.prompts import load_prompts
from nemo_trd.data.stored import stored_form
from nemo_trd.data.types import Completion, StoredPair

EOS = byte_tokenizer().eos_token_id


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def load(path: Path, *rows: dict[str, Any], bad: str = "error") -> list[Any]:
    path.write_text("".join(json.dumps({"question": "1+1?"} | row) + "\n" for row in rows))
    config = compose(
        [
            *("data=gsm8k", "generation=stored", "data.verifier=none", f"data.on_bad_row={bad}"),
            *("data.train.answer_pattern=null", "data.train.columns.answer=null"),
            *("data.train.columns.reference_solution=null", "generation.rollout.max_tokens=12"),
            *(f"data.train.path={path}", "data.max_prompt_tokens=99", "data.max_bad_share=0.5"),
        ]
    )
    loaded = load_prompts(
        config.data.train,
        "data.train",
        config.data,
        byte_tokenizer(),
        stored_for=config.generation,
    )
    assert bad == "error" or loaded.skipped
    return [prompt.stored for prompt in loaded.prompts]


def test_texts_end_by_themselves_and_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    cut, stopped = Completion(ids("so 2"), "length", 0), Completion(ids("so"), "stop_string", 0)
    stopped = replace(stopped, tail=" ")
    pairs = load(
        tmp_path / "pairs.jsonl",
        {"rollout": "so 3", "refinement": "so 2"},
        {"rollout": stored_form(cut, "so 2"), "refinement": None},
        {"rollout": stored_form(stopped, "so "), "refinement": "2"},
    )
    assert pairs == [
        StoredPair(
            Completion((*ids("so 3"), EOS), "stop", 0), Completion((*ids("so 2"), EOS), "stop", 0)
        ),
        StoredPair(cut, None),
        StoredPair(stopped, Completion((*ids("2"), EOS), "stop", 0)),
    ]


@pytest.mark.parametrize(
    ("rollout", "told"),
    [
        (None, "column 'rollout' = None: it must be a text that is not empty"),
        (" ", "it must be a text that is not empty"),
        ("<|end|>", "it spells the special token '<|end|>'"),
        ("a text of 18 tokens", "it has 20 tokens, more than generation.rollout.max_tokens = 12"),
        (
            {"text": "a", "token_ids": [5], "finish_reason": "end"},
            "its finish_reason must be one of",
        ),
        ({"text": "a", "token_ids": [1e9], "finish_reason": "stop"}, "a list of ids below"),
        ({"text": "a", "token_ids": [10**9], "finish_reason": "stop"}, "a list of ids below"),
        (
            {"text": "ab", "token_ids": list(ids("ac")), "finish_reason": "stop"},
            "its token_ids are 'ac' by the student's tokenizer, and its text is 'ab'",
        ),
        (
            {"text": "ab", "token_ids": list(ids("a")), "finish_reason": "length"},
            "another tokenizer has made them",
        ),
        ({"text": "ab"}, "its finish_reason must be one of"),
    ],
)
def test_a_bad_sample_is_told_with_its_place(tmp_path: Path, rollout: Any, told: str) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"rollout": "so 2", "refinement": "2"}
    with pytest.raises(ConfigError) as error:
        load(path, good, good | {"rollout": rollout})
    assert told in str(error.value) and f"{path} line 2" in str(error.value)
    assert len(load(path, good, good | {"rollout": rollout}, bad="skip")) == 1


def test_a_missing_column_is_named_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'refinement', which generation\.stored\.ref"):
        load(tmp_path / "pairs.jsonl", {"rollout": "so 2"})


def test_a_changed_sample_is_another_prompt_to_a_checkpoint(tmp_path: Path) -> None:
    from nemo_trd.data.types import Prompt

    pair = StoredPair(Completion((1, EOS), "stop", 0), None)
    before = Prompt(0, "1+1?", (1, 2), stored=pair)
    now = replace(before, stored=StoredPair(Completion((2, EOS), "stop", 0), None))
    found = difference(digests([before]), digests([now]))
    assert found is not None and found.parts == (PARTS[2],) and not found.only_tokens


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("generation.stored.refinement=null", "generation.stored.refinement = None"),
        ("train.rollouts_per_prompt=2", "train.rollouts_per_prompt = 2"),
    ],
)
def test_settings_that_stored_samples_cannot_obey_are_refused(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["generation=stored", override])
    assert field in str(error.value) and "Fix: " in str(error.value)
