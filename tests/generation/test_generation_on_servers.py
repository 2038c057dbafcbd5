"""Generation on real vLLM servers: the samples, the faults, and what is left behind.

The tests of this file run in order: the last ones kill the servers that the first ones share.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from pydantic import SecretStr
from safetensors.torch import load_file
from servers import SERVER
from tiny_models import byte_tokenizer, make_model
from transformers import AutoModelForCausalLM

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import (
    LocalGeneration,
    ModelSource,
    Sampling,
    Speculation,
    VllmClient,
)
from nemo_trd.config.schema import WeightSync as WeightSyncSettings
from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.evaluate.main import main as evaluate_main
from nemo_trd.generation.api import (
    ARRAYS,
    GENERATE,
    Connection,
    Wanted,
    read_scores,
    scoring_body,
)
from nemo_trd.generation.identity import (
    ask,
    check_log_probabilities,
    check_name,
    check_weights_and_tokenizer,
)
from nemo_trd.generation.local import LocalGenerator
from nemo_trd.generation.pool import AllReplicasDown
from nemo_trd.generation.stop_strings import decoder
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.generation.weight_sync import WeightSync
from nemo_trd.models.vocabulary import read_vocabulary
from nemo_trd.serve.guard import descendants
from nemo_trd.serve.server import Server, ServerError, start_all, stop_all

pytestmark = pytest.mark.vllm

KEY = "key-of-the-generation-tests"
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, max_tokens=40)
SAMPLED = Sampling(temperature=0.8, top_p=0.95, top_k=50, max_tokens=40)
CLIENT = VllmClient(
    max_concurrency=8,
    request_timeout_seconds=300,
    max_attempts=5,
    backoff_seconds=0.1,
    max_backoff_seconds=1,
    recovery_timeout_seconds=60,
    stale_weights="retry",
)
# A third token besides the tokenizer's and the model's EOS that must end a completion; and
# defaults of a model, as Qwen3 has them, that must not join in.
GENERATION_CONFIG = {"eos_token_id": [3, 50], "temperature": 0.01, "top_k": 1, "top_p": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = {
        "qwen3": make_model(root / "qwen3", "qwen3", tokenizer=True, head_dim=32, **shape),
        "trained": make_model(
            root / "trained", "qwen3", tokenizer=True, head_dim=32, seed=1, **shape
        ),
        "llama": make_model(root / "llama", "llama", tokenizer=True, head_dim=64, **shape),
    }
    for directory in made.values():
        (directory / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    return made


@pytest.fixture(scope="module")
def servers(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Two replicas of one model."""
    logs = tmp_path_factory.mktemp("logs")
    replicas = [
        Server(
            str(models["qwen3"]),
            SERVER,
            logs / f"{name}.log",
            api_key=SecretStr(KEY),
            weight_backend="file",
        )
        for name in ("one", "two")
    ]
    start_all(replicas)
    yield replicas
    stop_all(replicas)
    for replica in replicas:
        assert session(replica.pid) == []


def weights_of(url: str) -> str | None:
    served = ask(url, SecretStr(KEY))
    assert served is not None
    return served.weights


def generator(
    *urls: str, model: Path, logprobs: bool = False, sync: WeightSync | None = None
) -> VllmGenerator:
    return VllmGenerator(
        urls,
        read_vocabulary(ModelSource(path=str(model))),
        CLIENT,
        api_key=SecretStr(KEY),
        logprobs=logprobs,
        sync=sync,
        decode=decoder(str(model), trust_remote_code=False),
    )


def requests(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Prompts of different lengths."""
    return [
        GenerationRequest(
            tuple((11 * i + 7 * j + seed) % 290 + 5 for j in range(3 + (i * 13) % 60)),
            seed=2**62 + 1000 * seed + i,
            affinity=i // 3,
        )
        for i in range(count)
    ]


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (session, command line) of all processes but zombies."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                found[int(entry.name)] = (int(fields[3]), command)
        except (OSError, ValueError):
            continue
    return found


def session(leader: int) -> list[int]:
    return [pid for pid, (session_id, _) in processes().items() if session_id == leader]


def wait_until_gone(leader: int, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while left := session(leader):
        assert time.monotonic() < limit, f"still running: {[processes().get(p) for p in left]}"
        time.sleep(0.1)


def assert_same_greedy_tokens(
    pool: VllmGenerator,
    model: Path,
    sampling: Sampling = GREEDY,
    reasons: frozenset[str] = frozenset({"stop", "length"}),
    asked: list[GenerationRequest] | None = None,
) -> None:
    asked = asked or requests(24)
    settings = LocalGeneration(batch_size=8, dtype="fp32")
    local = LocalGenerator(str(model), settings, trust_remote_code=False, progress=False)
    expected = local.generate(asked, sampling, "rollouts")
    assert {c.finish_reason for c in expected} >= reasons
    version = pool.weight_version
    assert pool.generate(asked, sampling, "rollouts") == [
        replace(completion, weight_version=version) for completion in expected
    ]


def test_local_and_vllm_give_the_same_greedy_completions(
    servers: list[Server], models: dict[str, Path]
) -> None:
    pool = generator(servers[0].url, model=models["qwen3"])
    assert_same_greedy_tokens(pool, models["qwen3"])
    penalized = GREEDY.model_copy(update={"repetition_penalty": 1.3, "presence_penalty": 0.5})
    # Prompts of text: vLLM takes the end of one that ends inside of a character for generated.
    asked = [
        GenerationRequest(tuple(5 + token % 90 for token in r.prompt_token_ids), r.seed)
        for r in requests(16)
    ]
    free = pool.generate(asked, penalized, "rollouts")
    assert free != pool.generate(asked, GREEDY, "rollouts")
    decode = decoder(str(models["qwen3"]), trust_remote_code=False)
    texts = [decode(completion.token_ids) for completion in free]
    seen = [c for text in texts for c in text[4:] if c.isascii() and c.isprintable()]
    stop = [seen[0], seen[-1], "never said"]  # the first two end some of these completions
    stopped = penalized.model_copy(update={"stop": stop})
    for sampling in (penalized, stopped):
        reasons = frozenset({"stop_string"} if sampling.stop else {"length"})
        assert_same_greedy_tokens(pool, models["qwen3"], sampling, reasons, asked)


def test_min_p_leaves_the_same_tokens_to_choose_from(
    servers: list[Server], models: dict[str, Path]
) -> None:
    least = SAMPLED.model_copy(update={"min_p": 0.4, "max_tokens": 12})
    pool = generator(servers[0].url, model=models["qwen3"])
    for request, completion in zip(
        requests(6), pool.generate(requests(6), least, "rollouts"), strict=True
    ):
        sequence = request.prompt_token_ids + completion.token_ids
        rows = reference_logprobs(models["qwen3"], sequence)[len(request.prompt_token_ids) - 1 :]
        # Of the ids that have a token; others are never sampled.
        probs = (rows[:, : len(byte_tokenizer())] / least.temperature).softmax(-1)
        sampled = probs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (sampled >= 0.4 * probs.amax(-1) * (1 - 1e-3)).all()


def test_a_server_is_asked_which_model_it_serves(
    servers: list[Server], models: dict[str, Path]
) -> None:
    served = ask(servers[0].url, SecretStr(KEY))
    assert served is not None and served.names == ("nemo_trd", str(models["qwen3"]))
    check_weights_and_tokenizer(served, byte_tokenizer())
    assert served.probe is not None and len(served.probe) > 20
    check_name(served, models["qwen3"], None)
    with pytest.raises(ConfigError, match="model.teacher.path is trained"):
        check_name(served, models["trained"], None)
    text = requests(5)[4].prompt_token_ids
    pool = generator(servers[0].url, model=models["qwen3"])
    (scores,) = pool.score([(text, 1)], Wanted(1), "check")
    reported, tokens = scores.label_logprobs.tolist(), [str(token) for token in text[1:]]
    for name, accepted in (("qwen3", True), ("trained", False)):
        rows = reference_logprobs(models[name], text)
        own = rows.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
        if accepted:
            assert check_log_probabilities(served, reported, own, 1e-3, tokens) < 1e-4
            continue
        with pytest.raises(ConfigError, match="differ from those of the teacher's weights"):
            check_log_probabilities(served, reported, own, 0.3, tokens)


def test_seeded_samples_do_not_depend_on_what_else_is_asked(
    servers: list[Server], models: dict[str, Path]
) -> None:
    few, more = requests(6), requests(40, seed=1)
    one = generator(servers[0].url, model=models["qwen3"])
    both = generator(*(server.url for server in servers), model=models["qwen3"])
    alone = one.generate(few, SAMPLED, "rollouts")
    assert one.generate(few, SAMPLED, "rollouts") == alone
    hot = SAMPLED.model_copy(update={"temperature": 2.0, "top_p": 1, "top_k": 0})
    wild = one.generate(few, hot, "rollouts")
    assert one.vocabulary.never == tuple(range(261, 300))  # columns of no token
    assert 200 < max(token for completion in wild for token in completion.token_ids) < 261
    assert both.generate([*more, *few], SAMPLED, "rollouts")[-6:] == alone
    other_seeds = [GenerationRequest(r.prompt_token_ids, r.seed + 1) for r in few]
    different = one.generate(other_seeds, SAMPLED, "rollouts")
    assert all(a.token_ids != b.token_ids for a, b in zip(alone, different, strict=True))


@torch.inference_mode()
def reference_logprobs(model: Path, token_ids: tuple[int, ...]) -> torch.Tensor:
    """log softmax of transformers' logits, [t - 1, v]: row i is the distribution of token i + 1."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return reference(torch.tensor([token_ids])).logits[0, :-1].double().log_softmax(-1)


def test_logprobs_of_samples_are_the_models_own(
    servers: list[Server], models: dict[str, Path]
) -> None:
    asked = requests(4)
    pool = generator(servers[1].url, model=models["qwen3"], logprobs=True)
    for request, completion in zip(asked, pool.generate(asked, SAMPLED, "rollouts"), strict=True):
        sequence = request.prompt_token_ids + completion.token_ids
        expected = reference_logprobs(models["qwen3"], sequence)[
            len(request.prompt_token_ids) - 1 :
        ]
        sampled = expected.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        assert completion.logprobs is not None
        assert (torch.tensor(completion.logprobs) - sampled).abs().max() < 1e-4


def test_scores_of_a_server_are_the_log_probabilities_of_transformers(
    servers: list[Server], models: dict[str, Path]
) -> None:
    sequences = [
        (r.prompt_token_ids, 1 + 5 * i) for i, r in enumerate(requests(10)) if i in (0, 4, 9)
    ]
    sequences = [(ids, min(start, len(ids) - 1)) for ids, start in sequences]
    pool = generator(*(server.url for server in servers), model=models["qwen3"])
    for (ids, start), scores in zip(
        sequences, pool.score(sequences, Wanted(8), "scores"), strict=True
    ):
        expected = reference_logprobs(models["qwen3"], ids)[start - 1 :]
        labels = torch.tensor(ids[start:])
        top = expected.topk(8)
        assert scores.top_ids.tolist() == top.indices.tolist()
        assert (torch.from_numpy(scores.top_logprobs) - top.values).abs().max() < 1e-4
        label_logprobs = expected.gather(1, labels[:, None]).squeeze(1)
        assert (torch.from_numpy(scores.label_logprobs) - label_logprobs).abs().max() < 1e-4


def test_scores_in_binary_are_those_in_json_within_520_bytes_a_label(
    servers: list[Server], models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The model has 300 columns of which 261 have a token: the others are left out by the server
    in one way, and by us in the other."""
    text, start = tuple((7 * i * i + i) % 261 for i in range(400)), 100
    wanted = Wanted(top_k=64, vocab_size=261, spare=32)
    body, url = scoring_body(text, start, wanted), servers[0].url
    key = {"Authorization": f"Bearer {KEY}"}

    def post(body: Any, **headers: str) -> httpx.Response:
        return httpx.post(url + GENERATE, json=body, headers=headers, timeout=60)

    answer = post(body, **key, Accept=ARRAYS)
    assert answer.headers["Content-Type"] == ARRAYS
    print(f"{len(answer.content) / (len(text) - start):.1f} bytes a label")
    assert len(answer.content) <= 520 * (len(text) - start)
    in_json, _ = read_scores(post(body, **key).json(), url, text, start, wanted)
    (in_binary,) = generator(url, model=models["qwen3"]).score([(text, start)], wanted, "scores")
    assert "as JSON" not in caplog.text
    assert in_binary.top_ids.tolist() == in_json.top_ids.tolist()
    assert in_binary.top_ids.max() < 261
    np.testing.assert_allclose(in_binary.top_logprobs, in_json.top_logprobs, atol=1e-6)
    np.testing.assert_allclose(in_binary.label_logprobs, in_json.label_logprobs, atol=1e-6)
    assert post(body, Accept=ARRAYS).status_code == 401
    refused = post({**body, "scores": {}}, **key, Accept=ARRAYS)
    assert refused.status_code == 400 and "start" in refused.text


@pytest.fixture(scope="module")
def drafting(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmGenerator]:
    """A generator on a server that checks drafts."""
    drafts = Speculation(method="ngram", tokens=4, lookup_max=3, lookup_min=1)
    settings = SERVER.model_copy(update={"speculation": drafts, "max_num_seqs": 64})
    log_file = tmp_path_factory.mktemp("drafting") / "log"
    with Server(str(models["qwen3"]), settings, log_file, api_key=SecretStr(KEY)) as server:
        client = CLIENT.model_copy(update={"max_concurrency": 64})
        vocabulary = read_vocabulary(ModelSource(path=str(models["qwen3"])))
        yield VllmGenerator(
            [server.url], vocabulary, client, api_key=SecretStr(KEY), drafts=True, wanted=Wanted(8)
        )


def drafted(completions: list[Completion]) -> tuple[int, int]:
    """Tokens that were drafted, and those of them that were accepted."""
    drafts = [completion.drafts for completion in completions]
    return sum(d[0] for d in drafts if d), sum(d[1] for d in drafts if d)


def test_drafts_change_no_token_at_temperature_0_nor_its_scores(
    servers: list[Server], models: dict[str, Path], drafting: VllmGenerator
) -> None:
    plain, asked = generator(servers[0].url, model=models["qwen3"]), requests(24, seed=5)
    rewrites = drafting.generate(asked, GREEDY, "rewrites")
    assert rewrites == plain.generate(asked, GREEDY, "rewrites")
    tried, accepted = drafted(rewrites)
    print(f"{accepted} of {tried} drafted tokens accepted")
    assert 0 < accepted < tried
    sequences = [
        (r.prompt_token_ids + c.token_ids, len(r.prompt_token_ids))
        for r, c in zip(asked, rewrites, strict=True)
    ]
    later = generator(servers[0].url, model=models["qwen3"]).score(sequences, Wanted(8), "scores")
    for rewrite, scores in zip(rewrites, later, strict=True):
        assert rewrite.scores is not None
        assert rewrite.scores.top_ids.tolist() == scores.top_ids.tolist()
        np.testing.assert_allclose(rewrite.scores.top_logprobs, scores.top_logprobs, atol=1e-4)
        np.testing.assert_allclose(rewrite.scores.label_logprobs, scores.label_logprobs, atol=1e-4)


@pytest.mark.slow
def test_drafts_leave_the_distribution_as_it_is(
    models: dict[str, Path], drafting: VllmGenerator
) -> None:
    """Three tokens, each of the three most likely ones, after a prompt in which these stand."""
    count, sampling = 600, Sampling(temperature=1, top_p=1, top_k=3, max_tokens=3)
    prompt = requests(2)[1].prompt_token_ids
    for _ in range(2):  # so that drafts are made, and some of them are good
        longer = drafting.generate([GenerationRequest(prompt, 0)], GREEDY, "a prompt")[0].token_ids
        prompt += tuple(token for token in longer if token not in (3, 50))
    model = AutoModelForCausalLM.from_pretrained(models["qwen3"], dtype=torch.float32)
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.inference_mode():
        for _ in range(3):
            extended = {}
            for path, probability in paths.items():
                logits = model(torch.tensor([prompt + path])).logits[0, -1, :261]
                top = logits.topk(3)
                shares = top.values.softmax(-1)
                for token, share in zip(top.indices.tolist(), shares.tolist(), strict=True):
                    extended[(*path, token)] = probability * share
            paths = extended
    asked = [GenerationRequest(prompt, seed) for seed in range(count)]
    rewrites = drafting.generate(asked, sampling, "rewrites")
    tried, accepted = drafted(rewrites)
    print(f"{accepted} of {tried} drafted tokens accepted")
    assert 50 < accepted < tried - 50
    found = Counter(rewrite.token_ids for rewrite in rewrites)
    assert not found.keys() - paths.keys()
    statistic = sum((found[path] - count * p) ** 2 / (count * p) for path, p in paths.items())
    freedom = len(paths) - 1
    print(f"chi-square {statistic:.1f} with {freedom} degrees of freedom")
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    again = drafting.generate(asked[:20], sampling, "rewrites")
    assert again == rewrites[:20]


def evaluated(
    model: Path, output: Path, *overrides: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The samples, in order, and the figures of an evaluation on a few problems."""
    problems = output.with_suffix(".jsonl")
    rows = [{"problem": f"{n}+1?", "answer": n + 1} for n in range(4)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.path={model}", f"output={output}", "benchmark=jsonl", "progress=false"]
    settings += [f"benchmarks.jsonl.path={problems}", "samples_per_problem=2"]
    settings += ["sampling.temperature=0", "sampling.max_tokens=40"]
    assert evaluate_main([*settings, *overrides]) == 0
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    found = json.loads((output / "results.json").read_text())["benchmarks"]["jsonl"]
    return sorted(lines, key=lambda line: (line["problem"], line["sample"])), found


def test_an_evaluation_on_servers_is_that_in_this_process(
    servers: list[Server],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NEMO_TRD_API_KEY", KEY)
    model = models["qwen3"]
    here = evaluated(model, tmp_path / "here", "generation.local.dtype=fp32")
    urls = ",".join(f"'{server.url}'" for server in servers)
    on_servers = ["generation.backend=vllm", f"generation.vllm.urls=[{urls}]"]
    there = evaluated(model, tmp_path / "there", *on_servers)
    assert there == here and here[0][0]["tokens"] > 1
    monkeypatch.setenv("NEMO_TRD_API_KEY", "another")
    stopped = [f"model.path={model}", f"output={tmp_path / 'refused'}", "benchmark=jsonl"]
    stopped += [f"benchmarks.jsonl.path={tmp_path / 'there.jsonl'}", "sampling.max_tokens=40"]
    capsys.readouterr()
    assert evaluate_main([*stopped, *on_servers]) == 1
    told = capsys.readouterr().err
    assert "refuses with status 401" in told and "start again to go on" in told


def test_an_evaluation_starts_servers_and_ends_them(
    servers: list[Server], models: dict[str, Path], tmp_path: Path
) -> None:
    model = models["qwen3"]
    here = evaluated(model, tmp_path / "here", "generation.local.dtype=fp32")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    vllm = ["replicas=1", "server.dtype=fp32", "server.max_model_len=512", "server.max_num_seqs=16"]
    own = [f"generation.vllm.{setting}" for setting in vllm]
    assert evaluated(model, tmp_path / "own", "generation.backend=vllm", *own) == here
    assert (tmp_path / "own/servers/server-0.log").exists()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_key_is_in_no_log_and_no_command_line(servers: list[Server]) -> None:
    assert all(KEY not in command for _, command in processes().values())
    for server in servers:
        text = server.log_file.read_text(errors="replace")
        assert "non-default args" in text and KEY not in text


def test_server_that_does_not_start_tells_the_end_of_its_log(
    models: dict[str, Path], tmp_path: Path
) -> None:
    settings = SERVER.model_copy(update={"arguments": ["--no-such-option"]})
    with pytest.raises(ServerError) as failed:
        Server(str(models["qwen3"]), settings, tmp_path / "log").__enter__()
    assert "ended with status 2" in str(failed.value) and str(tmp_path / "log") in str(failed.value)
    assert "--no-such-option" in str(failed.value)


def test_server_that_takes_too_long_is_stopped(models: dict[str, Path], tmp_path: Path) -> None:
    settings = SERVER.model_copy(update={"start_timeout_seconds": 2.0})
    server = Server(str(models["qwen3"]), settings, tmp_path / "log")
    with pytest.raises(ServerError, match=r"did not answer within 2 s"), server:
        pass
    assert session(server.pid) == []


def signal_when_busy(
    monkeypatch: pytest.MonkeyPatch, server: Server, number: signal.Signals
) -> list[str]:
    """Signal every process of a server when we ask it for the fourth completion from here on.

    It is stopped before it gets the second request, so it cannot have answered all it has. Returns
    the list of these requests, which grows.
    """
    call = Connection.call
    asked: list[str] = []

    async def call_and_signal(self: Any, method: str, url: str, path: str, *rest: Any) -> Any:
        if path == GENERATE and url == server.url:
            asked.append(path)
            if len(asked) == 2:
                os.killpg(server.pid, signal.SIGSTOP)
            if len(asked) == 4:
                os.killpg(server.pid, number)
        return await call(self, method, url, path, *rest)

    monkeypatch.setattr(Connection, "call", call_and_signal)
    return asked


def test_hanging_replica_costs_no_sample_and_is_used_again_when_it_goes_on(
    servers: list[Server],
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = requests(48, seed=3)
    pool = generator(*(server.url for server in servers), model=models["qwen3"])
    expected = pool.generate(asked, SAMPLED, "rollouts")
    pool._settings = CLIENT.model_copy(update={"request_timeout_seconds": 5.0})
    of_hanging = signal_when_busy(monkeypatch, servers[1], signal.SIGSTOP)
    try:
        assert pool.generate(asked, SAMPLED, "rollouts") == expected
        assert len(of_hanging) >= 4
        assert f"{servers[1].url} is out of service: no answer within 5 s" in caplog.text
    finally:
        os.killpg(servers[1].pid, signal.SIGCONT)
    before = count_requests(servers[1].url)
    assert pool.generate(asked, SAMPLED, "rollouts") == expected
    assert count_requests(servers[1].url) > before + 5


@pytest.mark.slow
def test_killed_replica_costs_no_sample_and_is_used_again_when_it_is_back(
    servers: list[Server],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = SAMPLED.model_copy(update={"max_tokens": 150})
    asked = requests(48, seed=2)
    urls = [server.url for server in servers]
    sync = WeightSync(urls, sync_settings(tmp_path), SecretStr(KEY))
    pool = generator(*urls, model=models["trained"], sync=sync)
    pool.load_weights(load_file(models["trained"] / "model.safetensors").items(), version=7)
    assert_same_greedy_tokens(pool, models["trained"])
    given = ask(urls[0], SecretStr(KEY))
    assert given is not None
    with pytest.raises(ConfigError, match=r"replaced \(version 7\)"):  # it is no teacher's
        check_weights_and_tokenizer(given, byte_tokenizer())
    expected = pool.generate(asked, long, "rollouts")
    assert {completion.weight_version for completion in expected} == {7}

    of_killed = signal_when_busy(monkeypatch, servers[1], signal.SIGKILL)
    assert pool.generate(asked, long, "rollouts") == expected
    assert len(of_killed) >= 4 and servers[1].exit_status() is not None
    wait_until_gone(servers[1].pid, 60)

    process, leader = start_by_command_line(models["qwen3"], servers[1].port, tmp_path)
    try:
        assert all(KEY not in command for _, command in processes().values())
        assert weights_of(servers[1].url) == "default"
        assert pool.generate(asked, long, "rollouts") == expected
        assert weights_of(servers[1].url) == "7"
        shares = [count_requests(server.url) for server in servers]
        assert shares[1] > 5, shares
    finally:  # what it started ends with it, although it cannot clean up
        process.kill()
        process.wait()
    wait_until_gone(leader, 60)
    assert KEY not in (tmp_path / "server.log").read_text(errors="replace")

    servers[0].stop()
    wait_until_gone(servers[0].pid, 10)
    pool._settings = CLIENT.model_copy(update={"recovery_timeout_seconds": 2.0})
    with pytest.raises(AllReplicasDown) as down:
        pool.generate(asked, long, "rollouts")
    assert all(f"{server.url}: ConnectError" in str(down.value) for server in servers)


def sync_settings(directory: Path) -> WeightSyncSettings:
    return WeightSyncSettings(
        backend="file",
        in_flight="finish",
        directory=str(directory / "weights"),
        bucket_bytes=1 << 16,
        pause_timeout_seconds=30,
        call_timeout_seconds=30,
        timeout_seconds=60,
    )


def start_by_command_line(model: Path, port: int, directory: Path) -> tuple[subprocess.Popen, int]:
    """`serve` as a process of its own, healthy; and who leads the session of its server."""
    url_file = directory / "url"
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_trd.serve", "--model", str(model)]
        + ["--port", str(port), "--log-file", str(directory / "server.log")]
        + ["--url-file", str(url_file), "--weight-backend", "file", "dtype=fp32"]
        + ["max_model_len=512", "max_num_seqs=16", "start_timeout_seconds=600"],
        env=os.environ | {"NEMO_TRD_API_KEY": KEY},
    )
    limit = time.monotonic() + 600
    while not url_file.exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    leader = next(pid for pid in descendants(process.pid) if session(pid))
    return process, leader


def count_requests(url: str) -> int:
    """How many requests the server has finished, by its own count."""
    headers = {"Authorization": f"Bearer {KEY}"}
    text = httpx.get(f"{url}/metrics", headers=headers, timeout=60, trust_env=False).text
    counts = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
    return int(sum(float(line.split()[-1]) for line in counts))


def test_llama_by_command_line_ends_on_sigterm(models: dict[str, Path], tmp_path: Path) -> None:
    process, leader = start_by_command_line(models["llama"], 0, tmp_path)
    try:
        url = (tmp_path / "url").read_text().strip()
        pool = generator(url, model=models["llama"])
        assert_same_greedy_tokens(pool, models["llama"])
    finally:
        process.terminate()
        status = process.wait(120)
    assert status == 0
    assert session(leader) == []
