"""Weight sync from Megatron to real vLLM servers: what they answer is what the student says.

With backend nccl both sides call a stand-in of libnccl (tests/support/fake_nccl.c): NCCL itself
needs GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_nccl import compile_fake_nccl, use_fake_nccl
from launch import launch
from pydantic import SecretStr
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

from nemo_trd.config.schema import Layout, VllmServer
from nemo_trd.generation.weight_sync import WeightSync
from nemo_trd.serve.server import Server, start_all, stop_all

pytestmark = pytest.mark.vllm

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32} | SMALL,
    "llama": {"head_dim": 80, "tie_word_embeddings": True} | SMALL,
    "qwen3_moe": {"head_dim": 32, "mlp_only_layers": [0]} | SMALL,
}
Export = Callable[[int], Iterator[tuple[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of three seeds per architecture. The servers start with seed 0."""
    root = tmp_path_factory.mktemp("models")
    for architecture, shape in MODELS.items():
        for seed in range(3):
            make_model(
                root / f"{architecture}-{seed}", architecture, seed=seed, tokenizer=True, **shape
            )
    return root


@pytest.fixture(scope="module", autouse=True)
def fake_nccl(directory: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        library = compile_fake_nccl(directory)
        use_fake_nccl(monkeypatch, library)
        monkeypatch.setenv("VLLM_NCCL_SO_PATH", str(library))
        yield


@pytest.fixture(scope="module")
def servers(directory: Path, fake_nccl: None) -> Iterator[dict[str, Server]]:
    """Two replicas of a Qwen3, one of them over two workers, and one of each other model."""
    two_workers = SERVER.model_copy(update={"tensor_parallel_size": 2})
    started = {
        "tp1": _server(directory / "qwen3-0", SERVER, directory / "tp1.log"),
        "tp2": _server(directory / "qwen3-0", two_workers, directory / "tp2.log"),
    }
    for other in ("llama", "qwen3_moe"):
        started[other] = _server(directory / f"{other}-0", SERVER, directory / f"{other}.log")
    start_all(list(started.values()))
    yield started
    stop_all(list(started.values()))


def _server(model: Path, settings: VllmServer, log: Path, port: int = 0) -> Server:
    return Server(str(model), settings, log, port=port, api_key=KEY, weight_backend="gloo")


@pytest.fixture(scope="module")
def replicas(servers: dict[str, Server]) -> list[str]:
    return [servers["tp2"].url, servers["tp1"].url]


@pytest.fixture(scope="module")
def student(directory: Path, one_rank: Any) -> Callable[[str], _Student]:
    return lambda architecture: _Student(directory, architecture, one_rank)


class _Student:
    """A Megatron model of one rank, with the weights of a seed."""

    def __init__(self, directory: Path, architecture: str, groups: Any) -> None:
        from model_checks import FP32

        from nemo_trd.megatron.model import build_model, load_hf_config

        self.path = lambda seed: str(directory / f"{architecture}-{seed}")
        self.hf = load_hf_config(self.path(0))
        layout = Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        self.models = build_model(self.hf, layout, groups, FP32)
        self.groups = groups

    def load(self, seed: int) -> None:
        from nemo_trd.megatron.hf_weights import load_hf_weights

        load_hf_weights(self.models, self.hf, self.path(seed), self.groups)

    def export(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        from nemo_trd.megatron.hf_weights import export_hf_weights

        self.load(seed)
        return export_hf_weights(self.models, self.hf, self.groups)

    def log_probs(self, seed: int, tokens: Sequence[int]) -> torch.Tensor:
        """[positions, vocabulary]"""
        from model_checks import logits

        self.load(seed)
        one = torch.tensor([list(tokens)])
        return logits(self.models, one, self.hf.vocab_size, self.groups)[0].log_softmax(-1)


@pytest.fixture
def make_sync(directory: Path, replicas: list[str]) -> Iterator[Callable[..., WeightSync]]:
    with contextlib.ExitStack() as made:

        def make(backend: str, in_flight: str = "finish", urls: Any = replicas) -> WeightSync:
            sync = WeightSync(urls, settings(directory, backend, in_flight), KEY)
            made.callback(sync.close)
            return sync

        yield make


@pytest.mark.parametrize(
    ("backend", "in_flight"),
    [("gloo", "finish"), ("gloo", "keep"), ("file", "finish"), ("file", "keep"), ("nccl", "keep")],
)
def test_after_a_sync_both_replicas_answer_with_the_new_weights(
    replicas: list[str], student: Any, make_sync: Any, backend: str, in_flight: str
) -> None:
    model = student("qwen3")
    sync = make_sync(backend, in_flight)
    for version, seed in enumerate((1, 2)):
        expected = model.log_probs(seed, PROMPT)
        before = [next_token_error(url, expected) for url in replicas]  # caches the prompt
        sync.load_weights(model.export(seed), 10 + version)
        assert not sync.failures
        for url, error_before in zip(replicas, before, strict=True):
            assert state(url) == (str(10 + version), False)
            assert sync.is_current(url)
            error = errors(url, expected)
            print(f"{backend} {in_flight} {error:.1e}, before the sync {error_before:.1e}")
            assert error < TOLERANCE < error_before


@pytest.mark.parametrize("backend", ["gloo", "file"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_tied_embeddings_and_experts_take_new_weights(
    servers: dict[str, Server], student: Any, make_sync: Any, architecture: str, backend: str
) -> None:
    model, url = student(architecture), servers[architecture].url
    sync = make_sync(backend, urls=[url])
    for seed in (1, 2):
        expected = model.log_probs(seed, PROMPT)
        before = next_token_error(url, expected)
        sync.load_weights(model.export(seed), seed)
        error = errors(url, expected)
        print(f"{architecture} {backend} {error:.1e}, before the sync {before:.1e}")
        assert error < TOLERANCE < before


def test_weights_come_from_tensor_and_pipeline_parallel_ranks(
    directory: Path, replicas: list[str]
) -> None:
    output = launch(4, sync_from_four_ranks, str(directory), replicas)
    print(output[-1500:])


def sync_from_four_ranks(directory: str, replicas: list[str]) -> None:
    import torch.distributed as dist
    from model_checks import FP32, logits

    from nemo_trd.generation.weight_sync import WeightSyncError
    from nemo_trd.megatron.hf_weights import export_hf_weights, load_hf_weights
    from nemo_trd.megatron.model import build_model, load_hf_config
    from nemo_trd.megatron.process_groups import process_groups

    dist.init_process_group("gloo")
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    groups = process_groups(layout)
    hf = load_hf_config(f"{directory}/qwen3-0")
    models = build_model(hf, layout, groups, FP32)

    def export(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        load_hf_weights(models, hf, f"{directory}/qwen3-{seed}", groups)
        return export_hf_weights(models, hf, groups)

    for seed, backend in ((1, "gloo"), (2, "file")):
        sync = WeightSync(replicas, settings(Path(directory), backend), KEY)
        sync.load_weights(export(seed), 20 + seed)
        expected = logits(models, torch.tensor([PROMPT]), hf.vocab_size, groups)[0].log_softmax(-1)
        for url in replicas:
            assert sync.is_current(url) and not sync.failures  # on every rank
            if dist.get_rank() == 0:
                error = errors(url, expected)
                print(f"tp2 pp2 {backend} {error:.1e}")
                assert error < TOLERANCE
        # A failure on the sending rank reaches all, and all have taken part to the end.
        nobody = WeightSync(["http://127.0.0.1:9"], settings(Path(directory), backend), KEY)
        with pytest.raises(WeightSyncError, match="http://127.0.0.1:9: pause: ConnectError"):
            nobody.load_weights(export(seed), 30)
        dist.barrier()
        sync.close()
    dist.destroy_process_group()


def half_of(tensors: Iterator[tuple[str, torch.Tensor]], then: Callable[[], None]) -> Any:
    """All tensors; calls `then` after about half of them."""
    for number, item in enumerate(tensors):
        if number == 12:
            then()
        yield item


def _break() -> None:
    raise ZeroDivisionError("the export failed")


def test_when_the_export_breaks_off_no_replica_serves_a_mixture(
    replicas: list[str], student: Any, make_sync: Any
) -> None:
    model = student("qwen3")
    sync = make_sync("gloo")
    sync.load_weights(model.export(0), 40)
    with pytest.raises(ZeroDivisionError, match="the export failed"):
        sync.load_weights(half_of(model.export(1), _break), 41)
    for url in replicas:
        assert state(url) == ("incomplete", True)
        assert not sync.is_current(url)
        assert f"{url}: update_weights" in sync.failures[url]
    # The next sync is by another trainer, which knows nothing of this one.
    later = make_sync("gloo")
    later.load_weights(model.export(2), 42)
    expected = model.log_probs(2, PROMPT)
    assert not later.failures
    assert all(errors(url, expected) < TOLERANCE for url in replicas)
    # And the first, whose connections the other one has taken over, finds its way back.
    sync.load_weights(model.export(1), 43)
    assert not sync.failures
    assert all(errors(url, model.log_probs(1, PROMPT)) < TOLERANCE for url in replicas)


@pytest.mark.parametrize("backend", ["gloo", "file", "nccl"])
@pytest.mark.parametrize("damage", ["shape", "missing"])
def test_replicas_that_refuse_the_tensors_stay_paused_until_they_get_all(
    replicas: list[str], student: Any, make_sync: Any, backend: str, damage: str
) -> None:
    from nemo_trd.generation.weight_sync import WeightSyncError

    def damaged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.export(1):
            if "layers.1.mlp.up_proj" not in name:
                yield name, tensor
            elif damage == "shape":
                yield name, tensor[:-1]

    model = student("qwen3")
    sync = make_sync(backend)
    phase = "update_weights" if damage == "shape" else "finish_weight_update"
    with pytest.raises(WeightSyncError) as raised:
        sync.load_weights(damaged(), 50)
    for url in replicas:
        assert f"{url}: {phase}: " in str(raised.value)
        assert state(url) == ("incomplete", True)
    sync.load_weights(model.export(2), 51)
    expected = model.log_probs(2, PROMPT)
    assert all(errors(url, expected) < TOLERANCE for url in replicas)


def test_requests_in_flight_finish_with_the_old_weights(
    replicas: list[str], student: Any, make_sync: Any
) -> None:
    old, new, tokens, reason = _sync_during_a_request(
        replicas[1], student, make_sync("gloo", "finish", replicas[1:]), untouched=True
    )
    assert (tokens, reason) == (old, "length") and old != new


def test_requests_in_flight_are_kept_and_go_on_with_the_new_weights(
    replicas: list[str], student: Any, make_sync: Any
) -> None:
    url = replicas[1]
    old, _, tokens, reason = _sync_during_a_request(
        url, student, make_sync("gloo", "keep", replicas[1:])
    )
    assert reason == "length" and len(tokens) == len(old)
    same = next(i for i, pair in enumerate(zip(tokens, old, strict=True)) if pair[0] != pair[1])
    assert 0 < same < len(old)
    # The weights may have changed before the first token that differs, and not after it.
    for at in range(same, -1, -1):
        rest = complete(url, PROMPT + tokens[:at], max_tokens=len(old) - at, ignore_eos=True)
        if rest["token_ids"] == tokens[at:]:
            return
    pytest.fail("the rest is not what the new weights say")


def test_requests_in_flight_are_aborted_with_what_they_have(
    replicas: list[str], student: Any, make_sync: Any
) -> None:
    old, _, tokens, reason = _sync_during_a_request(
        replicas[1], student, make_sync("gloo", "abort", replicas[1:])
    )
    assert reason == "abort"
    assert 0 < len(tokens) < len(old)
    assert tokens == old[: len(tokens)]


def _sync_during_a_request(
    url: str, student: Any, sync: WeightSync, untouched: bool = False
) -> tuple[list[int], list[int], list[int], str]:
    """Greedy tokens of the old weights, of the new ones, of a request meanwhile, how that ended.

    The sync begins when the request has some tokens. On a busy machine the request may have ended
    by then: unless it is to be `untouched`, that is tried again.
    """
    model = student("qwen3")
    length = {"max_tokens": 1200, "ignore_eos": True}
    following = [(name, tensor.clone()) for name, tensor in model.export(2)]
    for _ in range(10):
        sync.load_weights(model.export(1), 60)
        old = complete(url, PROMPT, **length)["token_ids"]
        with ThreadPoolExecutor(1) as thread:
            before = sampled_tokens(url)
            request = thread.submit(complete, url, PROMPT, **length)
            wait_until_sampled(url, before + 20)
            sync.load_weights(following, 61)
            answer = request.result(300)
        assert not sync.failures
        if untouched or answer["token_ids"] != old:
            break
    assert errors(url, model.log_probs(2, PROMPT)) < TOLERANCE
    new = complete(url, PROMPT, **length)["token_ids"]
    return old, new, answer["token_ids"], answer["finish_reason"]


def test_a_replica_killed_within_a_sync_does_not_stop_the_other_and_comes_back(
    directory: Path, servers: dict[str, Server], replicas: list[str], student: Any, make_sync: Any
) -> None:
    """SIGKILL between start and finish; then a restart, and both ways to be brought up to date."""
    model = student("qwen3")
    kept, killed = replicas
    by_gloo, by_file = make_sync("gloo"), make_sync("file")
    by_gloo.load_weights(model.export(0), 70)
    victim = servers["tp1"]
    by_gloo.load_weights(
        half_of(model.export(1), lambda: os.killpg(victim.pid, signal.SIGKILL)), 71
    )
    assert list(by_gloo.failures) == [killed]
    assert f"{killed}: update_weights: " in by_gloo.failures[killed]
    assert by_gloo.is_current(kept) and not by_gloo.is_current(killed)
    assert errors(kept, model.log_probs(1, PROMPT)) < TOLERANCE
    by_file.load_weights(model.export(2), 72)
    assert list(by_file.failures) == [killed]
    assert f"{killed}: pause: ConnectError" in by_file.failures[killed]
    victim.stop()
    port = int(killed.rpartition(":")[2])
    again = servers["tp1"] = _server(directory / "qwen3-0", SERVER, directory / "tp1.log", port)
    with again:
        assert not by_file.is_current(killed) and not by_gloo.update_replica(killed)
        assert by_file.update_replica(killed)
        assert state(killed) == ("72", False)
        assert errors(killed, model.log_probs(2, PROMPT)) < TOLERANCE
        by_gloo.load_weights(model.export(0), 73)
        assert not by_gloo.failures
        expected = model.log_probs(0, PROMPT)
        assert all(errors(url, expected) < TOLERANCE for url in replicas)


def test_a_wrong_key_is_refused_and_no_key_is_shown(
    servers: dict[str, Server], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from nemo_trd.generation.weight_sync import WeightSyncError

    caplog.set_level("DEBUG")
    wrong = SecretStr("another-key")
    url = servers["tp2"].url
    sync = WeightSync([url], settings(directory, "file"), wrong)
    with pytest.raises(WeightSyncError, match=f"{url}: pause: status 401") as raised:
        sync.load_weights(iter([("a", torch.zeros(1))]), 80)
    sync.close()
    shown = str(raised.value) + caplog.text
    shown += "".join(log.read_text() for log in directory.glob("*.log"))
    assert KEY.get_secret_value() not in shown
    assert wrong.get_secret_value() not in shown
