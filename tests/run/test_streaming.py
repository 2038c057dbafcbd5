"""Each rollout is judged and rewritten as soon as it has ended, and nothing depends on that."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm, tokens_for
from launch import launch
from pooled_generator import generator
from servers import make_inputs, settings_on
from tiny_models import byte_tokenizer
from training_run import settings

from nemo_trd.algorithm.acceptance import read_refinements, read_rollout
from nemo_trd.algorithm.refinement import refinement_prompts
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Completion, GenerationRequest, Prompt, Refinement
from nemo_trd.generation.protocol import GenerationFailed, request_seed
from nemo_trd.records.under_way import UnderWay
from nemo_trd.run import sampling
from nemo_trd.run.pool_times import busy_seconds, sampling_seconds

STEP, SAMPLES = 5, 2  # a step, and samples of each prompt
TOKENIZER = byte_tokenizer()
PROMPTS = [Prompt(n, f"{n}+1?", (20 + n, 30), answer=str(n)) for n in range(8)]
COUNT = SAMPLES * len(PROMPTS)


def configured(*overrides: str) -> Config:
    """Settings of samples from models that are never read."""
    run = settings_on(Path("/nowhere"), {}, Path("/nowhere/run"))
    return compose([*run, f"train.rollouts_per_prompt={SAMPLES}", *overrides])


def verify(text: str, answer: Any) -> bool:
    return len(text) % 2 == 0


def in_two_phases(config: Config) -> list[Refinement]:
    """What the fake servers say, asked by hand: all rollouts first, then all rewrites."""

    def say(context: Any, kind: str, prompt: Prompt, sample: int, max_tokens: int) -> Completion:
        seed = request_seed(config.run.seed, kind, STEP, prompt.index, sample)
        return Completion(tuple(tokens_for(list(context), seed, max_tokens)), "stop", 0)

    limits = config.generation.rollout.max_tokens, config.generation.refinement.max_tokens
    rollouts = [
        read_rollout(x, n, say(x.token_ids, "rollout", x, n, limits[0]), TOKENIZER, verify)
        for x in PROMPTS
        for n in range(SAMPLES)
    ]
    contexts = refinement_prompts(rollouts, config, TOKENIZER)
    answers = [
        say(c.token_ids, "refinement", c.rollout.prompt, c.rollout.sample_index, limits[1])
        for c in contexts
        if c.token_ids is not None
    ]
    return read_refinements(contexts, answers, config, TOKENIZER, verify)


def sampler(
    config: Config,
    students: list[str],
    teachers: list[str],
    judge: Any = verify,
    under_way: UnderWay | None = None,
) -> sampling.Sampler:
    patient = {"request_timeout_seconds": 60}  # longer than anything is held up
    generators = (generator(*urls, client=patient) for urls in (students, teachers))
    made = sampling.Sampler(config, *generators, TOKENIZER, TOKENIZER, under_way)
    made._verify = judge
    return made


def sample_on_ranks(students: list[str], teachers: list[str], record: str) -> None:
    """On every rank: a step. The first of each pool is asked before the other."""
    import torch.distributed as dist

    from nemo_trd.generation import pool

    dist.init_process_group("gloo")
    first = (students[0], teachers[0])
    pool._weight = lambda affinity, url: bytes([url in first])  # type: ignore[assignment]
    drawn = sampler(configured(), students, teachers).sample(PROMPTS, STEP)
    Path(f"{record}{dist.get_rank()}").write_bytes(pickle.dumps(drawn.refinements))
    dist.destroy_process_group()


class Waiting:
    """Holds something up until a server has answered so many requests well."""

    def __init__(self, server: FakeVllm, answers: int) -> None:
        self.server, self.answers = server, answers
        self.in_time: list[bool] = []

    def __call__(self) -> None:
        deadline = time.monotonic() + 30
        while len(self.server.served) < self.answers and time.monotonic() < deadline:
            time.sleep(0.01)
        self.in_time.append(len(self.server.served) >= self.answers)


@pytest.mark.parametrize("subset", ["all", "wrong"])
def test_rewrites_begin_while_rollouts_and_verdicts_are_under_way(
    subset: str, one_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rollout ends, and the first verdicts come, after rewrites of the others.

    Without a subset the rewrites of what these verdicts are about come before them, too.
    """
    config = configured(f"refinement.subset={subset}")
    expected = in_two_phases(config)
    others = sum(
        r.completion is not None
        for r in expected
        if subset == "all" or r.request.rollout.prompt.index
    )
    with FakeVllm() as student, FakeVllm() as teacher:
        last, first = Waiting(teacher, 1), Waiting(teacher, others)
        student.fault = lambda number: (last() if number == COUNT - 1 else None) or "ok"

        def judge(text: str, answer: str) -> bool:
            if answer == "0":
                first()
            return verify(text, answer)

        spans: list[Any] = []

        def noted(*of_step: Any) -> dict[str, float]:
            spans.append(of_step)
            return sampling_seconds(*of_step)

        monkeypatch.setattr(sampling, "sampling_seconds", noted)
        drawn = sampler(config, [student.url], [teacher.url], judge).sample(PROMPTS, STEP)
    assert drawn.refinements == expected
    assert last.in_time == [True] and all(first.in_time)
    assert 0 < others <= COUNT and (subset == "wrong") == any(
        r.rejection == "subset" for r in expected
    )
    seconds = drawn.seconds
    whole = seconds["rollout"] + seconds["refinement"]
    assert seconds["student_pool"] <= seconds["rollout"] and seconds["teacher_pool"] <= whole
    ((rollouts, rewrites, _),) = spans
    assert min(rewrites)[0] < max(end for _, end in rollouts)  # both at one time


@pytest.mark.distributed
def test_two_ranks_get_the_samples_of_two_phases_though_replicas_die(tmp_path: Path) -> None:
    def dies(number: int) -> str:
        return "ok" if number < 3 else "hangup"

    with FakeVllm(dies) as a, FakeVllm() as b, FakeVllm(dies) as c, FakeVllm() as d:
        last = Waiting(d, 1)
        b.fault = lambda number: (last() if number == COUNT - 4 else None) or "ok"
        record = str(tmp_path / "record")
        launch(2, sample_on_ranks, [a.url, b.url], [c.url, d.url], record)
        assert a.asked > 3 and c.asked > 3 and last.in_time == [True]
    for rank in range(2):
        assert pickle.loads(Path(f"{record}{rank}").read_bytes()) == in_two_phases(configured())


def test_a_teacher_that_refuses_ends_the_rollouts_too(one_rank: Any) -> None:
    waited = threading.Event()

    def last_waits(number: int) -> str:
        if number == COUNT - 1:
            waited.wait(55)
        return "ok"

    with FakeVllm(last_waits) as student, FakeVllm(lambda number: "400") as teacher:
        begin = time.monotonic()
        with pytest.raises(GenerationFailed, match="status 400"):
            sampler(configured(), [student.url], [teacher.url]).sample(PROMPTS, STEP)
        assert time.monotonic() - begin < 30
        waited.set()


def test_a_teacher_that_nothing_is_asked_of_need_not_be_there(one_rank: Any) -> None:
    config = configured("algorithm.trajectory=rollout")
    with FakeVllm() as student:
        drawn = sampler(config, [student.url], ["http://127.0.0.1:1"]).sample(PROMPTS, STEP)
    assert drawn.refinements == in_two_phases(config)
    assert drawn.seconds["teacher_pool"] == 0


def test_what_was_generated_when_a_run_died_is_not_generated_again(
    one_rank: Any, tmp_path: Path
) -> None:
    """Its samples are those of a run that did not die; other weights or settings find none."""
    config, record = configured(), tmp_path / "under_way"

    def kept(rank: int = 0, digest: str = "a") -> UnderWay:
        return UnderWay(record, rank, digest)

    with (
        FakeVllm() as student,
        FakeVllm(lambda number: "ok" if number < 5 else "400") as teacher,
        pytest.raises(GenerationFailed, match="status 400"),
    ):
        dies = sampler(config, [student.url], [teacher.url], under_way=kept(rank=1))
        dies.sample(PROMPTS, STEP)
    (file,) = record.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) > 5
    file.write_text("".join(lines) + lines[0][:40])  # it was killed while it wrote
    asked = [
        GenerationRequest(x.token_ids, request_seed(config.run.seed, "rollout", STEP, x.index, n))
        for x in PROMPTS
        for n in range(SAMPLES)
    ]
    # The teacher was asked for a sixth rewrite: of six rollouts, whichever came first.
    request, *others = (r for r in asked if kept().find(r, weight_version=0) is not None)
    assert len(others) >= 5
    assert kept().find(request, weight_version=1) is None
    assert kept(digest="b").find(request, weight_version=0) is None
    assert kept().notices == []

    with FakeVllm() as student, FakeVllm() as teacher:
        again = sampler(config, [student.url], [teacher.url], under_way=kept())
        assert again.sample(PROMPTS, STEP).refinements == in_two_phases(config)
        assert student.asked + teacher.asked == 2 * COUNT - len(lines)
        (file,) = record.iterdir()
        assert file.name == f"step_{STEP:06d}_rank_0.jsonl"  # there is one rank now
        assert len(file.read_text().splitlines()) == 2 * COUNT
        again.sample(PROMPTS, STEP + 1)
        (file,) = record.iterdir()
        assert len(file.read_text().splitlines()) == 2 * COUNT
    kept().end()
    assert not record.exists()


def test_samples_of_all_steps_that_have_yet_to_train_are_kept_but_for_those_of_lost_weights(
    tmp_path: Path,
) -> None:
    """Of a run two steps ahead that died after its checkpoint of version 3."""

    def request(step: int) -> GenerationRequest:
        return GenerationRequest((step, 7), seed=step)

    record = UnderWay(tmp_path, 0, "a", max_staleness=2)
    for step, version in ((2, 2), (3, 3), (4, 3), (5, 4)):
        record.begin(step, version)
        record.add(request(step), Completion((9,), "length", version))
    record.add(request(50), Completion((9,), "length", 3, versions=((3, 0), (4, 5))))
    assert [file.name[:11] for file in sorted(tmp_path.iterdir())] == [
        f"step_{step:06d}" for step in (3, 4, 5)
    ]
    resumed = UnderWay(tmp_path, 0, "a", max_staleness=2)
    for step, version in ((4, 3), (5, 4)):
        resumed.begin(step, version)
        assert resumed.find(request(4), version) is not None
        assert resumed.find(request(5), version) is None  # other weights bear number 4
        assert resumed.find(request(50), version) is None
    assert resumed.find(request(4), 6) is None  # too old
    resumed.begin(7, 5)
    assert resumed.find(request(4), 5) is None  # its step has trained
    resumed.end()
    assert not tmp_path.exists()


def test_a_record_one_step_ahead_serves_the_weights_that_the_run_would_have_had(
    tmp_path: Path,
) -> None:
    """Servers died while step 8 was drawn, on the weights of step 7, and step 7 was saved."""
    request = GenerationRequest((1, 7), seed=8)
    record = UnderWay(tmp_path, 0, "a", max_staleness=1)
    for step, version in ((7, 6), (8, 7)):
        record.begin(step, version)
    record.add(request, Completion((9,), "length", 7))
    resumed = UnderWay(tmp_path, 0, "a", max_staleness=1)
    resumed.begin(8, 8)
    assert resumed.find(request, 8) is not None
    assert resumed.find(request, 9) is None


def test_damaged_lines_of_a_record_are_counted_and_a_cut_off_last_one_is_not(
    tmp_path: Path,
) -> None:
    asked = [GenerationRequest((n,), seed=n) for n in range(3)]
    record = UnderWay(tmp_path, 0, "a")
    record.begin(4, 0)
    for request in asked:
        record.add(request, Completion((9,), "length", 0))
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "\0\0\0\n" + lines[1].replace("token_ids", "tokens") + lines[2][:30])
    resumed = UnderWay(tmp_path, 0, "a")
    assert resumed.notices == [f"{file}: 2 damaged lines; what they held is sampled again"]
    resumed.begin(4, 0)
    assert [resumed.find(request, 0) is not None for request in asked] == [True, False, False]
    for request in asked[1:]:  # not behind what was cut off
        resumed.add(request, Completion((9,), "length", 0))
    again = UnderWay(tmp_path, 0, "a")
    assert again.notices == [] and all(again.find(request, 0) for request in asked)


def test_seconds_of_a_pool_count_overlapping_requests_once() -> None:
    assert busy_seconds([]) == 0
    assert busy_seconds([(4, 5), (0, 2), (1, 3), (1, 1.5)]) == 4
    seconds = sampling_seconds([(0, 3), (0, 1)], [(1, 2), (3, 3.5)], 4.0)
    assert seconds == {"rollout": 3, "refinement": 1, "student_pool": 3, "teacher_pool": 1.5}


def train(overrides: list[str], streams: bool) -> None:
    """On every rank: a run in two phases, or one whose models generate side by side."""
    import asyncio

    from nemo_trd.generation.local import LocalGenerator
    from nemo_trd.train import launch

    async def at_once(self: Any, requests: Any, sampling: Any, description: str, done: Any) -> None:
        one_by_one = asyncio.Lock()

        async def answer(position: int) -> None:
            request = await requests[position]
            if request is not None:
                async with one_by_one:
                    answers = await asyncio.to_thread(
                        self.generate, [request], sampling, description
                    )
                done(position, *answers)

        await asyncio.gather(*map(answer, range(len(requests))))

    if streams:
        LocalGenerator.stream = at_once  # type: ignore[method-assign]
    assert launch(compose(overrides)) == 0


@pytest.mark.distributed
def test_a_run_that_streams_learns_what_one_in_two_phases_does(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, hidden_size=32, head_dim=8)
    overrides = settings(inputs, tmp_path, "train.num_steps=2")
    overrides += ["logging.samples_interval=1", "train.rollouts_per_prompt=2"]
    for streams in (False, True):
        launch(2, train, [*overrides, f"run.dir={tmp_path / str(streams)}"], streams)
    phases, stream = (records(tmp_path / str(streams)) for streams in (False, True))
    assert len(phases[0]) == 2 and all("loss" in line for line in phases[0])
    assert stream == phases


def records(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Metrics that no clock changes, and all samples."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds/", "tokens_per_second", "time")
    kept = [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]
    return kept, "".join(f.read_text() for f in sorted((run_dir / "samples").glob("*.jsonl")))
