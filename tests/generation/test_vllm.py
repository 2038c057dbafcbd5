"""The pool of servers: balance, retries, replicas that leave and come back, no sample lost.

Faults are those of `fake_vllm.FakeVllm`, because a real server cannot be told to fail;
tests/generation shows the same generator on real ones.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from fake_vllm import EOS, KEY, FakeVllm
from pooled_generator import CLIENT, SAMPLING, expected, generator, requests
from pydantic import SecretStr

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.types import GenerationRequest
from nemo_trd.generation import pool
from nemo_trd.generation.api import (
    AttemptFailed,
    Refused,
    Wanted,
    generation_body,
    read_scores,
)
from nemo_trd.generation.pool import AllReplicasDown, Member, choose
from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.generation.session import RequestFailed
from nemo_trd.models.vocabulary import Vocabulary


def refused_port() -> str:
    with FakeVllm() as server:
        return server.url


def test_completions_come_in_the_order_of_the_requests() -> None:
    asked = requests(40)
    with FakeVllm() as one, FakeVllm() as two:
        one.delay = 0.02
        assert generator(one, two).generate(asked, SAMPLING, "rollouts") == expected(asked)
        done = Counter(one.served + two.served)
    assert done == Counter(r.prompt_token_ids for r in asked)


def test_no_requests_need_no_server() -> None:
    assert generator("http://127.0.0.1:1").generate([], SAMPLING, "rollouts") == []


def test_concurrency_of_each_replica_is_limited_and_used() -> None:
    with FakeVllm() as one, FakeVllm() as two:
        one.delay = two.delay = 0.2  # far more than a busy machine needs to ask
        generator(one, two).generate(requests(40), SAMPLING, "rollouts")
        assert (one.most_working, two.most_working) == (4, 4)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", "status 500"),
        ("503", "status 503"),
        ("garbage", "no JSON"),
        ("arrays", "its arrays are malformed"),
        ("shape", "malformed: choices.0.token_ids"),
        ("half", "RemoteProtocolError"),
        ("hangup", "Error"),
        ("hang", "no answer within"),
        ("short", "'length' after"),
        ("abort", "aborted"),
        ("stale", "current is 0"),
    ],
)
def test_fault_is_retried_then_reported_with_the_url(fault: str, cause: str) -> None:
    client = {"request_timeout_seconds": 0.3} if fault == "hang" else {}
    asked = requests(12)
    with FakeVllm(lambda number: fault if number % 3 == 0 else "ok") as server:
        done = generator(server, client=client | {"max_attempts": 12}).generate(
            asked, SAMPLING, "rollouts"
        )
        assert done == expected(asked)
        assert server.asked > 12
    with (
        FakeVllm(lambda number: fault) as server,
        pytest.raises(RequestFailed) as failed,
    ):
        generator(server, client=client).generate(requests(1), SAMPLING, "rollouts")
    message = str(failed.value)
    assert message.count(server.url) == CLIENT.max_attempts == server.asked
    assert cause in message and "rollouts 0" in message


def test_another_replica_takes_over_what_one_fails_at() -> None:
    asked = requests(40)
    with FakeVllm(lambda number: "500") as bad, FakeVllm() as good:
        done = generator(bad, good, refused_port()).generate(asked, SAMPLING, "rollouts")
        assert done == expected(asked)
        assert Counter(good.served) == Counter(r.prompt_token_ids for r in asked)


def test_refused_request_is_not_repeated() -> None:
    with FakeVllm(lambda number: "400") as server:
        with pytest.raises(Refused, match=f"{server.url}.*status 400"):
            generator(server).generate(requests(1), SAMPLING, "rollouts")
        assert server.asked == 1


def test_wrong_key_is_told_at_once() -> None:
    with FakeVllm() as server, pytest.raises(Refused, match="status 401"):
        generator(server, api_key=SecretStr("wrong")).generate(requests(1), SAMPLING, "rollouts")


def test_all_replicas_down_names_each_with_its_cause() -> None:
    one, two = refused_port(), refused_port()
    begin = time.monotonic()
    with pytest.raises(AllReplicasDown) as down:
        generator(one, two, client={"recovery_timeout_seconds": 0.5}).generate(
            requests(9), SAMPLING, "rollouts"
        )
    assert f"{one}: ConnectError" in str(down.value) and f"{two}: ConnectError" in str(down.value)
    assert 0.5 <= time.monotonic() - begin < 10


def test_who_is_told_to_stop_waits_for_no_server_that_is_down_but_for_one_between_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient = {"recovery_timeout_seconds": 100}
    monkeypatch.setattr(pool, "STOPPING_GRACE_SECONDS", 2)
    begin = time.monotonic()
    down = generator(refused_port(), stopping=lambda: time.monotonic() - begin > 1, client=patient)
    with pytest.raises(AllReplicasDown):
        down.generate(requests(1), SAMPLING, "rollouts")
    assert 2 < time.monotonic() - begin < 50
    monkeypatch.setattr(pool, "STOPPING_GRACE_SECONDS", 30)
    with FakeVllm() as server:
        server.version = "incomplete"
        threading.Timer(0.5, setattr, (server, "version", "default")).start()
        found = generator(server, stopping=lambda: True).generate(requests(1), SAMPLING, "rollouts")
    assert len(found) == 1


def test_replica_that_dies_and_comes_back_is_used_again() -> None:
    """The one that stays answers no more than a part before that."""
    asked = requests(60)
    used_again = threading.Event()

    def few(number: int) -> str:
        if number >= 6:
            dies.healthy = False
            return "hangup"
        return "ok"

    def again(number: int) -> str:
        used_again.set()
        return "ok"

    with FakeVllm() as stays:
        stays.fault = lambda number: "ok" if number < 10 or used_again.wait(30) else "500"
        dies = FakeVllm(few)
        urls = (stays.url, dies.url)
        reborn: list[FakeVllm] = []

        def restart() -> None:
            deadline = time.monotonic() + 30
            while len(dies.served) < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
            dies.__exit__()
            reborn.append(FakeVllm(again, port=dies.port))

        thread = threading.Thread(target=restart)
        thread.start()
        patient = {"request_timeout_seconds": 60}
        done = generator(*urls, client=patient).generate(asked, SAMPLING, "rollouts")
        thread.join()
        assert done == expected(asked)
        assert len(dies.served) == 6 and reborn[0].served
        reborn[0].__exit__()


def test_replica_with_other_weights_gets_no_work_until_it_is_current() -> None:
    with FakeVllm() as current, FakeVllm() as stale, FakeVllm() as paused:
        stale.version, paused.paused = "7", True
        pool = generator(current, stale, paused)
        asked = requests(8)
        assert pool.generate(asked, SAMPLING, "rollouts") == expected(asked)
        assert (stale.asked, paused.asked) == (0, 0)
        stale.version, paused.paused = "default", False
        current.healthy = False
        assert pool.generate(asked, SAMPLING, "rollouts") == expected(asked)
        assert stale.asked and paused.asked


class FakeSync:
    """What the generator needs of a weight sync; reaches the servers by hand."""

    def __init__(self, servers: list[FakeVllm]) -> None:
        self.servers = {server.url: server for server in servers}
        self.version: int | None = None

    def load_weights(self, tensors: Any, version: int) -> None:
        assert list(tensors) == []
        self.version = version
        for server in self.servers.values():
            if server.healthy:
                server.version = str(version)

    def update_replica(self, url: str) -> bool:
        self.servers[url].version = str(self.version)
        return True


def test_completions_carry_the_version_of_the_last_weights() -> None:
    with FakeVllm() as one, FakeVllm() as late:
        late.healthy = False
        pool = generator(one, late, sync=FakeSync([one, late]))
        pool.load_weights(iter(()), 12)
        asked = requests(8)
        assert pool.generate(asked, SAMPLING, "rollouts") == expected(asked, version=12)
        assert late.asked == 0
        late.healthy, one.healthy = True, False  # `late` missed the sync
        assert pool.generate(asked, SAMPLING, "rollouts") == expected(asked, version=12)
        assert late.version == "12" and late.asked == 8


def test_a_server_with_weights_that_are_only_just_arriving_is_asked_where_they_may_change() -> None:
    """Rank 0 has updated it, and this rank's `load_weights` has yet to return."""
    asked = [replace(request, oldest_version=11) for request in requests(8)]
    with FakeVllm() as server:
        sync = FakeSync([server])
        pool = generator(server, sync=sync, client={"recovery_timeout_seconds": 0.5})
        pool.load_weights(iter(()), 11)
        sync.load_weights(iter(()), 12)
        assert pool.generate(asked, SAMPLING, "rollouts") == expected(asked, version=12)
        with pytest.raises(GenerationFailed, match="its weights are 12, current is 11"):
            pool.generate(requests(8), SAMPLING, "rollouts")


@pytest.mark.parametrize("policy", ["retry", "keep"])
@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize("initial_version", [0, None])
def test_a_replica_that_starts_again_before_the_first_update_is_current_if_it_began_so(
    initial_version: int | None, reachable: bool, policy: str
) -> None:
    """None: the model began with a trained adapter, and a server that starts again has its base."""
    asked = requests(8)
    with FakeVllm() as one, FakeVllm() as again:
        sync = FakeSync([one, again])
        pool = generator(
            one, again, sync=sync, initial_version=initial_version, client={"stale_weights": policy}
        )
        pool.load_weights(iter(()), 0)
        again.version = "default"
        if not reachable:  # as with NCCL, until the next update
            sync.update_replica = lambda url: False  # type: ignore[method-assign]
        assert pool.generate(asked, SAMPLING, "rollouts") == expected(asked)
        updated = initial_version is None and reachable
        assert again.version == ("0" if updated else "default")
        assert (again.asked > 0) == (initial_version == 0 or reachable)


def test_completion_of_other_weights_can_be_kept_or_end_the_run() -> None:
    asked = requests(1)
    with FakeVllm(lambda number: "stale") as server:
        keep = generator(server, client={"stale_weights": "keep"})
        assert keep.generate(asked, SAMPLING, "rollouts") == expected(asked, version=41)
        with pytest.raises(RuntimeError, match=f"{server.url}: its weights are 41, current is 0"):
            generator(server, client={"stale_weights": "error"}).generate(
                asked, SAMPLING, "rollouts"
            )


def test_an_adapter_is_named_and_its_base_has_one_version_whatever_the_adapter_has() -> None:
    """Both on one server, as with opsd's teacher on the student's servers."""
    asked, sequence = requests(3), ((5, 6, 7), 1)
    with FakeVllm() as server:
        server.version = "7"
        adapted = generator(server, served_model="adapter")
        adapted.weight_version = 7
        assert adapted.generate(asked, SAMPLING, "rollouts") == expected(asked, version=7)
        adapted.score([sequence], Wanted(1), "rollouts")
        assert server.models == {"adapter"}
        server.models.clear()
        base = generator(server, frozen=True, client={"stale_weights": "error"})
        assert base.generate(asked, SAMPLING, "rewrites") == expected(asked)
        base.score([sequence], Wanted(1), "rewrites")
        assert server.models == {None}
        server.paused = True
        waiting = generator(server, frozen=True, client={"recovery_timeout_seconds": 0.1})
        with pytest.raises(AllReplicasDown, match="it is paused"):
            waiting.generate(asked, SAMPLING, "rewrites")


def test_logprobs_come_when_asked_for() -> None:
    asked = requests(3)
    with FakeVllm() as server:
        for completion in generator(server, logprobs=True).generate(asked, SAMPLING, "rollouts"):
            assert completion.logprobs == (-0.5,) * len(completion.token_ids)


def test_prompt_that_leaves_no_room_is_refused_before_anything_is_asked() -> None:
    with FakeVllm() as server, pytest.raises(ConfigError, match="max_model_len = 512"):
        generator(server).generate([GenerationRequest((5,) * 505, seed=1)], SAMPLING, "refinements")
    assert server.asked == 0


@pytest.mark.parametrize("fault", ["500", "400", "hang", "garbage"])
def test_key_is_in_no_error_log_or_repr(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeVllm(lambda number: fault) as server:
        limit = 0.1 if fault == "hang" else 10
        pool = generator(server, client={"request_timeout_seconds": limit, "max_attempts": 2})
        with pytest.raises((RequestFailed, Refused)) as failed:
            pool.generate(requests(2), SAMPLING, "rollouts")
    assert caplog.text
    told = "".join(traceback.format_exception(failed.value))
    for text in (caplog.text, told, repr(pool), repr(vars(pool))):
        assert KEY not in text


def test_progress_shows_requests_and_tokens_per_second(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeVllm() as server:
        server.delay = 0.1
        generator(server, progress=True).generate(requests(12), SAMPLING, "refinements")
    err = capfd.readouterr().err
    assert "refinements" in err and "/12" in err and "tok/s" in err


def members(*loads: int) -> list[Member]:
    return [Member(f"http://host{i}:8000", load) for i, load in enumerate(loads)]


def test_requests_of_one_problem_go_to_one_replica() -> None:
    pool = members(0, 0, 0, 0)
    homes = {key: choose(pool, key, (), 100) for key in range(400)}
    assert all(choose(pool, key, (), 100) is home for key, home in homes.items())
    shares = Counter(home.url for home in homes.values() if home)
    assert len(shares) == 4 and min(shares.values()) > 60
    gone = pool[2]
    gone.in_service = False
    for key, home in homes.items():
        moved = choose(pool, key, (), 100)
        assert moved is not gone and (home is gone or moved is home)


def test_affinity_does_not_overload_a_replica() -> None:
    pool = members(0, 0, 0)
    for _ in range(90):
        member = choose(pool, 5, (), 1000)
        assert member is not None
        member.load += 1
    assert max(member.load for member in pool) <= 1.25 * 30 + 1
    assert len({member.load for member in pool}) > 1  # and is not plain balancing either


def test_request_without_affinity_goes_where_least_is_to_do() -> None:
    pool = members(3, 1, 2)
    assert choose(pool, None, (), 4) is pool[1]
    assert choose(pool, None, {pool[1].url}, 4) is pool[2]
    pool[0].in_service = pool[2].in_service = False
    assert choose(pool, None, {pool[1].url}, 4) is pool[1]
    assert choose(pool, None, (), 1) is None


def test_request_says_everything_that_changes_a_sample() -> None:
    request = GenerationRequest((1, 2), seed=2**63 - 1)
    params = generation_body(request, SAMPLING, frozenset({9, EOS}), False)["sampling_params"]
    assert {k: params[k] for k in ("temperature", "top_p", "top_k", "max_tokens", "seed")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 8,
        "seed": 2**63 - 1,
    }
    assert params["stop_token_ids"] == [EOS, 9] and params["ignore_eos"]
    greedy = SAMPLING.model_copy(update={"temperature": 0})
    body = generation_body(request, greedy, frozenset({EOS}), False)
    assert "seed" not in body["sampling_params"]


@pytest.mark.parametrize(
    ("never", "constraint"),
    [
        ((8, 9), {"logit_bias": {"8": -100.0, "9": -100.0}}),
        (tuple(range(4, 10)), {"allowed_token_ids": [0, 1, 2, 3]}),
        ((), {}),
    ],
)
def test_a_request_forbids_ids_without_a_token(
    never: tuple[int, ...], constraint: dict[str, Any]
) -> None:
    vocabulary = Vocabulary(columns=10, never=never, ends={EOS: EOS})
    assert vocabulary.constraint() == constraint
    with FakeVllm() as server:
        generator(server, vocabulary=vocabulary).generate(requests(1), SAMPLING, "rollouts")
        (params,) = server.params
    assert {k: v for k, v in params.items() if k in ("logit_bias", "allowed_token_ids")} == (
        constraint
    )


def test_an_id_that_was_forbidden_is_no_sample() -> None:
    asked = requests(12)
    said = {token for completion in expected(asked) for token in completion.token_ids}
    one = max(said)
    vocabulary = Vocabulary(columns=300, never=(one,), ends={EOS: EOS})
    with FakeVllm() as server, pytest.raises(RequestFailed, match=f"sampled id {one}, which has"):
        generator(server, vocabulary=vocabulary).generate(asked, SAMPLING, "rollouts")


def test_a_completion_ends_as_the_student_does() -> None:
    vocabulary = Vocabulary(columns=300, never=(), ends={EOS: 7, 7: 7})
    asked = requests(12)
    with FakeVllm() as server:
        answers = generator(server, vocabulary=vocabulary).generate(asked, SAMPLING, "refinements")
        assert server.params[0]["stop_token_ids"] == [EOS, 7]
    for answer, whole in zip(answers, expected(asked), strict=True):
        assert answer.token_ids == (*whole.token_ids[:-1], 7) and answer.finish_reason == "stop"


def test_scores_are_read_in_order_of_probability_whether_or_not_the_label_is_among_them() -> None:
    def place(**logprobs: float) -> dict[str, Any]:
        return {k[1:]: {"logprob": v, "rank": 1} for k, v in logprobs.items()}

    content = {
        "choices": [
            {
                "token_ids": [1],
                "finish_reason": "length",
                "weight_versions": [{"version": "4", "start": 0, "end": 1}],
            }
        ],
        "prompt_logprobs": [None, place(t6=-1.0, t2=-0.5), place(t9=-7.0, t3=-0.1, t4=-0.2)],
    }
    scores, versions = read_scores(content, "http://a:1", (5, 6, 9), 1, Wanted(2))
    assert versions == ("4",)
    assert scores.top_ids.tolist() == [[2, 6], [3, 4]]
    assert scores.top_logprobs.flatten().tolist() == pytest.approx([-0.5, -1.0, -0.1, -0.2])
    assert scores.label_logprobs.tolist() == pytest.approx([-1.0, -7.0])

    # Ids from 4 on are not in the student's vocabulary: the others share their probability.
    content["prompt_logprobs"] = [None, place(t6=-1.0, t2=-0.5), place(t9=-7.0, t3=-0.1, t4=-3.0)]
    scores, _ = read_scores(content, "http://a:1", (5, 2, 3), 1, Wanted(1, vocab_size=4))
    assert scores.top_ids.tolist() == [[2], [3]]
    rest = [1 - math.exp(-1.0), 1 - math.exp(-7.0) - math.exp(-3.0)]
    logprobs = [-0.5 - math.log(rest[0]), -0.1 - math.log(rest[1])]
    assert scores.top_logprobs[:, 0].tolist() == pytest.approx(logprobs)
    assert scores.label_logprobs.tolist() == pytest.approx(logprobs)
    with pytest.raises(AttemptFailed, match="lacks log-probabilities around token 2"):
        read_scores(content, "http://a:1", (5, 2, 3), 1, Wanted(2, vocab_size=4))


def test_scores_in_json_are_taken_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeVllm() as server:
        for pool in (generator(server), generator(server)):
            (scores,) = pool.score([((5, 6, 7), 1)], Wanted(1), "scores")
            assert scores.top_ids.tolist() == [[6], [7]]
            assert scores.label_logprobs.tolist() == [-0.5, -0.5]
        assert server.params[0]["prompt_logprobs"] == 1
        (told,) = [record.message for record in caplog.records if "as JSON" in record.message]
        assert server.url in told
