"""The adapter for NeMo-RL, beside its interface as published: it cannot be installed here."""

from __future__ import annotations

import asyncio
import inspect
import sys
from abc import ABC
from collections import UserDict
from collections.abc import AsyncIterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer

from nemo_trd.adapters.nemo_rl import TRDGeneration
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.types import Completion, GenerationRequest

# Names and parameters in nemo_rl/models/generation/interfaces.py, github.com/NVIDIA-NeMo/RL,
# commit 00ab4ef4fd3cc68354782f42691aa47f8f557e9f; `generate_async` is of the vLLM backend.
INTERFACE = {
    "init_collective": ["ip", "port", "world_size", "train_world_size"],
    "prepare_for_generation": ["args", "kwargs"],
    "finish_generation": ["args", "kwargs"],
    "shutdown": [],
    "prepare_refit_info": ["state_dict_info"],
    "update_weights_via_ipc_zmq": [],
    "update_weights_from_collective": [],
    "get_collective_sender_spec": [],
    "get_inference_world_size": [],
    "invalidate_kv_cache": [],
    "pause_generation": ["clear_cache"],
    "resume_generation": [],
    "blocks_training": [],
    "wake_carries_weight_updates": [],
    "clear_logger_metrics": [],
    "get_logger_metrics": [],
}
GENERATE = ["self", "data", "greedy"]
OUTPUT = {"output_ids", "generation_lengths", "unpadded_sequence_lengths"}
EOS, REWRITE = 3, "a better way."
TOKENIZER = byte_tokenizer()


class BatchedDataDict(UserDict):  # type: ignore[type-arg]
    """Stands for NeMo-RL's, which is a UserDict too."""


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> type:
    """A module with the published class, as far as an adapter can see it."""
    published = type("GenerationInterface", (ABC,), {})
    module = ModuleType("nemo_rl.models.generation.interfaces")
    module.GenerationInterface = published  # type: ignore[attr-defined]
    for name in ("nemo_rl", "nemo_rl.models", "nemo_rl.models.generation"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return published


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class Student:
    """Answers each prompt with itself, reversed; everything else it notes."""

    cfg = {"vllm_cfg": {"async_engine": True}}
    requires_kv_scale_sync = False

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name not in INTERFACE:
            raise AttributeError(name)
        return lambda *_, **__: self.called.append(name)

    def generate(self, data: Any, greedy: bool) -> BatchedDataDict:
        rows, lengths = [], data["input_lengths"].tolist()
        for row, length in zip(data["input_ids"].tolist(), lengths, strict=True):
            rows.append(torch.tensor(row[:length] + row[:length][::-1] + [EOS]))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return BatchedDataDict(
            {
                "output_ids": padded,
                "generation_lengths": torch.tensor([length + 1 for length in lengths]),
                "unpadded_sequence_lengths": torch.tensor([len(row) for row in rows]),
                "logprobs": torch.ones(padded.shape),
            }
        )

    async def generate_async(
        self, data: Any, greedy: bool
    ) -> AsyncIterator[tuple[int, BatchedDataDict]]:
        for index in reversed(range(len(data["input_ids"]))):
            yield index, self.generate({k: v[index : index + 1] for k, v in data.items()}, greedy)


class Teacher:
    """Rewrites everything in the same way, except what it is told to break off."""

    def __init__(self, cut: str = "none") -> None:
        self.asked: list[str] = []
        self._cut = cut

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> list[Completion]:
        texts = [TOKENIZER.decode(r.prompt_token_ids) for r in requests]
        self.asked += texts
        return [
            Completion((*ids(REWRITE),), "length", 0)
            if self._cut in text
            else Completion((*ids(REWRITE), EOS), "stop", 0)
            for text in texts
        ]


def settings(*overrides: str) -> Config:
    return compose(
        [
            *("algorithm.teacher_context=prompt", "refinement.on_failure=rollout"),
            "refinement.templates.opd='P {problem} R {rollout}'",
            *("refinement.max_context_tokens=400", "data.verifier=none", *overrides),
        ]
    )


def batch(*prompts: str) -> BatchedDataDict:
    rows = [torch.tensor(ids(prompt)) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return BatchedDataDict({"input_ids": padded, "input_lengths": lengths})


def answers(output: Any) -> list[str]:
    found = []
    for row, total, new in zip(
        output["output_ids"].tolist(),
        output["unpadded_sequence_lengths"].tolist(),
        output["generation_lengths"].tolist(),
        strict=True,
    ):
        assert not any(row[total:])  # right-padded
        found.append(TOKENIZER.decode(row[total - new : total], skip_special_tokens=True))
    return found


def test_output_is_the_rewrite_without_the_students_log_probabilities(interface: type) -> None:
    teacher = Teacher(cut="long one")
    generation = TRDGeneration(Student(), teacher, settings(), TOKENIZER)
    prompts = ["what is 1+1?", "a long one, cut"]
    output = generation.generate(batch(*prompts), greedy=False)
    assert isinstance(output, BatchedDataDict) and output.keys() == OUTPUT | {"truncated"}
    assert answers(output) == [REWRITE, prompts[1][::-1]]  # what was cut: the rollout
    for row, prompt in zip(output["output_ids"].tolist(), prompts, strict=True):
        assert row[: len(ids(prompt))] == ids(prompt)
    assert "P what is 1+1? R ?1+1 si tahw" in teacher.asked[0]
    assert generation.counts["accepted"] == 1 and generation.counts["rejected_truncated"] == 1
    assert isinstance(generation, interface)


def test_async_output_is_the_same_sample_by_sample(interface: type) -> None:
    prompts = ["what is 1+1?", "what is 2+2, then?"]
    generation = TRDGeneration(Student(), Teacher(), settings(), TOKENIZER)

    async def collect() -> list[tuple[int, Any]]:
        return [item async for item in generation.generate_async(batch(*prompts), greedy=False)]

    found = asyncio.run(collect())
    assert [index for index, _ in found] == [1, 0]
    assert [answers(output) for _, output in found] == [[REWRITE], [REWRITE]]
    assert all("logprobs" not in output for _, output in found)


def test_validation_is_answered_by_the_student_itself(interface: type) -> None:
    student, teacher = Student(), Teacher()
    generation = TRDGeneration(student, teacher, settings(), TOKENIZER)
    loader = generation.bypassed([batch("one"), batch("two"), batch("three")])
    assert len(loader) == 3
    for number, data in enumerate(loader):
        output = generation.generate(data, greedy=True)
        assert "logprobs" in output and answers(output) == [["one", "two"][number][::-1]]
        if number == 1:
            break
    assert not teacher.asked
    assert answers(generation.generate(batch("three"), greedy=False)) == [REWRITE]


def test_everything_else_of_the_interface_reaches_the_student(interface: type) -> None:
    student = Student()
    generation = TRDGeneration(student, Teacher(), settings(), TOKENIZER)
    for name, parameters in INTERFACE.items():
        getattr(generation, name)(*parameters)
    assert student.called == list(INTERFACE)
    assert generation.requires_kv_scale_sync is False and generation.cfg is Student.cfg
    for method in (TRDGeneration.generate, TRDGeneration.generate_async):
        assert list(inspect.signature(method).parameters) == GENERATE


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("refinement.on_failure=drop", "every sample"),
        ("algorithm.teacher_context=refine", "prompt and the output"),
        ("refinement.max_student_nll_gap=2", "likelihoods.*set it to null"),
    ],
)
def test_what_nemo_rls_trainer_cannot_follow_is_refused(
    interface: type, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        TRDGeneration(Student(), Teacher(), settings(override), TOKENIZER)


def test_without_nemo_rl_it_is_named() -> None:
    with pytest.raises(ImportError, match="nemo-rl 0.5.*NVIDIA-NeMo/RL.*no extra"):
        TRDGeneration(Student(), Teacher(), settings(), TOKENIZER)
