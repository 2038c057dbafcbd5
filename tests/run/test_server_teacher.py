"""A teacher on servers stands in for the one in Megatron, in every layout of the student."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import launch
from oracles import DIVERGENCES, make_loss
from tiny_models import make_model

from nemo_trd.data.types import Completion, TokenIds, TokenScores, Trajectory
from nemo_trd.generation.api import Wanted
from nemo_trd.loss.formulas import dense_divergence
from nemo_trd.loss.fused import divergence_from_top_k
from nemo_trd.loss.top_k import TopK
from nemo_trd.models.vocabulary import Vocabulary

pytestmark = pytest.mark.distributed

VOCABULARY, TOP_K = 120, 7
TP2 = ["parallel.student.tensor_model_parallel_size=2"]
PP2 = ["parallel.student.pipeline_model_parallel_size=2"]
SMALL_BATCHES = ["train.max_tokens_per_micro_batch=40"]
CP2 = ["parallel.student.context_parallel_size=2"]
LAYOUTS = [[*TP2, *PP2, *SMALL_BATCHES], [*CP2, *TP2], [*TP2, *SMALL_BATCHES], PP2]  # then DP 2
SERVED = [
    *("generation=vllm", "teacher.scoring=server", f"loss.top_k={TOP_K}"),
    # No server is asked: a `Scorer` takes their place.
    *("generation.vllm.teacher.urls=['http://localhost:1']", "generation.vllm.teacher.replicas=0"),
]


def test_vocabulary_shards_give_values_and_gradients_of_float64_dense_autograd() -> None:
    output = launch(2, check_shards, timeout=200)
    assert output.count("all shards agree") == 2


def test_every_layout_trains_as_with_the_teacher_in_megatron(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    make_model(tmp_path / "student", "qwen3", vocab_size=VOCABULARY, hidden_size=32, **sizes)
    make_model(
        tmp_path / "teacher", "qwen3", seed=1, vocab_size=VOCABULARY, hidden_size=48, **sizes
    )
    output = launch(4, check_layouts, str(tmp_path), timeout=300)
    assert output.count("all layouts agree") == 4


def check_shards() -> None:
    dist.init_process_group("gloo")
    g = torch.Generator().manual_seed(3)
    hidden, weight, teacher = (torch.randn(n, 8, generator=g) for n in (10, 64, 64))
    for vocab, name, tail in product((50, 20), DIVERGENCES, ("bucket", "renormalize")):
        loss = make_loss(name, tail)
        logits = hidden.double().flip(0) @ teacher.double()[:vocab].t()
        known = logits.log_softmax(-1).topk(TOP_K)
        labels = torch.arange(10) * 2 % vocab
        label_log_probs = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0].float()
        state = TopK(known.indices, known.values.float(), label_log_probs)
        # 20 of 64 ids are real: the second shard has none of them.
        own = weight.chunk(2)[dist.get_rank()].clone().requires_grad_()
        rows = hidden.clone().requires_grad_()
        out = divergence_from_top_k(rows, own, state, labels, loss, vocab, dist.group.WORLD)
        out.loss_sum.backward()
        dist.all_reduce(rows.grad)

        exact_rows, exact_weight = (x.double().requires_grad_() for x in (hidden, weight))
        value = dense_divergence(exact_rows @ exact_weight[:vocab].t(), logits, loss)
        value.sum().backward()
        where = f"{loss}, {vocab} ids"
        tolerances = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False, "msg": where}
        torch.testing.assert_close(out.token_divergence, value.detach(), **tolerances)
        torch.testing.assert_close(rows.grad, exact_rows.grad, **tolerances)
        own_exact = exact_weight.grad.chunk(2)[dist.get_rank()]
        torch.testing.assert_close(own.grad, own_exact, **tolerances)
        alone = divergence_from_top_k(hidden, weight, state, labels, loss, vocab)
        for key, metric in alone.metrics.items():
            torch.testing.assert_close(out.metrics[key], metric, **tolerances)
    print("all shards agree", flush=True)
    dist.destroy_process_group()


class Scorer:
    """Scores as the servers do, with transformers; remembers how much it was asked."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.vocabulary = Vocabulary(VOCABULARY, (), {})
        self.asked = 0
        self.broken = False

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[tuple[TokenIds, int]],
        wanted: Wanted,
        description: str,
    ) -> list[TokenScores]:
        from nemo_trd.generation.protocol import GenerationFailed

        if self.broken:
            raise GenerationFailed("http://localhost:1: gone")
        assert (wanted.vocab_size, wanted.spare) == (VOCABULARY, 0)
        self.asked += len(sequences)
        scores = []
        for ids, start in sequences:
            logits = self._model(torch.tensor([ids])).logits[0, start - 1 : -1]
            log_probs = logits.log_softmax(-1)
            top = log_probs.topk(wanted.top_k)
            labels = np.array([log_probs[i, token] for i, token in enumerate(ids[start:])])
            scores.append(TokenScores(top.indices.numpy(), top.values.numpy(), labels))
        return scores


def trajectories() -> list[Trajectory]:
    def tokens(start: int, count: int) -> tuple[int, ...]:
        return tuple((start + 7 * i) % (VOCABULARY - 1) + 1 for i in range(count))

    return [
        Trajectory(i, 0, "refinement", tokens(i, i + 2), tokens(50 + i, 4), tokens(90 + i, n), 0)
        for i, n in enumerate((5, 1, 9, 3, 14))
    ]


def check_layouts(directory: str) -> None:
    """On every rank."""
    from nemo_trd.config.load import compose
    from nemo_trd.distributed.exchange import own_share
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.generation.protocol import GenerationFailed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher
    from nemo_trd.run.generated_scores import GeneratedScores
    from nemo_trd.run.server_teacher import ServerTeacher, wanted_scores
    from nemo_trd.run.teacher_check import _own_log_probabilities

    watch = init_distributed(timeout_minutes=2)
    models = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
    base = ["model=local", "precision.dtype=fp32", "optimizer.lr=1e-2", *models]
    scorer: Any = Scorer(f"{directory}/teacher")
    for layout in LAYOUTS:
        config = compose([*base, *layout, f"loss.top_k={TOP_K}"])
        student = Student(config)
        teacher = Teacher(config, student.groups)
        plan = student.pack(trajectories())
        # What its servers are asked for at the start, against the model as transformers has it.
        text = trajectories()[4].labels
        own = _own_log_probabilities(config, text, student, teacher, 0)
        (scored,) = scorer.score([(text, 1)], Wanted(1, VOCABULARY), "a text")
        np.testing.assert_allclose(own, scored.label_logprobs, atol=1e-4)
        expected = [student.train_step(plan, teacher.states(plan)).metrics for _ in range(2)]

        config = compose([*base, *layout, *SERVED])
        student = Student(config)
        wanted = wanted_scores(TOP_K, student.vocab_size, scorer.vocabulary)
        served = ServerTeacher(scorer, wanted, student.groups)
        found = _own_log_probabilities(config, text, student, served, 0)
        np.testing.assert_allclose(found, scored.label_logprobs, atol=1e-4)
        scorer.asked = 0
        found = [student.train_step(plan, served.states(plan)).metrics for _ in range(2)]
        counts = [0] * dist.get_world_size()
        dist.all_gather_object(counts, scorer.asked)
        assert sum(counts) == 2 * len(trajectories()), counts  # each once a step, by one rank
        states = served.states(plan)
        written = GeneratedScores(steps_ahead=0)
        written.begin(3)
        for t in own_share(trajectories()[:4]):  # all but the last one
            (scores,) = scorer.score([(t.teacher_context + t.labels, 4)], wanted, "rewrites")
            kept = written.keep(
                3, t.teacher_context, Completion(t.labels, "stop", 0, None, "", scores)
            )
            assert kept.scores is None and kept.token_ids == t.labels
        written.begin(4)  # of the next step, beside the training of this one
        teacher = ServerTeacher(scorer, wanted, student.groups, written)
        for asked in (1, 5):
            scorer.asked = 0
            for ours, theirs in zip(teacher.states(plan), states, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert all(map(torch.equal, ours.tensors, theirs.tensors))
            dist.all_gather_object(counts, scorer.asked)
            assert sum(counts) == asked, (counts, asked)
            written.begin(6)
        for ours, theirs in zip(found, expected, strict=True):
            assert set(theirs) - set(ours) == {"teacher_entropy", "teacher_real_token_share"}
            for name, value in ours.items():
                assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (layout, name)
        assert found[0]["divergence"] > 0.1

    estimate = ["loss.divergence=k1", "algorithm.trajectory=rollout", "loss.top_k=null"]
    config = compose([*base, *LAYOUTS[0], *estimate])
    student = Student(config)
    plan = student.pack(trajectories())
    exact = student.train_step(plan, Teacher(config, student.groups).states(plan)).metrics
    student = Student(compose([*base, *LAYOUTS[0], *SERVED, *estimate]))
    served = ServerTeacher(scorer, wanted_scores(1, VOCABULARY, scorer.vocabulary), student.groups)
    estimated = student.train_step(plan, served.states(plan)).metrics
    for name in ("loss", "grad_norm", "teacher_nll"):
        assert estimated[name] == pytest.approx(exact[name], rel=1e-5, abs=1e-6), name

    scorer.broken = dist.get_rank() == 1
    with pytest.raises(GenerationFailed, match="http://localhost:1: gone"):
        served.states(plan)
    print("all layouts agree", flush=True)
    watch.close()
