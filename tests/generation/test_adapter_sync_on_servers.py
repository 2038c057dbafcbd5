"""LoRA adapters from Megatron to real vLLM servers, merged and alone.

What the servers answer is what the student says, and without the adapter what its base says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from safetensors.torch import load_file, save_file
from servers import VOCABULARY, settings_on
from synced_servers import (
    KEY,
    PROMPT,
    SERVER,
    TOLERANCE,
    complete,
    errors,
    next_token_error,
    sampled_tokens,
    settings,
    state,
    wait_until_sampled,
)
from tiny_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_trd.config.schema import Adapter
from nemo_trd.generation.weight_sync import WeightSync, WeightSyncError
from nemo_trd.models.peft import adapter_tensors, config_json, scale
from nemo_trd.serve.server import Server, start_all, stop_all
from nemo_trd.serve.worker import ADAPTER_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

Tensors = Iterable[tuple[str, torch.Tensor]]
ADAPTED = {"model": ADAPTER_NAME}  # what a request says that is answered with the adapter
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 32, "max_position_embeddings": 2048, "vocab_size": VOCABULARY},
}
# All layers, of the rank that the servers are started for; and a rank that vLLM does not know, a
# scale that is no power of two, and some targets of layers that vLLM computes in one.
WHOLE: dict[str, Any] = {"rank": 16, "alpha": 8.5, "rslora": False}
WHOLE["targets"] = ["q", "k", "v", "o", "gate", "up", "down"]
SUBSET = {"rank": 3, "alpha": 2.0, "rslora": True, "targets": ["q", "v", "up", "o"]}


def adapter_of(model: Path, own: dict[str, Any], seed: int) -> Adapter:
    """The settings of an adapter that is saved beside the model, where their `init` says."""
    directory = model.parent / f"adapter-{own['rank']}-{seed}"
    return Adapter(kind="lora", dropout=0.0, init=str(directory), **own)


def save_adapter(model: Path, adapter: Adapter, seed: int) -> None:
    """A random one, as PEFT has it."""
    generator, directory = torch.Generator().manual_seed(seed), Path(adapter.init)
    hf = AutoConfig.from_pretrained(model)
    expected = adapter_tensors(hf, adapter).items()
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in expected}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = json.dumps(config_json(hf, adapter, str(model)))
    (directory / "adapter_config.json").write_text(settings)


def scaled(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What is sent of an adapter."""
    tensors = load_file(Path(adapter.init) / "adapter_model.safetensors")
    return {n: t * scale(adapter) if ".lora_B." in n else t for n, t in tensors.items()}


@torch.no_grad()
def log_probs(model: Path, adapter: Adapter | None) -> torch.Tensor:
    """PEFT's, along the prompt: [positions, vocabulary]."""
    from peft import PeftModel

    hf: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        hf = PeftModel.from_pretrained(hf, adapter.init)
    return hf(torch.tensor([PROMPT])).logits[0].log_softmax(-1)


def started(model: Path, name: str, tp: int, rank: int | None, port: int = 0) -> Server:
    of_size = SERVER.model_copy(update={"tensor_parallel_size": tp})
    return Server(
        *(str(model), of_size, model.parent / f"{name}.log"),
        port=port,
        api_key=KEY,
        weight_backend="gloo",
        adapter_rank=rank,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    base = make_model(directory / "student", "qwen3", tokenizer=True, **SIZES)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(8)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for own, seed in product((WHOLE, SUBSET), (1, 2)):
        save_adapter(base, adapter_of(base, own, seed), seed)
    return base


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[dict[str, Server]]:
    """One of whole weights; two of adapters, one of them over two workers."""
    sizes = {"merged": (1, None), "tp1": (1, 16), "tp2": (2, 16)}
    of_name = {name: started(model, name, *size) for name, size in sizes.items()}
    start_all(list(of_name.values()))
    yield of_name
    stop_all(list(of_name.values()))


@pytest.fixture
def make_sync(model: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as made:

        def make(backend: str, urls: list[str], in_flight: str = "finish") -> WeightSync:
            sync = WeightSync(urls, settings(model.parent, backend, in_flight), KEY)
            made.callback(sync.close)
            return sync

        yield make


def test_servers_say_what_a_student_with_an_adapter_says_whichever_way_it_comes(
    model: Path, servers: dict[str, Server]
) -> None:
    places = {name: server.url for name, server in servers.items()}
    print(launch(2, sync_of_two_layouts, str(model), places)[-2500:])


def sync_of_two_layouts(directory: str, places: dict[str, str]) -> None:
    """On both ranks: through gloo from TP 2, through files from TP 1, two versions of each."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model, version = Path(directory), 0
    alone = [places["tp2"], places["tp1"]]
    for tp, backend, own in ((2, "gloo", WHOLE), (1, "file", SUBSET)):
        syncs = {
            what: WeightSync(urls, settings(model.parent / what, backend), KEY)
            for what, urls in (("adapter", alone), ("merged", [places["merged"]]))
        }
        for seed in (1, 2):
            version += 1
            student, expected, base = adapted_student(model, tp, adapter_of(model, own, seed))
            before = [next_token_error(url, expected, **ADAPTED) for url in alone]  # caches it
            before.append(next_token_error(places["merged"], expected))
            dist.barrier()  # a server that one rank has paused answers the other no more
            weights = {"adapter": student.export_scaled_adapter()}
            weights["merged"] = student.export_hf_weights()
            sent = {what: 0 for what in weights}
            for what, sync in syncs.items():
                sync.load_weights(counted(weights[what], sent, what), version)
                assert not sync.failures
            if dist.get_rank() == 0:
                after = [errors(url, expected, **ADAPTED) for url in alone]
                after.append(errors(places["merged"], expected))
                without = [errors(url, base) for url in alone]
                print(f"tp{tp} {backend} {max(after):.1e} {max(without):.1e} {sent}")
                assert max(*after, *without) < TOLERANCE < min(before)
                assert all(state(url) == (str(version), False) for url in places.values())
                file = Path(student.adapter.init) / "adapter_model.safetensors"
                assert sent["adapter"] == sum(t.nbytes for t in load_file(file).values())
                assert sent["adapter"] < sent["merged"] / 2
            dist.barrier()
        for sync in syncs.values():
            sync.close()
    dist.destroy_process_group()


def adapted_student(model: Path, tp: int, adapter: Adapter) -> tuple[Any, torch.Tensor, Any]:
    """The student; log-probabilities with its adapter, and of its base."""
    from model_checks import logits

    from nemo_trd.config.load import compose
    from nemo_trd.megatron.lora import adapter_off
    from nemo_trd.megatron.student import Student

    own = adapter.model_dump(exclude={"kind"}).items()
    split = f"tensor_model_parallel_size={tp}"
    student = Student(
        compose(
            [
                *("model=local", f"model.student.path={model}", f"model.teacher.path={model}"),
                *("student.adapter=lora", *(f"student.adapter.{k}={v}" for k, v in own)),
                *(f"parallel.student.{split}", f"parallel.teacher.{split}", "precision.dtype=fp32"),
            ]
        )
    )
    asked = torch.tensor([PROMPT]), student.hf.vocab_size, student.groups
    with_adapter = logits(student.models, *asked)[0].log_softmax(-1)
    with adapter_off(student.models):
        return student, with_adapter, logits(student.models, *asked)[0].log_softmax(-1)


def counted(tensors: Tensors, sent: dict[str, int], what: str) -> Tensors:
    for name, tensor in tensors:
        sent[what] += tensor.nbytes
        yield name, tensor


def damaged(tensors: dict[str, torch.Tensor], damage: str) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, tensor) in enumerate(tensors.items()):
        if damage == "broken off" and number == len(tensors) // 2:
            raise ZeroDivisionError("the export failed")
        hit = "layers.1.self_attn.v_proj.lora_B" in name
        if damage == "of another layer":
            name = name.replace("layers.1.", "layers.2.")
        if not (hit and damage == "half a pair"):
            yield name, tensor[:-1] if hit and damage == "of another shape" else tensor


def test_a_sync_that_fails_leaves_no_server_that_answers_and_a_later_one_repairs_it(
    model: Path, servers: dict[str, Server], make_sync: Any
) -> None:
    urls = [servers["tp2"].url, servers["tp1"].url]
    first, second = (adapter_of(model, WHOLE, seed) for seed in (1, 2))
    sync = make_sync("gloo", urls)
    v_proj = "not all tensors came, or wrong ones, for ['model.layers.1.self_attn.v_proj [64, 64]'"
    for damage, told in (
        ("half a pair", v_proj),
        ("of another shape", v_proj),
        ("of another layer", "model.layers.2.mlp.down_proj, which this model has not"),
        ("broken off", "the tensors ended with ZeroDivisionError"),
        ("whole weights", "lm_head.weight is of no adapter, and this server takes nothing else"),
    ):
        tensors = damaged(scaled(second), damage)
        if damage == "whole weights":
            tensors = iter([("lm_head.weight", torch.zeros(VOCABULARY, 64))])
        with pytest.raises((WeightSyncError, ZeroDivisionError)):
            sync.load_weights(tensors, 50)
        for url in urls:
            assert state(url) == ("incomplete", True) and not sync.is_current(url)
            assert told in sync.failures[url], sync.failures[url]
    sync.load_weights(scaled(first).items(), 51)
    assert not sync.failures
    expected = log_probs(model, first)
    assert all(errors(url, expected, **ADAPTED) < TOLERANCE for url in urls)

    whole = make_sync("gloo", [servers["merged"].url])
    with pytest.raises(WeightSyncError, match="is of an adapter, and this server takes whole"):
        whole.load_weights(scaled(first).items(), 52)
    assert state(servers["merged"].url) == ("incomplete", True)
    whole.load_weights(load_file(model / "model.safetensors").items(), 53)
    assert errors(servers["merged"].url, log_probs(model, None)) < TOLERANCE


def test_kept_requests_go_on_with_the_new_adapter(
    model: Path, servers: dict[str, Server], make_sync: Any
) -> None:
    url = servers["tp1"].url
    sync = make_sync("gloo", [url], "keep")
    old_adapter, new_adapter = (scaled(adapter_of(model, WHOLE, seed)) for seed in (1, 2))
    ask = partial(complete, url, max_tokens=600, ignore_eos=True, **ADAPTED)
    for version in range(60, 70):  # on a busy machine the request may have ended before the sync
        sync.load_weights(old_adapter.items(), version)
        old = ask(PROMPT)["token_ids"]
        with ThreadPoolExecutor(1) as thread:
            before = sampled_tokens(url)
            request = thread.submit(ask, PROMPT)
            wait_until_sampled(url, before + 20)
            sync.load_weights(new_adapter.items(), version + 100)
            answer = request.result(300)
        assert not sync.failures
        if answer["token_ids"] != old:
            break
    tokens = answer["token_ids"]
    assert answer["finish_reason"] == "length" and len(tokens) == len(old)
    same = next(i for i, pair in enumerate(zip(tokens, old, strict=True)) if pair[0] != pair[1])
    assert same > 0
    # The adapter may have changed before the first token that differs, and not after it.
    for at in range(same, -1, -1):
        if ask(PROMPT + tokens[:at], max_tokens=len(old) - at)["token_ids"] == tokens[at:]:
            return
    pytest.fail("the rest is not what the new adapter says")


def test_requests_with_and_without_the_adapter_are_computed_in_one_step(
    model: Path, servers: dict[str, Server], make_sync: Any
) -> None:
    url = servers["tp1"].url
    sync = make_sync("file", [url])
    sync.load_weights(scaled(adapter_of(model, SUBSET, 1)).items(), 80)
    ask = partial(complete, url, PROMPT, max_tokens=60, ignore_eos=True, logprobs=1)
    alone = [ask(**of) for of in ({}, ADAPTED)]
    assert alone[0]["token_ids"] != alone[1]["token_ids"]
    with ThreadPoolExecutor(6) as threads:
        together = [threads.submit(ask, **of) for of in [{}, ADAPTED] * 3]
    for number, answer in enumerate(together):
        expected, found = alone[number % 2], answer.result()
        assert found["token_ids"] == expected["token_ids"], number
        both = (torch.tensor(a["logprobs"]["token_logprobs"]) for a in (expected, found))
        torch.testing.assert_close(*both, rtol=0, atol=TOLERANCE)


def run_in_turn(runs: list[list[str]]) -> None:
    from nemo_trd.config.load import compose
    from nemo_trd.train import launch

    for overrides in runs:
        assert launch(compose(overrides)) == 0


def test_in_opsd_the_servers_of_the_student_rewrite_and_score_without_its_adapter(
    model: Path, servers: dict[str, Server], tmp_path: Path
) -> None:
    """The second run has its teacher in Megatron: the base, by other means."""
    own = settings_on(model.parent, {"student": servers["tp1"].url}, tmp_path / "on_servers")
    own = [s for s in own if not s.startswith("model.teacher.path")]
    own += ["algorithm.mode=opsd", "model.teacher=null", "train.num_steps=3", "optimizer.lr=1e-2"]
    own += ["student.adapter=lora", "student.adapter.rank=16", "checkpoint.export_hf=false"]
    own += ["generation.vllm.weight_sync.what=adapter", "generation.vllm.teacher.replicas=0"]
    own += ["loss.top_k=64", "refinement.max_context_tokens=400"]
    own += ["refinement.templates.opsd='{problem} {reference_solution} {rollout}'"]
    in_megatron = [*own, f"run.dir={tmp_path / 'in_megatron'}"]
    key = {"NEMO_TRD_API_KEY": KEY.get_secret_value()}
    launch(1, run_in_turn, [[*own, "teacher.scoring=generation"], in_megatron], environment=key)
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("on_servers", "in_megatron")
    }
    for scored, computed in zip(lines["on_servers"], lines["in_megatron"], strict=True):
        assert scored["logprob_difference_max"] < TOLERANCE
        assert scored["loss"] == pytest.approx(computed["loss"], rel=1e-4), (scored, computed)
        assert scored["label_tokens"] == computed["label_tokens"]
    first, *_, last = lines["on_servers"]
    assert abs(first["loss"] - last["loss"]) > 1e-3  # the adapter does something


@pytest.mark.slow
def test_a_server_that_starts_again_loads_its_base_and_is_given_the_adapter(
    model: Path, servers: dict[str, Server], make_sync: Any
) -> None:
    adapter, victim = adapter_of(model, SUBSET, 1), servers["tp1"]
    sync = make_sync("file", [victim.url])
    sync.load_weights(scaled(adapter).items(), 72)
    victim.stop()
    servers["tp1"] = started(model, "tp1", 1, 16, victim.port)
    with servers["tp1"] as again:
        assert not sync.is_current(again.url)
        assert errors(again.url, log_probs(model, None), **ADAPTED) < TOLERANCE
        assert sync.update_replica(again.url)
        assert state(again.url) == ("72", False)
        assert errors(again.url, log_probs(model, adapter), **ADAPTED) < TOLERANCE
