"""Settings: every shipped file is valid, every contradiction is refused, the digest is stable."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from composed_once import compose as compose_once
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.evaluation import Benchmark, EvaluationConfig
from nemo_trd.config.load import compose, compose_as, conf_dir, validate, validate_as
from nemo_trd.config.schema import Config, TargetName

OPSD = ["algorithm.mode=opsd", "model.teacher=null"]
FILES = sorted(str(file.relative_to(conf_dir())) for file in conf_dir().rglob("*.yaml"))
BENCHMARKS = [Path(file).stem for file in FILES if file.startswith("benchmark/")]
# Of other commands, and what files of several groups include.
OTHERS = ("benchmark/", "evaluate", "layout/", "sampling/", "servers/")
INCLUDED = ("layout/whole", "sampling/", "sandbox/", "servers/vllm")
SHIPPED = [file for file in FILES if not file.startswith(OTHERS)]


def composed(*overrides: str, config_name: str = "config") -> DictConfig:
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return hydra_compose(config_name, list(overrides))


def with_placeholders(settings: DictConfig) -> DictConfig:
    """Fill what a shipped file leaves to the user: paths, and nothing else, marked ???."""
    for key in OmegaConf.missing_keys(settings):
        assert key.endswith(".path"), key
        OmegaConf.update(settings, key, "some/path")
    return settings


@pytest.mark.parametrize("file", SHIPPED)
def test_every_shipped_file_composes_and_validates(file: str) -> None:
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    config = validate(with_placeholders(composed(*([f"{group}={name}"] if group else []))))
    assert isinstance(config, Config)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_validates_and_hides_no_setting(benchmark: str) -> None:
    evaluation = with_placeholders(
        composed(f"benchmark={benchmark}", "generation.vllm.replicas=1", config_name="evaluate")
    )
    benchmarks = validate_as(EvaluationConfig, evaluation).benchmarks
    assert list(benchmarks) == [benchmark] and benchmarks[benchmark].on_bad_row == "error"
    settings: Any = OmegaConf.to_container(evaluation, resolve=True)
    assert absent_settings(EvaluationConfig, settings, "") == []
    assert absent_settings(Benchmark, settings["benchmarks"][benchmark], "") == []


@pytest.mark.parametrize("command", ["config", "evaluate"])
def test_settings_of_a_shared_file_can_be_overridden_in_both_commands(command: str) -> None:
    overrides = ["sandbox.cpu_seconds=3", "generation.vllm.client.max_attempts=9"]
    overrides += ["generation.vllm.server.max_num_seqs=7"]
    group = ["generation=vllm"] if command == "config" else []
    changed = composed(*group, *overrides, config_name=command)
    for override in overrides:
        name, value = override.split("=")
        assert OmegaConf.select(changed, name) == int(value)
    if command == "config":
        roles = [changed.generation.vllm.student, changed.generation.vllm.teacher]
        assert [role.server.max_num_seqs for role in roles] == [7, 7]


def test_blocks_that_several_files_include_stand_in_one_file() -> None:
    loaded = {file: OmegaConf.to_container(OmegaConf.load(conf_dir() / file)) for file in FILES}
    shared = [file for file in FILES if file.startswith(INCLUDED)]
    for block in (block for file in shared for block in blocks(loaded[file])):
        assert [file for file in FILES if any(block <= b for b in blocks(loaded[file]))] in (
            [[file] for file in shared] + [["servers/inherited.yaml", "servers/vllm.yaml"]]
        )


def blocks(settings: Any) -> list[set[str]]:
    """Names of the values of each section, where it has four or more."""
    if not isinstance(settings, dict):
        return []
    own = {name for name, value in settings.items() if not isinstance(value, dict)}
    inner = [block for value in settings.values() for block in blocks(value)]
    return [own, *inner] if len(own) >= 4 else inner


def test_shipped_files_are_found() -> None:
    assert {"config.yaml", "model/local.yaml", "experiment/quickstart.yaml"} <= set(SHIPPED)


def absent_settings(schema: type[BaseModel], settings: dict[str, Any], where: str) -> list[str]:
    """Settings of the schema that the composed files do not mention."""
    absent = []
    for name, field in schema.model_fields.items():
        if name not in settings:
            absent.append(f"{where}{name}")
        for inner in (field.annotation, *get_args(field.annotation)):
            is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
            is_section = is_section and get_origin(field.annotation) is not dict
            if is_section and isinstance(settings.get(name), dict):
                absent += absent_settings(inner, settings[name], f"{where}{name}.")
    return absent


def test_every_setting_is_visible_in_conf() -> None:
    settings = OmegaConf.to_container(composed("generation=vllm"), resolve=True)
    assert isinstance(settings, dict)
    assert absent_settings(Config, settings, "") == []  # type: ignore[arg-type]


@pytest.mark.parametrize("section", ["data", "refinement", "teacher"])
def test_a_setting_with_keys_of_the_users_own_takes_them_like_any_other(section: str) -> None:
    kwargs = f"{section}.chat_template_kwargs"
    for override in (f"{kwargs}.enable_thinking=false", kwargs + "={enable_thinking: false}"):
        given = compose([override, f"+{kwargs}.further=1"])
        assert getattr(given, section).chat_template_kwargs == {
            "enable_thinking": False,
            "further": 1,
        }
    assert compose(["teacher.chat_template_kwargs={}"]).teacher.chat_template_kwargs == {}
    with pytest.raises(ConfigError, match=f"did you mean {kwargs}.x"):
        compose([f"{section}.chat_template_kwarg.x=1"])


def test_a_benchmark_takes_arguments_of_the_chat_template() -> None:
    overrides = ["benchmark=gsm8k", "benchmarks.gsm8k.path=p", "model.path=m"]
    thinking = "benchmarks.gsm8k.chat_template_kwargs.enable_thinking=false"
    config = compose_as(EvaluationConfig, [*overrides, thinking], "evaluate")
    assert config.benchmarks["gsm8k"].chat_template_kwargs == {"enable_thinking": False}


def test_value_left_open_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.path has no value.*Fix: set"):
        compose(["data=gsm8k"])


def test_module_imports_without_torch() -> None:
    code = "import sys, nemo_trd.config.load as c; c.compose([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configuration_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose([]).run.seed == 1234


LORA = ["student.adapter=lora"]
LORA_OPSD = [*LORA, *OPSD]
SERVER = ["generation=vllm", "teacher.scoring=server", "loss.top_k=20"]
NGRAM = "{method: ngram, tokens: 5, lookup_max: 4, lookup_min: 2}"
DRAFTS = ["generation=vllm", f"generation.vllm.teacher.server.speculation={NGRAM}"]
ROLLOUT = "algorithm.trajectory=rollout"
GENERATION = ["generation=vllm", "teacher.scoring=generation", "loss.top_k=20"]
GLOO = "generation.vllm.weight_sync.backend=gloo"
NO_TEACHERS = ["generation.vllm.teacher.replicas=0"]
ALONE = ["generation=vllm", "generation.vllm.weight_sync.what=adapter"]
REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    # overrides -> what the message says: field, value, rule, fix
    "unknown key": (
        ["train.num_step=3"],
        ("train.num_step = '3'", "unknown key", "did you mean train.num_steps?"),
    ),
    "unknown key appended": (
        ["+loss.divergense=jsd"],
        ("loss.divergense = 'jsd'", "unknown key", "did you mean loss.divergence?"),
    ),
    "unknown section": (
        ["trian.num_steps=3"],
        ("trian.num_steps = '3'", "unknown key", "did you mean train.num_steps?"),
    ),
    "unknown key like no other": (
        ["+teacher.x=1"],
        ("teacher.x = 1", "known keys here: chat_template_kwargs, ema, offload_states"),
    ),
    "unknown file": (["model=nope"], ("model/nope", "local", "toy")),
    "override without a value": (["train.num_steps"], ("train.num_steps", "missing EQUAL")),
    "text for a number": (
        ["train.num_steps=many"],
        ("train.num_steps = 'many'", "valid integer", "Fix: "),
    ),
    "fraction for a count": (
        ["train.num_steps=1.5"],
        ("train.num_steps = 1.5", "valid integer", "Fix: "),
    ),
    "number for a switch": (
        ["optimizer.distributed=1"],
        ("optimizer.distributed = 1", "valid boolean", "Fix: "),
    ),
    "count below one": (
        ["train.prompts_per_step=0"],
        ("train.prompts_per_step = 0", "greater than or equal to 1", "Fix: "),
    ),
    "learning rate of zero": (
        ["optimizer.lr=0"],
        ("optimizer.lr = 0", "greater than 0", "Fix: "),
    ),
    "unknown choice": (
        ["loss.divergence=kl"],
        ("loss.divergence = 'kl'", "'forward_kl'", "'jsd'", "Fix: "),
    ),
    "opd without a teacher": (
        ["model.teacher=null"],
        ("model.teacher = None", "distils a separate teacher", "set model.teacher.path"),
    ),
    "opsd with a teacher": (
        ["algorithm.mode=opsd"],
        ("model.teacher.path = 'runs/toy/teacher'", "frozen step-0", "model.teacher=null"),
    ),
    "opsd without reference solutions": (
        [*OPSD, "data.train.columns.reference_solution=null"],
        ("data.train.columns.reference_solution = None", "shows the reference", "name the column"),
    ),
    "an answer in the template": (
        [r"data.train.template='{problem} Give it as \boxed{answer}.'"],
        ("data.train.template = ", "{answer} would show", r"\boxed{} is an empty box"),
    ),
    "a reference solution in the template": (
        ["data.train.template='{problem} {solution}'"],
        ("data.train.template = ", "{solution} would show", "leave it out"),
    ),
    "two columns for the problem": (
        ["data.train.columns.messages=m"],
        ("data.train.columns.problem = 'problem'", "exactly one", "to null"),
    ),
    "no column for the problem": (
        ["data.validation.columns.problem=null"],
        ("data.validation.columns.problem = None", "exactly one", "to null"),
    ),
    "verifier without an answer": (
        ["data.train.columns.answer=null"],
        ("data.train.columns.answer = None", "verifier=exact", "answer_pattern"),
    ),
    "pattern without a text to search": (
        [
            "data.train.answer_pattern='####(.+)'",
            "data.train.columns.answer=null",
            "data.train.columns.reference_solution=null",
        ],
        (
            "data.train.answer_pattern = '####(.+)'",
            "searched in",
            "name columns.answer or columns.reference_solution",
        ),
    ),
    "subset without a verifier": (
        ["refinement.subset=wrong", "data.verifier=none"],
        ("refinement.subset = 'wrong'", "needs a verifier", "data.verifier=math"),
    ),
    "subset of nothing": (
        ["refinement.subset=right", "algorithm.trajectory=rollout"],
        ("refinement.subset = 'right'", "refines nothing", "subset=all"),
    ),
    "evaluation without problems": (
        ["evaluation.at_end=true", "data.validation=null"],
        ("data.validation = None", "problems to solve", "at_end=false"),
    ),
    "evaluation without a verifier": (
        ["evaluation.interval=5", "data.verifier=none"],
        ("data.verifier = 'none'", "a verifier", "interval=null"),
    ),
    "an adapter that there is not": (
        ["student.adapter=dora"],
        ("student.adapter = 'dora'", "Fix: "),
    ),
    "an adapter on a layer that there is not": (
        [*LORA, "student.adapter.targets=[q,lm_head]"],
        ("student.adapter.targets.1 = 'lm_head'", "'q', 'k', 'v', 'o', 'gate', 'up' or 'down'"),
    ),
    "an adapter on nothing": (
        [*LORA, "student.adapter.targets=[]"],
        ("student.adapter.targets = []", "at least 1 item"),
    ),
    "two adapters on one layer": (
        [*LORA, "student.adapter.targets=[q,v,q]"],
        ("student.adapter.targets = ['q', 'v', 'q']", "q is named twice", "name it once"),
    ),
    "an adapter of rank 0": (
        [*LORA, "student.adapter.rank=0"],
        ("student.adapter.rank = 0", "greater than or equal to 1"),
    ),
    "dropout of everything": (
        [*LORA, "student.adapter.dropout=1.0"],
        ("student.adapter.dropout = 1.0", "less than 1"),
    ),
    "servers of an adapter where there is none": (
        ALONE,
        ("weight_sync.what = 'adapter'", "student.adapter=null trains", "set it to merged"),
    ),
    "servers of an adapter where there are no servers": (
        [*LORA, "generation=local", ALONE[1]],
        ("generation.vllm.weight_sync.what = 'adapter': there is no section", "a file of conf/"),
    ),
    "an adapter of a rank that vLLM has no room for": (
        [*LORA, *ALONE, "student.adapter.rank=513"],
        ("student.adapter.rank = 513", "ranks of up to 512", "what=merged"),
    ),
    "servers of the student that are to answer otherwise for the teacher": (
        [*LORA_OPSD, *ALONE, *NO_TEACHERS, "generation.vllm.teacher.server.max_num_seqs=8"],
        ("teacher.server.max_num_seqs = 8", "student's servers", "student.server.max_num_seqs"),
    ),
    "a teacher without servers beside those of whole weights": (
        [*LORA_OPSD, "generation=vllm", *NO_TEACHERS],
        ("generation.vllm.teacher.urls = []", "exactly one of urls and replicas"),
    ),
    "a student's server with adapters of the user's": (
        ["generation=vllm", "generation.vllm.server.arguments=[--enable-lora]"],
        ("student.server.arguments = ['--enable-lora'", "weight_sync.what", "leave it out"),
    ),
    "a merged export without an adapter": (
        ["checkpoint.export_merged=true"],
        ("checkpoint.export_merged = True", "export/ has them", "set it to false"),
    ),
    "an adapter on weights with delayed scaling": (
        [*LORA, "precision.fp8=hybrid", "precision.fp8_recipe=delayed"],
        ("precision.fp8_recipe = 'delayed'", "their history", "set it to tensorwise"),
    ),
    "a teacher of opsd that begins with an adapter": (
        [*LORA_OPSD, "student.adapter.init=some/adapter"],
        ("student.adapter.init = 'some/adapter'", "without its adapter", "merge the adapter"),
    ),
    "one base split in two ways": (
        [*LORA_OPSD, "parallel.teacher.tensor_model_parallel_size=2"],
        ("parallel.teacher.tensor_model_parallel_size = 2", "split as that is", "set it to 1"),
    ),
    "one base in two precisions": (
        [*LORA_OPSD, "precision.teacher_fp8=e4m3"],
        ("precision.teacher_fp8 = 'e4m3'", "precision.fp8 = None", "set it to null"),
    ),
    "one base to put away": (
        [*LORA_OPSD, "teacher.offload_weights=true"],
        ("teacher.offload_weights = True", "no second copy", "set it to false"),
    ),
    "two sizes of a micro-batch": (
        ["train.micro_batch_size=4"],
        ("train.micro_batch_size = 4", "exactly one", "to null"),
    ),
    "no size of a micro-batch": (
        ["train.max_tokens_per_micro_batch=null"],
        ("train.micro_batch_size = None", "exactly one", "to null"),
    ),
    "rising learning rate": (
        ["optimizer.min_lr=1.0"],
        ("optimizer.min_lr = 1.0", "not exceed optimizer.lr = 5e-06", "lower it"),
    ),
    "beta that is not used": (
        ["loss.beta=0.1"],
        ("loss.beta = 0.1", "does not use it", "loss.divergence=jsd"),
    ),
    "estimate along rewrites": (
        ["loss.divergence=k1"],
        ("algorithm.trajectory = 'refinement'", "samples of the student", "set it to rollout"),
    ),
    "estimate from stored rollouts": (
        ["loss.divergence=k3", ROLLOUT, "generation=stored", "generation.stored.rollout=y"],
        ("generation.stored = 'y'", "before training", "set it to null"),
    ),
    "estimate over most likely tokens": (
        ["loss.divergence=k1", ROLLOUT, "loss.top_k=8"],
        ("loss.top_k = 8", "sampled token alone", "set it to null"),
    ),
    "estimate with a clip of entries": (
        ["loss.divergence=k3", ROLLOUT, "loss.entry_clip=0.1"],
        ("loss.entry_clip = 0.1", "sampled token alone", "set it to null"),
    ),
    "another model that follows": (
        ["teacher.ema=0.99"],
        ("teacher.ema = 0.99", "another model", "algorithm.mode=opsd"),
    ),
    "average that never moves": (
        [*OPSD, "teacher.ema=1.0"],
        ("teacher.ema = 1.0", "less than 1"),
    ),
    "average that is split in another way": (
        [*OPSD, "teacher.ema=0.99", "parallel.teacher.tensor_model_parallel_size=2"],
        ("parallel.teacher.tensor_model_parallel_size = 2", "with teacher.ema", "set it to 1"),
    ),
    "average that servers score with": (
        [*OPSD, *SERVER, "teacher.ema=0.99"],
        ("teacher.scoring = 'server'", "get no others", "set it to megatron"),
    ),
    "average that servers rewrite with": (
        [*OPSD, "generation=vllm", "teacher.ema=0.99"],
        ("generation.backend = 'vllm'", "rewrites changes", "algorithm.trajectory=rollout"),
    ),
    "interleaved teacher": (
        [
            "parallel.teacher.pipeline_model_parallel_size=4",
            "parallel.teacher.virtual_pipeline_model_parallel_size=2",
        ],
        ("parallel.teacher.virtual_pipeline_model_parallel_size = 2", "forward only", "to null"),
    ),
    "interleaving one stage": (
        ["parallel.student.virtual_pipeline_model_parallel_size=2"],
        ("parallel.student.virtual_pipeline_model_parallel_size = 2", "2 or more", "raise"),
    ),
    "two interleaved stages with batched p2p": (
        [
            "parallel.student.pipeline_model_parallel_size=2",
            "parallel.student.virtual_pipeline_model_parallel_size=2",
            "parallel.student.batch_p2p_comm=true",
        ],
        ("parallel.student.batch_p2p_comm = True", "silently wrong", "set it to false"),
    ),
    "servers without their settings": (
        ["generation.backend=vllm"],
        ("generation.backend = 'vllm'", "settings in generation.vllm", "generation=vllm"),
    ),
    "two sources of servers": (
        ["generation=vllm", "generation.vllm.student.urls=[http://a:1]"],
        ("generation.vllm.student.urls = ['http://a:1']", "exactly one", "replicas=0"),
    ),
    "too few GPUs for the servers": (
        [
            "generation=vllm",
            "generation.vllm.teacher.devices=[0,1,1]",
            "generation.vllm.teacher.replicas=3",
        ],
        ("generation.vllm.teacher.devices = [0, 1, 1]", "= 3 GPUs", "give that many"),
    ),
    "no server": (
        ["generation=vllm", "generation.vllm.teacher.replicas=0"],
        ("generation.vllm.teacher.urls = []", "exactly one", "replicas=0"),
    ),
    "one server twice": (
        [
            "generation=vllm",
            "generation.vllm.teacher.replicas=0",
            "generation.vllm.teacher.urls=[http://a:1,http://a:1]",
        ],
        ("generation.vllm.teacher.urls = 'http://a:1'", "given once", "correct the list"),
    ),
    "a call to a server longer than a collective": (
        ["generation=vllm", "parallel.timeout_minutes=2.0"],
        ("weight_sync.call_timeout_seconds = 120.0", "timeout_minutes = 2", "lower it"),
    ),
    "delayed scaling of a frozen teacher": (
        ["precision.teacher_fp8=e4m3", "precision.fp8_recipe=delayed"],
        ("precision.fp8_recipe = 'delayed'", "has none", "set it to tensorwise"),
    ),
    "delayed scaling in a pipeline": (
        [
            *("precision.fp8=hybrid", "precision.fp8_recipe=delayed"),
            "parallel.student.pipeline_model_parallel_size=2",
        ],
        ("precision.fp8_recipe = 'delayed'", "wait for each other", "set it to tensorwise"),
    ),
    "a scoring server without servers": (
        ["teacher.scoring=server", "loss.top_k=20"],
        ("teacher.scoring = 'server'", "backend=local has none", "choose generation=vllm"),
    ),
    "a scoring server and the full vocabulary": (
        [*SERVER, "loss.top_k=null"],
        ("loss.top_k = None", "most likely tokens", "set how many"),
    ),
    "a scoring server and a temperature": (
        [*SERVER, "loss.temperature=2.0"],
        ("loss.temperature = 2.0", "at temperature 1", "set it to 1"),
    ),
    "a scoring server that tells too little": (
        [*SERVER, "generation.vllm.server.arguments=[--max-logprobs,'19']"],
        ("generation.vllm.teacher.server.arguments", "loss.top_k = 20", "leave it out"),
    ),
    "a scoring server and a teacher to offload": (
        [*SERVER, "teacher.offload_weights=true"],
        ("teacher.offload_weights = True", "no teacher is held", "set it to false"),
    ),
    "a scoring server and a teacher in FP8": (
        [*SERVER, "precision.teacher_fp8=e4m3"],
        ("precision.teacher_fp8 = 'e4m3'", "no teacher is held", "set it to null"),
    ),
    "scores of rewrites without servers": (
        ["teacher.scoring=generation", "loss.top_k=20"],
        ("teacher.scoring = 'generation'", "backend=local has none", "choose generation=vllm"),
    ),
    "scores of rewrites and the full vocabulary": (
        [*GENERATION, "loss.top_k=null"],
        ("loss.top_k = None", "teacher.scoring=generation only", "set how many"),
    ),
    "scores of rewrites in another context": (
        [*GENERATION, "algorithm.teacher_context=prompt"],
        ("algorithm.teacher_context = 'prompt'", "the refinement prompt", "set it to refine"),
    ),
    "scores of rewrites through another template": (
        [*GENERATION, "teacher.chat_template_kwargs={enable_thinking: true}"],
        ("teacher.chat_template_kwargs = {", "in which the teacher wrote", "set it to null"),
    ),
    "scores of rewrites that nobody writes": (
        [*GENERATION, "algorithm.trajectory=rollout"],
        ("algorithm.trajectory = 'rollout'", "it writes nothing", "teacher.scoring=server"),
    ),
    "drafts of a student": (
        ["generation=vllm", f"generation.vllm.server.speculation={NGRAM}"],
        ("generation.vllm.student.server.speculation = {'method'", "copied", "teacher.server may"),
    ),
    "drafts and a least probability": (
        [*DRAFTS, "generation.refinement.min_p=0.1"],
        ("generation.refinement.min_p = 0.1", "vLLM does not take it", "set it to 0"),
    ),
    "drafts that are looked up by no token": (
        [*DRAFTS, "generation.vllm.teacher.server.speculation.lookup_max=null"],
        ("teacher.server.speculation.lookup_max = None", "the last tokens", "for example 4"),
    ),
    "drafts that are looked up by more tokens than at most": (
        [*DRAFTS, "generation.vllm.teacher.server.speculation.lookup_min=5"],
        ("speculation.lookup_min = 5", "may not exceed lookup_max = 4", "lower it"),
    ),
    "drafts of more tokens than vLLM takes": (
        [*DRAFTS, "generation.vllm.teacher.server.speculation.tokens=129"],
        ("server.speculation.tokens = 129", "no more than 128 tokens", "lower it"),
    ),
    "drafts of another method": (
        [*DRAFTS, "generation.vllm.teacher.server.speculation.method=suffix"],
        ("speculation.lookup_max = 4", "method suffix", "lookup_min to null"),
    ),
    **{
        f"a sampling setting that is off as elsewhere: {setting}": (
            [f"generation.rollout.{setting}"],
            (f"generation.rollout.{setting.split('=')[0]} = ", f"no such value, {off} is off"),
        )
        for setting, off in (
            *(("top_k=-1", "0"), ("top_p=0", "1"), ("min_p=-1", "0"), ("top_k=null", "0")),
            *(("repetition_penalty=0", "1"), ("presence_penalty=null", "0"), ("stop=null", "[]")),
        )
    },
    "a penalty that vLLM does not take": (
        ["evaluation.sampling.presence_penalty=2.5"],
        ("evaluation.sampling.presence_penalty = 2.5", "less than or equal to 2"),
    ),
    "a stop without a letter": (
        ["generation.refinement.stop=['']"],
        ("generation.refinement.stop.0 = ''", "at least 1 character"),
    ),
    **{
        f"one server for both models, as {url}": (
            [
                *("generation=vllm_nodes", "generation.vllm.student.urls=['http://node1:80']"),
                f"generation.vllm.teacher.urls=[http://t:1,'{url}']",
            ],
            (f"generation.vllm.teacher.urls = '{url}'", "http://node1:80", "the teacher alone"),
        )
        for url in ("http://node1:80", "http://NODE1", "http://node1.:80")
    },
    "one server for both models of opsd": (
        [
            *("generation=vllm_nodes", "algorithm.mode=opsd", "model.teacher=null"),
            *("data.train.columns.reference_solution=solution",),
            "generation.vllm.student.urls=['http://localhost:8000']",
            "generation.vllm.teacher.urls=['http://127.0.0.1:8000']",
        ],
        ("generation.vllm.teacher.urls = 'http://127.0.0.1:8000'", "after every step"),
    ),
    "a server at no port": (
        ["generation=vllm_nodes", "generation.vllm.student.urls=['http://a:port']"],
        ("generation.vllm.student.urls = 'http://a:port'", "correct the list"),
    ),
    "a quantized student": (
        ["generation=vllm", "generation.vllm.server.quantization=fp8"],
        ("generation.vllm.student.server.quantization = 'fp8'", "set it to null for the student"),
    ),
    "a quantized student by an argument": (
        ["generation=vllm", "generation.vllm.student.server.arguments=[--quantization,awq]"],
        ("generation.vllm.student.server.arguments", "leave it out of arguments"),
    ),
    "GPUs of the teacher's servers alone": (
        [
            *("generation=vllm", "generation.vllm.teacher.server.tensor_parallel_size=2"),
            *("generation.vllm.student.devices=[0]", "generation.vllm.teacher.devices=[1]"),
        ],
        ("teacher.devices = [1]", "generation.vllm.teacher.server.tensor_parallel_size = 2 GPUs"),
    ),
    "turns with servers of nobody": (
        ["generation.colocate=true"],
        ("generation.colocate = True", "backend local has none", "choose generation=vllm"),
    ),
    "turns while both work": (
        ["generation=vllm", "generation.colocate=true", "generation.max_staleness=1"],
        ("generation.max_staleness = 1", "servers sleep", "set it to 0"),
    ),
    "turns with NCCL": (
        ["generation=vllm", "generation.colocate=true"],
        ("generation.vllm.weight_sync.backend = 'nccl'", "one GPU", "set it to gloo or file"),
    ),
    "turns with servers elsewhere": (
        ["generation=vllm_nodes", "generation.colocate=true", GLOO],
        ("generation.vllm.student.urls", "on the GPUs of its ranks", "set replicas"),
    ),
    "turns with a teacher that stays": (
        ["generation=vllm", "generation.colocate=true", GLOO],
        ("teacher.offload_weights = False", "give their memory", "set it to true"),
    ),
    "a setting of a role that there is not": (
        ["generation=vllm", "+generation.vllm.teacher.server.max_model_length=5"],
        ("generation.vllm.teacher.server.max_model_length", "did you mean", "max_model_len?"),
    ),
    "sequence parallelism of one rank": (
        ["parallel.teacher.sequence_parallel=true"],
        ("parallel.teacher.sequence_parallel = True", "there is one", "raise tensor_model"),
    ),
}


def test_an_adapter_is_chosen_by_its_name_and_its_settings_changed() -> None:
    assert compose([]).student.adapter is None
    adapter = compose(["student.adapter=lora", "student.adapter.rank=8"]).student.adapter
    assert adapter is not None and (adapter.kind, adapter.rank, adapter.alpha) == ("lora", 8, 128)
    assert compose(["student.adapter=lora", "student.adapter=null"]).student.adapter is None
    smollm2 = ["experiment=smollm2_gsm8k", "data.train.path=x"]
    assert compose([*smollm2, "student.adapter=lora"]).teacher_is_student


@pytest.mark.parametrize("case", REFUSED)
def test_setting_that_breaks_a_rule_is_refused(case: str) -> None:
    overrides, parts = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        compose(overrides)
    for part in parts:
        assert part in str(refused.value)


def test_servers_of_a_role_inherit_what_is_not_set_for_them() -> None:
    common = ["tensor_parallel_size=2", "max_model_len=100", "arguments=[--a]", "dtype=bf16"]
    own = [
        *("teacher.server.tensor_parallel_size=8", "teacher.server.max_model_len=null"),
        *("teacher.server.quantization=fp8", "student.server.arguments=[--b]"),
    ]
    vllm = compose(
        ["generation=vllm_nodes"]
        + [f"generation.vllm.server.{setting}" for setting in common]
        + [f"generation.vllm.{setting}" for setting in own]
    ).generation.vllm
    assert vllm is not None
    expected = {"tensor_parallel_size": 2, "max_model_len": 100, "arguments": ["--a"]}
    assert expected.items() <= vllm.server.model_dump().items()
    assert vllm.student.server == vllm.server.model_copy(update={"arguments": ["--b"]})
    different: dict[str, Any]
    different = {"tensor_parallel_size": 8, "max_model_len": None, "quantization": "fp8"}
    different["speculation"] = vllm.teacher.server.speculation  # the group's own
    assert different["speculation"] is not None and vllm.server.speculation is None
    assert vllm.teacher.server == vllm.server.model_copy(update=different)


def test_one_stop_may_be_given_without_a_list() -> None:
    assert compose(["generation.rollout.stop=END"]).generation.rollout.stop == ["END"]


def settings_of(
    schema: type[BaseModel], kind: type, where: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Where the schema has settings of this type."""
    for name, field in schema.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if inner is kind or kind in get_args(inner):
                yield (*where, name)
            elif isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from settings_of(inner, kind, (*where, name))


def with_value(settings: dict[str, Any], where: tuple[str, ...], value: object) -> dict[str, Any]:
    name, *rest = where
    inner = with_value(settings[name] or {}, tuple(rest), value) if rest else value
    return {**settings, name: inner}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(value: float) -> None:
    """Booleans aside, any number may be a float: those that are counts refuse them as such."""
    settings = OmegaConf.to_container(composed("generation=vllm"), resolve=True)
    assert isinstance(settings, dict)
    places = list(settings_of(Config, float))
    assert {("optimizer", "lr"), ("loss", "temperature"), ("cluster", "disk_gib")} <= set(places)
    places += [("data", "chat_template_kwargs", "budget"), ("optimizer", "betas")]
    for where in places:
        given = [value, 0.9] if where[-1] == "betas" else value
        with pytest.raises(ConfigError, match=re.escape(f"{'.'.join(where[:2])}")):
            validate(with_value(settings, where, given))


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_path_is_refused_wherever_it_stands(value: str) -> None:
    """It would be the current directory."""
    settings = OmegaConf.to_container(composed("generation=vllm"), resolve=True)
    assert isinstance(settings, dict)
    for field in (
        *("run.dir", "model.student.path", "model.teacher.path", "data.train.path"),
        *("data.validation.path", "checkpoint.resume", "generation.vllm.server.python"),
        *("generation.vllm.weight_sync.directory", "generation.vllm.api_key_file"),
        *("generation.vllm.host", "generation.vllm.api_key_env"),
    ):
        with pytest.raises(ConfigError, match=f"{field} = {value!r}: it may not be empty"):
            validate(with_value(settings, tuple(field.split(".")), value))
    evaluation = OmegaConf.to_container(with_placeholders(composed(config_name="evaluate")))
    assert isinstance(evaluation, dict)
    for field in ("output", "model.path", "model.hf_path"):
        with pytest.raises(ConfigError, match=f"{field} = {value!r}: it may not be empty"):
            validate_as(EvaluationConfig, with_value(evaluation, tuple(field.split(".")), value))


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["train.num_steps=0", "loss.temperature=-1.0", "+run.sead=1"])
    assert [line.split(" = ")[0] for line in str(refused.value).splitlines()] == [
        "run.sead",
        "loss.temperature",
        "train.num_steps",
    ]


def test_config_cannot_be_changed_after_validation() -> None:
    config = compose([])
    with pytest.raises(ValueError, match="frozen"):
        config.train.num_steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    [
        "parallel.student.tensor_model_parallel_size=2",
        "parallel.teacher.pipeline_model_parallel_size=2",
        "teacher.offload_states=true",
        "train.max_tokens_per_micro_batch=512",
        "train.recompute=full",
        "train.num_steps=7",
        "checkpoint.save_interval=1",
        "logging.progress=false",
        "evaluation.at_end=true",
        "generation.local.batch_size=1",
        "run.dir=elsewhere",
        "cluster.training_nodes=4",
    ],
)
def test_digest_does_not_depend_on_where_and_how_a_run_is_computed(override: str) -> None:
    assert compose([override]).digest() == compose_once([]).digest()


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=2",
        "algorithm.trajectory=rollout",
        "algorithm.teacher_context=prompt",
        "model.student.path=another",
        "loss.divergence=reverse_kl",
        "loss.top_k=8",
        "loss.temperature=2.0",
        "refinement.on_failure=rollout",
        "refinement.max_context_tokens=99",
        "refinement.chat_template_kwargs={}",
        "teacher.chat_template_kwargs={}",
        "loss.entry_clip=0.1",
        "student.moe_aux_loss_coeff=0.001",
        "data.max_prompt_tokens=32",
        "generation.rollout.temperature=1.0",
        "optimizer.lr=1.0",
        "train.prompts_per_step=8",
        "precision.dtype=fp32",
    ],
)
def test_digest_changes_with_what_changes_the_numbers(override: str) -> None:
    assert compose([override]).digest() != compose_once([]).digest()


def test_digest_changes_with_a_teacher_that_follows() -> None:
    assert compose([*OPSD, "teacher.ema=0.9"]).digest() != compose(OPSD).digest()


def test_servers_need_no_top_k_to_score_for_an_estimate() -> None:
    config = compose(["generation=vllm", "teacher.scoring=server", ROLLOUT, "loss.divergence=k1"])
    assert config.loss.top_k is None


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ([], False),
        (["temperature=1.0", "top_p=1.0", "top_k=0"], True),
        (["temperature=1.0", "top_p=1.0", "top_k=0", "min_p=0.1"], False),
        (["temperature=1.0", "top_p=1.0", "top_k=0", "repetition_penalty=1.1"], False),
    ],
)
def test_samples_are_of_the_whole_distribution_where_nothing_is_cut(
    changes: list[str], same: bool
) -> None:
    sampling = compose([f"generation.rollout.{change}" for change in changes]).generation.rollout
    assert sampling.draws_from(1.0) == same
    assert not sampling.draws_from(0.5)


def test_digest_does_not_depend_on_the_servers() -> None:
    servers = compose(["generation=vllm"])
    others = compose(["generation=vllm", "generation.vllm.student.replicas=2"])
    assert servers.digest() == others.digest() != compose([]).digest()


def test_digest_is_the_same_in_another_process() -> None:
    code = "from nemo_trd.config.load import compose; print(compose([]).digest())"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert output.stdout.decode().strip() == compose([]).digest()


PAPER = sorted(f.stem for f in (conf_dir() / "experiment").glob("paper_*.yaml"))


@pytest.mark.parametrize("recipe", PAPER)
def test_paper_recipes_have_the_published_settings(recipe: str) -> None:
    config = compose([f"experiment={recipe}"])
    opd, code, longer = (recipe.endswith(end) for end in ("_opd", "_code", "_32k"))
    adapter = config.student.adapter
    assert adapter is not None and (adapter.rank, adapter.alpha) == (64, 128)
    assert adapter.targets == list(get_args(TargetName))
    assert (config.optimizer.lr, config.optimizer.min_lr) == (5e-6, 5e-7)
    assert config.train.trajectories_per_step == 128
    problems = 25_443 if code else 40_000
    assert 0 <= config.train.num_steps * 128 - problems < 3 * 128  # one epoch
    assert config.algorithm.mode == ("opd" if opd else "opsd")
    assert config.teacher_source.path.endswith("Qwen3-8B") or not opd
    contexts = 18_432 if opd else 40_960 if longer else 22_528
    assert config.refinement.max_context_tokens == contexts
    sampling = config.evaluation.sampling
    assert (sampling.top_k, sampling.max_tokens) == (0, 16_384 if code else 38_912)
    assert ("\\boxed{}" in (config.data.train.template or "")) != code
    assert config.data.verifier == ("code" if code else "math")
    writes = config.refinement.chat_template_kwargs or config.data.chat_template_kwargs
    scores = config.teacher.chat_template_kwargs
    if recipe == "paper_qwen3_4b":  # Qwen3-4B-Instruct-2507 has no such switch
        assert not writes and scores is None
    else:
        assert (writes, scores) == ({"enable_thinking": False}, {"enable_thinking": True})


def test_a_validation_file_is_asked_in_the_words_of_training() -> None:
    assert compose(["data=deepscaler"]).data.validation is None
    data = compose(["data=deepscaler", "data.validation.path=aime24.jsonl"]).data
    assert data.validation is not None and data.validation.template == data.train.template
