"""A run that cannot work is refused before a model is built, with field, value, rule and fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import nemo_trd.preflight.machine
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.lengths import longest_trajectory
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.models.family import shared_vocab_size
from nemo_trd.models.peft import check_base_of_beginning
from nemo_trd.preflight.models import check, real_vocab_size
from nemo_trd.verifiers import sandbox

WORDS = ["<eos>", "<pad>", "one", "two", "three"]
SHAPE: dict[str, Any] = dict(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
SERVER = ["generation=vllm", "teacher.scoring=server", "loss.top_k=4"]
LENGTHS = [
    "data.max_prompt_tokens=64",
    "refinement.max_context_tokens=128",
    "generation.rollout.max_tokens=32",
    "generation.refinement.max_tokens=64",
    "train.max_tokens_per_micro_batch=192",
]


def save_tokenizer(directory: Path, words: list[str] = WORDS, **settings: Any) -> None:
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    settings = {"eos_token": words[0], "chat_template": "{{ messages }}", **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **settings)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two shards, an adapter on it, and a teacher that fits; all complete."""
    root = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(root / "student", max_shard_size="20KB")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = LlamaForCausalLM.from_pretrained(root / "student")
    get_peft_model(model, lora).save_pretrained(root / "adapter")
    tied = Qwen3Config(**SHAPE | {"head_dim": 8}, tie_word_embeddings=True)
    Qwen3ForCausalLM(tied).save_pretrained(root / "teacher")
    for name in ("student", "teacher"):
        save_tokenizer(root / name)
    return root


@pytest.fixture
def models(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage. The working directory is beside it; the run has begun."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nemo_trd.preflight.machine, "gpu_count", lambda: 0)
    shutil.copytree(saved, tmp_path / "models")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_5")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def settings(*overrides: str) -> Config:
    models = ["model.student.path=models/student", "model.teacher.path=models/teacher"]
    return compose(["model=local", "run.dir=run", *models, *LENGTHS, *overrides])


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(directory)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def refusal(config: Config, world_size: int = 1) -> str:
    """The message of the refusal; nothing of the run or the models may have changed."""
    before = snapshot(Path.cwd())
    with pytest.raises(ConfigError) as refused:
        check(config, world_size)
    assert snapshot(Path.cwd()) == before
    return str(refused.value)


@pytest.mark.usefixtures("models")
def test_complete_models_given_as_relative_paths_are_accepted() -> None:
    check(settings(), world_size=1)
    check(
        settings(
            "parallel.student.tensor_model_parallel_size=2",
            "parallel.student.pipeline_model_parallel_size=2",
            "parallel.student.virtual_pipeline_model_parallel_size=2",
            "parallel.teacher.pipeline_model_parallel_size=4",
        ),
        world_size=8,
    )


@pytest.mark.usefixtures("models")
def test_a_teacher_on_servers_has_no_layout() -> None:
    layout = ["parallel.teacher.tensor_model_parallel_size=3"]
    assert "parallel.teacher" in refusal(settings(*layout))
    check(settings(*SERVER, *layout), world_size=1)


def test_opsd_needs_no_teacher_directory(models: Path) -> None:
    shutil.rmtree(models / "teacher")
    config = compose(
        [
            "model=local",
            "run.dir=run",
            "model.student.path=models/student",
            "model.teacher=null",
            "algorithm.mode=opsd",
            *LENGTHS,
        ]
    )
    check(config, world_size=1)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


def damage_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[20] = 0xFF
    file.write_bytes(content)


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file and keep its data."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def rename_tensor(header: dict[str, Any]) -> None:
    header["model.norm.scale"] = header.pop("model.norm.weight")


def flatten_tensor(header: dict[str, Any]) -> None:
    header["model.embed_tokens.weight"]["shape"] = [16, 8]


def quantize_tensor(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["dtype"] = "I32"


def grow_tensor(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [17]


def forget_offsets(header: dict[str, Any]) -> None:
    del header["model.norm.weight"]["data_offsets"]


STUDENT, TEACHER = "model.student.path", "model.teacher.path"
INDEX = "model.safetensors.index.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    # what is done to the models -> the field, value, rule and fix of the message
    "no directory": (
        lambda m: shutil.rmtree(m / "student"),
        (STUDENT, "models/student", "no such directory", "local Hugging Face directory"),
    ),
    "no config": (
        lambda m: (m / "teacher" / "config.json").unlink(),
        (TEACHER, "teacher/config.json", "no such file", "complete"),
    ),
    "config that is no JSON": (
        lambda m: (m / "student" / "config.json").write_text('{\n  "model_type": llama}'),
        (STUDENT, "config.json:2:17", "invalid JSON", "copy it again"),
    ),
    "config that is a list": (
        lambda m: (m / "student" / "config.json").write_text("[]"),
        (STUDENT, "config.json", "no JSON object", "copy it again"),
    ),
    "config that transformers refuses": (
        lambda m: edit_json(m / "student" / "config.json", hidden_size="many"),
        (STUDENT, "models/student", "transformers cannot read it", "complete"),
    ),
    "another file of weights": (
        lambda m: shutil.copy(
            m / "teacher" / "model.safetensors", m / "teacher" / "old.safetensors"
        ),
        (TEACHER, "teacher/old.safetensors", "beside model.safetensors", "vLLM both", "remove"),
    ),
    "weights in Mistral's format": (
        lambda m: (m / "student" / "consolidated.00.safetensors").touch(),
        (STUDENT, "consolidated.00.safetensors", "vLLM this file", "move it elsewhere"),
    ),
    "generation config with an id below zero": (
        lambda m: edit_json(m / "student" / "generation_config.json", eos_token_id=-1),
        ("student/generation_config.json", "its eos_token_id is -1", "correct it"),
    ),
    "generation config that is no JSON": (
        lambda m: (m / "student" / "generation_config.json").write_text('{"eos_token_id": 2,'),
        ("student/generation_config.json", "transformers cannot read it", "copy it again"),
    ),
    "generation config that is a list": (
        lambda m: (m / "teacher" / "generation_config.json").write_text("[1]"),
        ("teacher/generation_config.json", "transformers cannot read it", "remove it"),
    ),
    "generation config whose EOS is no token": (
        lambda m: edit_json(m / "student" / "generation_config.json", eos_token_id=[2, "</s>"]),
        ("student/generation_config.json", "its eos_token_id is [2, '</s>']", "correct it"),
    ),
    "other architecture": (
        lambda m: edit_json(m / "student" / "config.json", model_type="mamba"),
        (STUDENT, "model_type", "'mamba'", "llama, qwen2, qwen3", "choose a model"),
    ),
    "other activation": (
        lambda m: edit_json(m / "student" / "config.json", hidden_act="gelu"),
        ("config.json: hidden_act", "'gelu'", "silu", "supported model"),
    ),
    "quantized": (
        lambda m: edit_json(m / "student" / "config.json", quantization_config={"bits": 4}),
        ("quantization_config", "'bits': 4", "fp32, fp16 or bf16", "dequantized"),
    ),
    "missing shard": (
        lambda m: first_shard(m / "student").unlink(),
        (STUDENT, "model-00001-of-0", "shard is missing", "copy the directory again"),
    ),
    "truncated shard": (
        lambda m: first_shard(m / "student").write_bytes(
            first_shard(m / "student").read_bytes()[:-1]
        ),
        (STUDENT, "model-00001-of-0", "truncated", "copy the directory again"),
    ),
    "overlong file": (
        lambda m: (m / "teacher" / "model.safetensors").open("ab").write(b"0"),
        (TEACHER, "model.safetensors", "longer than it should be", "copy the directory again"),
    ),
    "empty file": (
        lambda m: (m / "teacher" / "model.safetensors").write_bytes(b""),
        (TEACHER, "model.safetensors", "0 bytes", "copy the directory again"),
    ),
    "file that ends in its header": (
        lambda m: (m / "teacher" / "model.safetensors").write_bytes(b"\xff\x0f" + b"\0" * 90),
        (TEACHER, "model.safetensors", "92 bytes are no complete", "copy the directory again"),
    ),
    "damaged header": (
        lambda m: damage_header(m / "teacher" / "model.safetensors"),
        (TEACHER, "model.safetensors", "header is no JSON", "copy the directory again"),
    ),
    "header without the place of a tensor": (
        lambda m: edit_header(m / "teacher" / "model.safetensors", forget_offsets),
        (
            TEACHER,
            "model.safetensors",
            "tells of model.norm.weight only {'dtype'",
            "copy the directory",
        ),
    ),
    "single file beside an index": (
        lambda m: shutil.copy(m / "teacher" / "model.safetensors", m / "student"),
        (STUDENT, "student/model.safetensors", INDEX, "model-00001-of-0", "remove the one"),
    ),
    "adapter without its model": (
        lambda m: (m / "teacher" / "config.json").rename(m / "teacher" / "adapter_config.json"),
        (TEACHER, "teacher/adapter_config.json", "without its model", "merge it"),
    ),
    "no weights": (
        lambda m: (m / "teacher" / "model.safetensors").unlink(),
        (TEACHER, "models/teacher", "neither model.safetensors nor", "save_pretrained"),
    ),
    "index that is no JSON": (
        lambda m: (m / "student" / INDEX).write_text("{"),
        (STUDENT, f"{INDEX}:1:2", "invalid JSON", "copy it again"),
    ),
    "index without a map": (
        lambda m: edit_json(m / "student" / INDEX, weight_map={}),
        (STUDENT, INDEX, "no weight_map", "copy it again"),
    ),
    "index that names a shard elsewhere": (
        lambda m: edit_json(
            m / "student" / INDEX, weight_map={"a": "../teacher/model.safetensors"}
        ),
        (STUDENT, f"{INDEX}: a: ", "../teacher/model", "of this directory itself", "copy the"),
    ),
    "index that names no shard": (
        lambda m: edit_json(m / "student" / INDEX, weight_map={"a": "b.safetensors", "c": None}),
        (STUDENT, f"{INDEX}: c: None", "of this directory itself", "copy the directory"),
    ),
    "index and shards of different models": (
        lambda m: edit_json(
            m / "student" / INDEX, weight_map={"lm_head.bias": first_shard(m / "student").name}
        ),
        (STUDENT, "model-00001-of-0", "says that it holds lm_head.bias", "copy the directory"),
    ),
    "missing tensor": (
        lambda m: edit_json(m / "teacher" / "config.json", tie_word_embeddings=False),
        (TEACHER, "models/teacher", "lack lm_head.weight", "set tie_word_embeddings to true"),
    ),
    "tensor of another name": (
        lambda m: edit_header(m / "teacher" / "model.safetensors", rename_tensor),
        (TEACHER, "models/teacher", "lack model.norm.weight", "copy the directory again"),
    ),
    "tensors without a place": (
        lambda m: edit_json(m / "teacher" / "config.json", num_hidden_layers=3, layer_types=None),
        (TEACHER, "models/teacher", "no place for model.layers.3", "8 more", "adapters merged"),
    ),
    "tensor of another shape": (
        lambda m: edit_header(m / "teacher" / "model.safetensors", flatten_tensor),
        (TEACHER, "model.embed_tokens.weight: [16, 8]", "shape [8, 16]", "same model"),
    ),
    "tensor of another dtype": (
        lambda m: edit_header(m / "teacher" / "model.safetensors", quantize_tensor),
        (TEACHER, "model.norm.weight: I32", "F32, F16, BF16", "dequantized"),
    ),
    "offsets and shape disagree": (
        lambda m: edit_header(m / "teacher" / "model.safetensors", grow_tensor),
        (TEACHER, "model.safetensors", "model.norm.weight disagree", "copy the directory again"),
    ),
    "no tokenizer": (
        lambda m: [file.unlink() for file in (m / "student").glob("tokenizer*")],
        (f"{STUDENT} (tokenizer)", "models/student", "cannot read it", "complete"),
    ),
    "tokenizer that is no JSON": (
        lambda m: (m / "student" / "tokenizer.json").write_text("{"),
        (f"{STUDENT} (tokenizer)", "models/student", "cannot read it", "complete"),
    ),
    "other tokenizer": (
        lambda m: save_tokenizer(m / "teacher", ["<eos>", "<pad>", "two", "one", "three"]),
        (TEACHER, "models/teacher", "2 differ", "id 2: 'one' (student), 'two' (teacher)", "family"),
    ),
    "smaller tokenizer": (
        lambda m: save_tokenizer(m / "teacher", WORDS[:-1]),
        (TEACHER, "1 differ", "id 4: 'three' (student), None (teacher)", "family"),
    ),
    "other EOS": (
        lambda m: save_tokenizer(m / "teacher", eos_token="<pad>"),
        (TEACHER, "models/teacher", "'<pad>', the student's is '<eos>'", "same eos_token", "add"),
    ),
    "no EOS": (
        lambda m: save_tokenizer(m / "student", eos_token=None),
        (f"{STUDENT} (tokenizer)", "models/student", "no EOS token", "set eos_token"),
    ),
    "no chat template": (
        lambda m: (m / "student" / "chat_template.jinja").unlink(),
        (f"{STUDENT} (tokenizer)", "models/student", "no chat template", "chat_template"),
    ),
    "more tokens than columns": (
        lambda m: [save_tokenizer(m / n, [*WORDS, *"abcd"]) for n in ("student", "teacher")],
        (f"{STUDENT} (tokenizer)", "models/student", "id is 8", "8 columns", "resize"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_directory_is_refused(models: Path, damage: str) -> None:
    do, parts = DAMAGES[damage]
    do(models)
    message = refusal(settings())
    for part in parts:
        assert part in message
    assert "Fix: " in message


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
MICRO = ["train.max_tokens_per_micro_batch=null", "train.micro_batch_size=3"]
RULES: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    # overrides, world size -> the field, value, rule and fix of the message
    "KV heads": (
        [f"parallel.student.{TP}=4"],
        4,
        (f"parallel.student.{TP} = 4", "num_key_value_heads", "2"),
    ),
    "heads": (
        [f"parallel.teacher.{TP}=3"],
        3,
        (f"parallel.teacher.{TP} = 3", "num_attention_heads", "4"),
    ),
    "layers": (
        [f"parallel.student.{PP}=3"],
        3,
        (f"parallel.student.{PP} = 3", "num_hidden_layers", "4"),
    ),
    "virtual stages": (
        [f"parallel.student.{PP}=2", f"parallel.student.virtual_{PP}=4"],
        2,
        (f"parallel.student.virtual_{PP} = 4", "num_hidden_layers", "4"),
    ),
    "world size of the student": (
        [f"parallel.student.{PP}=2"],
        3,
        ("world size = 3", "student takes", "1 x 2 x 1", "multiple of 2"),
    ),
    "world size of the teacher": (
        [f"parallel.teacher.{TP}=2", f"parallel.teacher.{PP}=2"],
        2,
        ("world size = 2", "teacher takes", "2 x 2 x 1", "multiple of 4", "parallel.teacher"),
    ),
    "global batch": (
        [*MICRO, "train.prompts_per_step=4", "train.rollouts_per_prompt=3"],
        8,
        ("train.prompts_per_step = 4", "= 12", "multiple of", "= 24", "change one of them"),
    ),
    "token budget": (
        ["train.max_tokens_per_micro_batch=191"],
        1,
        ("train.max_tokens_per_micro_batch = 191", "192 tokens", "raise it to 192"),
    ),
    "student positions": (
        ["data.max_prompt_tokens=193", "train.max_tokens_per_micro_batch=999"],
        1,
        ("data.max_prompt_tokens = 193", "student sees 257", "= 256", "lower it"),
    ),
    "teacher positions": (
        ["refinement.max_context_tokens=193", "train.max_tokens_per_micro_batch=999"],
        1,
        ("refinement.max_context_tokens = 193", "teacher sees 257", "= 256", "lower it"),
    ),
    "one token more than positions of a scoring server": (
        [*SERVER, "refinement.max_context_tokens=192", "train.max_tokens_per_micro_batch=999"],
        1,
        ("refinement.max_context_tokens = 192", "when it scores", "256 tokens", "lower it"),
    ),
    "one token more than a scoring server is started for": (
        [*SERVER, "generation.vllm.server.max_model_len=192"],
        1,
        ("refinement.max_context_tokens = 128", "the 192 tokens", "server.max_model_len"),
    ),
    "top_k": (["loss.top_k=9"], 1, ("loss.top_k = 9", "vocabulary of 5", "lower it")),
    "fp8 of the student": (
        ["precision.fp8=hybrid"],
        1,
        ("precision.fp8 = 'hybrid'", "CUDA device", "TransformerEngine", "precision.fp8=null"),
    ),
    "fp8 of the teacher": (
        ["precision.teacher_fp8=e4m3"],
        1,
        ("precision.teacher_fp8 = 'e4m3'", "TransformerEngine", "precision.teacher_fp8=null"),
    ),
    "context parallelism": (
        ["parallel.teacher.context_parallel_size=2"],
        3,
        ("world size = 3", "the teacher takes", "1 x 1 x 2 ranks, which must divide it"),
    ),
    "ranks of experts": (
        ["parallel.student.expert_model_parallel_size=2"],
        3,
        ("parallel.student.expert_model_parallel_size = 2", "1 x 2 x 1", "world size, 3"),
    ),
    "experts of a dense model": (
        ["parallel.teacher.expert_tensor_parallel_size=2"],
        2,
        ("parallel.teacher.expert_tensor_parallel_size = 2", "has none", "set it to 1"),
    ),
    "load of experts": (
        ["student.moe_aux_loss_coeff=0.001"],
        1,
        ("student.moe_aux_loss_coeff = 0.001", "has none", "set it to 0"),
    ),
    "run directory": (
        ["run.dir=models/student/config.json/x"],
        1,
        ("run.dir = 'models/student/config.json/x'", "not a writable directory", "choose another"),
    ),
    "checkpoint": (
        ["checkpoint.resume=run/checkpoints/step_7"],
        1,
        ("checkpoint.resume = 'run/checkpoints/step_7'", "no such directory", "set auto"),
    ),
    "W&B": (
        ["logging.wandb={project: p}"],
        1,
        ("logging.wandb = ", "not installed", "nemo_trd[wandb]", "logging.wandb=null"),
    ),
    "MLflow": (
        ["logging.mlflow={experiment: e}"],
        1,
        ("logging.mlflow = ", "not installed", "nemo_trd[mlflow]", "logging.mlflow=null"),
    ),
}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("rule", RULES)
def test_setting_that_cannot_work_is_refused(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_trd.preflight.machine, "importable", lambda package: False)
    overrides, world_size, parts = RULES[rule]
    message = refusal(settings(*overrides), world_size)
    for part in parts:
        assert part in message
    assert "Fix: " in message


@pytest.mark.usefixtures("models")
def test_bf16_on_a_gpu_needs_a_torch_that_sums_its_products_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cu128")
    check(settings("precision.dtype=bf16"), 1)  # on a CPU any will do
    monkeypatch.setattr(nemo_trd.preflight.machine, "gpu_count", lambda: 1)
    message = refusal(settings("precision.dtype=bf16"), 1)
    assert message.startswith("torch = '2.9.1+cu128'") and "PyTorch 2.10" in message
    check(settings("precision.dtype=fp32"), 1)
    monkeypatch.setattr("torch.__version__", "2.10.0a0+nv25.12")
    check(settings("precision.dtype=bf16"), 1)


@pytest.mark.usefixtures("models")
def test_own_servers_beside_ranks_must_name_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_trd.preflight.machine, "gpu_count", lambda: 4)
    message = refusal(settings("generation=vllm", "generation.vllm.teacher.devices=[3]"))
    assert message.startswith("generation.vllm.student.devices = []: ") and "\n" not in message
    named = [
        f"generation.vllm.{role}.devices=[{n}]" for role, n in (("student", 2), ("teacher", 3))
    ]
    check(settings("generation=vllm", *named), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    message = refusal(settings("generation=vllm", *named))
    assert message.startswith("generation.vllm.teacher.devices = [3]: ") and "\n" not in message


@pytest.mark.usefixtures("models")
def test_attention_kernels_switched_off_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    check(settings(), 1)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    message = refusal(settings())
    assert message.startswith("NVTE_FLASH_ATTN = '0': ") and "Fix: unset NVTE_FLASH_ATTN" in message


@pytest.mark.usefixtures("models")
def test_fp8_with_cuda_and_transformer_engine_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_trd.preflight.machine, "gpu_count", lambda: 1)
    monkeypatch.setattr(nemo_trd.preflight.machine, "importable", lambda package: True)
    monkeypatch.setattr(nemo_trd.preflight.machine, "compute_capability", lambda: (9, 0))
    check(settings("precision.fp8=hybrid"), 1)
    message = refusal(settings("precision.teacher_fp8=e4m3", "precision.fp8_recipe=mxfp8"), 1)
    assert "precision.fp8_recipe = 'mxfp8'" in message
    for part in ("capability 10.0", "have 9.0", "Fix: set precision.fp8_recipe=tensorwise"):
        assert part in message
    message = refusal(settings("precision.fp8=hybrid", f"parallel.student.{TP}=2"), 2)
    for part in (
        f"parallel.student.{TP} = 2",
        "multiples of 16",
        f"intermediate_size / {TP} is 24",
    ):
        assert part in message
    assert "parallel.teacher" not in message


ADAPTER = [
    *("student.adapter=lora", "student.adapter.init=models/adapter", "student.adapter.rank=4"),
    *("student.adapter.alpha=8", "student.adapter.targets=[q,down]"),
]


def changed(**values: Any) -> Callable[[Path], Any]:
    """Settings of PEFT, in the place of those that it has saved."""

    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], Any], list[str], tuple[str, ...]]] = {
    "no directory": (
        shutil.rmtree,
        [],
        ("student.adapter.init = 'models/adapter'", "no such one", "adapter_config.json"),
    ),
    "no weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        [],
        ("student.adapter.init", "adapter_model.safetensors", "save the adapter as safetensors"),
    ),
    "another rank": (
        lambda _: None,
        ["student.adapter.rank=8"],
        ("student.adapter.rank = 8", "models/adapter has 4", "set it to 4"),
    ),
    "another alpha": (
        changed(lora_alpha=16),
        [],
        ("student.adapter.alpha = 8.0", "models/adapter has 16", "set it to 16"),
    ),
    "another scale": (
        changed(use_rslora=True),
        [],
        ("student.adapter.rslora = False", "models/adapter has True", "set it to true"),
    ),
    "fewer targets": (
        lambda _: None,
        ["student.adapter.targets=[q]"],
        ("student.adapter.init", "nothing of", "down_proj", "set targets to the adapter's"),
    ),
    "more than an adapter": (
        changed(modules_to_save=["lm_head"]),
        [],
        ("modules_to_save) = ['lm_head']", "are supported", "merge it"),
    ),
    "another kind": (
        changed(use_dora=True),
        [],
        ("use_dora) = True", "use_dora = false are supported", "merge it"),
    ),
    "a changed base": (
        changed(init_lora_weights="pissa"),
        [],
        ("init_lora_weights) = 'pissa'", "changes the weights of the model", "merge it"),
    ),
    "an adapter of some tokens": (
        changed(alora_invocation_tokens=[1, 2]),
        [],
        ("alora_invocation_tokens) = [1, 2]", "are supported", "begin with a plain LoRA adapter"),
    ),
    "an adapter that draws its weights": (
        changed(monteclora_config={"num_samples": 8}),
        [],
        ("monteclora_config) = {'num_samples': 8}", "are supported", "merge it"),
    ),
    "another model": (
        lambda _: None,
        ["model.student.path=models/teacher"],
        ("student.adapter.init", "q_proj.lora_B", "the adapter a shape [16, 4]", "name the model"),
    ),
}


@pytest.mark.parametrize("fault", BAD_ADAPTERS)
def test_an_adapter_that_is_not_the_settings_or_the_models_is_refused(
    models: Path, fault: str
) -> None:
    damage, overrides, told = BAD_ADAPTERS[fault]
    if fault == "no directory":  # all others are faults of one that is accepted
        check(settings(*ADAPTER), world_size=1)
    damage(models / "adapter")
    message = refusal(settings(*ADAPTER, *overrides))
    for part in (*told, "Fix: "):
        assert part in message, message


@pytest.mark.usefixtures("models")
def test_an_adapter_that_names_another_model_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = settings(*ADAPTER).student.adapter
    assert adapter is not None
    check_base_of_beginning(adapter, "a digest", "models/student")
    assert not caplog.text
    check_base_of_beginning(adapter, "a digest", "models/teacher")
    assert "models/adapter was trained on" in caplog.text and "models/teacher" in caplog.text


def test_all_broken_rules_are_told_at_once(models: Path) -> None:
    first_shard(models / "student").unlink()
    shutil.rmtree(models / "teacher")
    message = refusal(settings("checkpoint.resume=nowhere", f"parallel.student.{TP}=2"))
    assert [line.split(" = ")[0] for line in message.splitlines()] == [
        "checkpoint.resume",
        "world size",
        STUDENT,
        TEACHER,
    ]


@pytest.mark.usefixtures("models")
def test_longest_trajectory_follows_what_is_generated_and_shown() -> None:
    assert longest_trajectory(settings()) == 128 + 64
    rollout = ["algorithm.trajectory=rollout"]
    assert longest_trajectory(settings(*rollout)) == 64 + 32  # the teacher sees x only


def test_divergence_runs_over_the_students_tokens(models: Path) -> None:
    small, large = LlamaConfig(vocab_size=151_936), LlamaConfig(vocab_size=152_064)
    assert shared_vocab_size(small, large) == shared_vocab_size(large, small) == 151_936
    save_tokenizer(models / "teacher", [*WORDS, "four", "five"])  # in the same 8 columns
    student, teacher = check(settings(), world_size=1)
    columns = shared_vocab_size(student.hf, teacher.hf)
    assert columns == 8 and real_vocab_size(columns, student.tokenizer) == len(WORDS)
    assert real_vocab_size(columns, teacher.tokenizer) == len(WORDS) + 2
    assert real_vocab_size(columns, None) == columns


def test_another_eos_token_will_do_where_the_student_stops_at_it(models: Path) -> None:
    save_tokenizer(models / "teacher", eos_token="<pad>")
    (models / "student" / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    check(settings(), world_size=1)


def test_module_imports_without_torch() -> None:
    code = (
        "import sys, nemo_trd.preflight.models, nemo_trd.models.directory;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("models")
def test_programs_are_refused_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "TOOLS", ("no-such-tool", "prlimit", "setpriv"))
    told = refusal(settings("data.verifier=code", "data.train.columns.answer=tests"))
    assert "data.verifier = 'code'" in told and "no-such-tool cannot be found" in told
    sandbox.check_sandbox.cache_clear()
