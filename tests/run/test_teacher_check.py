"""A teacher that only servers hold: of any architecture, and asked who it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import KEY, FakeVllm
from pydantic import SecretStr
from tiny_models import byte_tokenizer, make_model

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.generation.identity import (
    PROBE,
    Served,
    ask,
    check_log_probabilities,
    check_name,
    check_weights_and_tokenizer,
    names_of,
)
from nemo_trd.models.vocabulary import read_vocabulary
from nemo_trd.plan.plan import make_plan
from nemo_trd.plan.show import as_json, text
from nemo_trd.preflight.models import check

SERVED = [
    *("model=local", "generation=vllm", "teacher.scoring=server", "loss.top_k=8"),
    *("generation.vllm.teacher.replicas=0", "generation.vllm.teacher.urls=[http://t:8000]"),
    *("data.max_prompt_tokens=64", "refinement.max_context_tokens=128"),
    *("generation.rollout.max_tokens=32", "generation.refinement.max_tokens=64"),
    "train.max_tokens_per_micro_batch=192",
]
SIZES = {"vocab_size": 300, "max_position_embeddings": 200}
MOE = {  # with shared experts
    **{"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
# What the directory of a teacher says of itself, and the (vocabulary, positions) that count.
TEACHERS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "Qwen2-MoE": ({**MOE, **SIZES}, (300, 200)),
    "Gemma 3, which leaves its sizes to transformers": (
        {
            **{"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "text_config": {"model_type": "gemma3_text", "hidden_size": 64},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32},
        },
        (262_208, 131_072),
    ),
    "Gemma 3 with its sizes": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **SIZES}},
        (300, 200),
    ),
    "DeepSeek-V3 in FP8": (
        {
            **{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **SIZES},
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        (300, 200),
    ),
    "an architecture that nobody knows": (
        {"model_type": "tomorrow", "text_config": {"vocab_size": 300, "max_seq_len": 200}},
        (300, 200),
    ),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "student", "qwen3", tokenizer=True)


def teacher(directory: Path, settings: dict[str, Any]) -> Path:
    """config.json and tokenizer, no weights."""
    byte_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def settings(student: Path, teacher: Path, *overrides: str) -> Config:
    models = [f"model.student.path={student}", f"model.teacher.path={teacher}"]
    return compose([*SERVED, *models, f"run.dir={teacher}/run", *overrides])


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_on_servers_may_be_of_any_architecture_and_elsewhere(
    name: str, student: Path, tmp_path: Path
) -> None:
    described, (vocabulary, positions) = TEACHERS[name]
    config = settings(student, teacher(tmp_path, described))
    _, served = check(config, 1)
    assert served.hf.vocab_size == vocabulary
    assert served.hf.max_position_embeddings == positions
    assert config.model.teacher is not None
    known = read_vocabulary(config.model.teacher, config.model.student)
    assert known.columns == vocabulary and 3 in known.ends
    with pytest.raises(ConfigError, match="supported are llama"):
        check(settings(student, tmp_path, "teacher.scoring=megatron"), 1)
    plan = make_plan(settings(student, tmp_path, "cluster.teacher_server_nodes=1"))
    assert not plan.findings.problems and plan.memory and plan.flops is None
    assert f"{described['model_type']} is on servers only" in text(plan)
    assert as_json(plan)["parameters"]["teacher"] is None


# What is said of a teacher on servers, further settings, and what of them is refused.
REFUSED: dict[str, tuple[dict[str, Any], list[str], tuple[str, ...]]] = {
    "no vocabulary": (
        {"model_type": "tomorrow", "max_position_embeddings": 200},
        [],
        ("model.teacher.path", "config.json: vocab_size) = None", "text_config"),
    ),
    "no length": (
        {"model_type": "tomorrow", "vocab_size": 300},
        [],
        ("max_position_embeddings) = None", "or set generation.vllm.teacher.server.max_model_len"),
    ),
    "another vocabulary than its tokenizer's": (
        {**MOE, **SIZES, "vocab_size": 100},
        [],
        ("model.teacher.path", "its largest token id is 260 and the model has 100 columns"),
    ),
    "too short": (
        {**MOE, **SIZES},
        ["refinement.max_context_tokens=136", "train.max_tokens_per_micro_batch=200"],
        ("refinement.max_context_tokens = 136", "the 200 tokens of the teacher's servers"),
    ),
    "servers of the run without weights": (
        {**MOE, **SIZES},
        ["generation.vllm.teacher.replicas=1", "generation.vllm.teacher.urls=[]"],
        ("generation.vllm.teacher.replicas = 1", "has no weights", "teacher.urls of servers"),
    ),
    "the student's servers started for too little": (
        {**MOE, **SIZES},
        ["generation.vllm.student.server.max_model_len=95"],
        ("data.max_prompt_tokens = 64", "the 95 tokens of the student's servers", "student.server"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_on_servers_that_cannot_work_is_refused(
    name: str, student: Path, tmp_path: Path
) -> None:
    described, overrides, parts = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        check(settings(student, teacher(tmp_path, described), *overrides), 1)
    assert len(str(refused.value).splitlines()) <= 2
    for part in parts:
        assert part in str(refused.value)


def test_a_length_that_is_set_takes_the_place_of_the_models(student: Path, tmp_path: Path) -> None:
    directory = teacher(tmp_path, {"model_type": "tomorrow", "vocab_size": 300})
    config = settings(student, directory, "generation.vllm.teacher.server.max_model_len=193")
    assert check(config, 1)[1].hf.max_position_embeddings == 193
    with pytest.raises(ConfigError, match="the 192 tokens of the teacher's servers"):
        check(settings(student, directory, "generation.vllm.server.max_model_len=192"), 1)


def asked(server: FakeVllm) -> Served:
    served = ask(server.url, SecretStr(KEY))
    assert served is not None
    return served


@pytest.mark.parametrize(
    ("root", "directory", "served_name", "accepted"),
    [
        ("/models/Qwen3-30B-A3B", "/data/qwen3-30b-a3b", None, True),
        ("Qwen/Qwen3-30B-A3B", "/data/Qwen3-30B-A3B", None, True),
        ("/cache/models--Qwen--Qwen3-30B-A3B/snapshots/0a1b", "/data/Qwen3-30B-A3B", None, True),
        ("/models/Qwen3-8B", "/data/Qwen3-30B-A3B", None, False),
        ("/models/Qwen3-8B", "/data/Qwen3-30B-A3B", "Qwen3-8B", True),
        ("/models/Qwen3-8B", "/data/Qwen3-8B", "Qwen3-30B-A3B", False),
        (None, "/data/nemo_trd", None, True),  # a server that gives no more than an id
    ],
)
def test_a_server_must_report_the_teachers_name(
    root: str | None, directory: str, served_name: str | None, accepted: bool
) -> None:
    with FakeVllm() as server:
        server.root = root
        served = asked(server)
        if accepted:
            check_name(served, Path(directory), served_name)
            return
        with pytest.raises(ConfigError) as refused:
            check_name(served, Path(directory), served_name)
    told = str(refused.value)
    assert f"generation.vllm.teacher.urls = '{server.url}'" in told
    for part in (f"nemo_trd from {root}", "Qwen3-30B-A3B", "set generation.vllm.teacher.served"):
        assert part in told


def test_a_directory_is_known_by_what_it_links_to_and_by_its_own_record(tmp_path: Path) -> None:
    directory = teacher(tmp_path / "Real-7B", {"_name_or_path": "org/Recorded-7B"})
    (tmp_path / "teacher").symlink_to(directory)
    assert names_of(tmp_path / "teacher") == {"teacher", "Real-7B", "Recorded-7B"}


def test_a_server_of_another_tokenizer_or_with_replaced_weights_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = byte_tokenizer()
    with FakeVllm() as server:
        check_weights_and_tokenizer(asked(server), tokenizer)  # one that does not tell
        server.tokens = tokenizer(PROBE)["input_ids"]
        check_weights_and_tokenizer(asked(server), tokenizer)
        server.tokens = [7, *server.tokens]
        with pytest.raises(ConfigError, match=r"whose tokenizer makes \[7, "):
            check_weights_and_tokenizer(asked(server), tokenizer)
        server.tokens, server.version = [], "3"
        with pytest.raises(ConfigError, match=r"replaced \(version 3\).*freshly started"):
            check_weights_and_tokenizer(asked(server), tokenizer)
        server.healthy = False
        url = server.url
    assert ask(url, None) is None and f"{url} was not asked" in caplog.text


def test_a_server_of_other_weights_is_refused_by_its_log_probabilities() -> None:
    served = Served("http://t:1", ("alias", "/models/x"), None, None)
    own, tokens = [-1.0, -2.0, -3.0], ["a", "b", "c"]
    near = [-1.0, -2.1, -3.2]
    assert check_log_probabilities(served, near, own, 0.3, tokens) == pytest.approx(0.1)
    with pytest.raises(ConfigError) as refused:
        check_log_probabilities(served, [-1.0, -3.5, -3.0], own, 0.3, tokens)
    for part in ("'http://t:1'", "alias from /models/x", "0.5000 nats", "at 'b': -3.500 there"):
        assert part in str(refused.value)
    assert "generation.vllm.teacher.max_difference" in str(refused.value)
