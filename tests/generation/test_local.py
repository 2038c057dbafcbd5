from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, make_model
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import LocalGeneration, ModelSource, Sampling
from nemo_trd.data.types import GenerationRequest
from nemo_trd.generation.gumbel import gumbel_noise, sample, seed_tensor
from nemo_trd.generation.kv_cache import LayerWithRoom, cache_with_room
from nemo_trd.generation.local import LocalGenerator
from nemo_trd.generation.protocol import request_seed
from nemo_trd.models.vocabulary import read_vocabulary

torch.set_num_threads(1)
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, max_tokens=12)
PLAIN = Sampling(temperature=1.0, top_p=1, top_k=0, max_tokens=12)
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen3", eos_token_id=None, **SMALL)


def generator(path: Path, batch_size: int = 64, progress: bool = False) -> LocalGenerator:
    local = LocalGeneration(batch_size=batch_size, dtype="fp32")
    return LocalGenerator(str(path), local, trust_remote_code=False, progress=progress)


def requests(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Prompts of very different lengths."""
    return [
        GenerationRequest(
            tuple((7 * i + 5 * j + 1) % 40 for j in range(1 + (i * 5) % 17)), seed + i
        )
        for i in range(count)
    ]


def expected_probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that transformers' own warpers define, [v]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone()).softmax(1)[0]


def chi_square_is_ordinary(counts: torch.Tensor, probs: torch.Tensor) -> bool:
    """Within 5 standard deviations of its mean; cells are merged up to 5 expected draws."""
    total = counts.sum()
    assert counts[probs == 0].sum() == 0
    order = probs.argsort(descending=True)
    expected, observed = (probs[order] * total).double(), counts[order].double()
    large = expected >= 5
    cells = [(e, o) for e, o in zip(expected[large], observed[large], strict=True)]
    if expected[~large].sum() >= 5:
        cells.append((expected[~large].sum(), observed[~large].sum()))
    statistic = sum((o - e) ** 2 / e for e, o in cells)
    degrees = len(cells) - 1
    return bool(abs(statistic - degrees) <= 5 * (2 * degrees) ** 0.5)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        *((1, 1, 0, 0), (0.6, 1, 0, 0), (1, 1, 5, 0), (1, 0.7, 0, 0), (0.8, 0.9, 12, 0)),
        *((1.5, 0.3, 3, 0), (1, 1, 0, 0.1), (0.7, 0.9, 12, 0.05), (1, 0.8, 0, 0.2)),
    ],
)
def test_samples_follow_the_warped_softmax(
    temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=1
    )
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 2
    draws = 40_000
    seeds = seed_tensor([request_seed("chi", i) for i in range(draws)], CPU)
    drawn = sample(logits.expand(draws, -1), seeds, 7, sampling)
    assert chi_square_is_ordinary(drawn.bincount(minlength=30), expected_probs(logits, sampling))


def test_positions_of_one_seed_are_independent_draws() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(4))
    seed = seed_tensor([99], CPU)
    drawn = torch.cat([sample(logits[None], seed, position, PLAIN) for position in range(5000)])
    probs = logits.softmax(0)
    assert chi_square_is_ordinary(drawn.bincount(minlength=20), probs)
    pairs = (drawn[:-1] * 20 + drawn[1:]).bincount(minlength=400)
    assert chi_square_is_ordinary(pairs, torch.outer(probs, probs).flatten())


def test_neighbouring_seeds_are_independent() -> None:
    noise = gumbel_noise(seed_tensor(list(range(200)), CPU), 0, torch.arange(500))
    assert abs(noise.mean() - 0.57722) < 0.02 and abs(noise.var() - torch.pi**2 / 6) < 0.03
    off_diagonal = torch.corrcoef(noise).fill_diagonal_(0).abs().max()
    assert off_diagonal < 6 / 500**0.5
    assert torch.isfinite(noise).all()


def test_improbable_tokens_of_a_large_vocabulary_keep_their_share() -> None:
    """Half of the mass lies in 60,000 tokens: a truncated Gumbel tail would lose some of it."""
    logits = torch.zeros(60_001)
    logits[0] = torch.log(torch.tensor(60_000.0))
    draws = 800
    seeds = seed_tensor([request_seed(i) for i in range(draws)], CPU)
    drawn = sample(logits.expand(draws, -1), seeds, 0, PLAIN)
    assert abs(int((drawn == 0).sum()) - draws / 2) < 5 * (draws / 4) ** 0.5


@pytest.mark.parametrize("top_p", [0.3, 0.9999])
def test_nucleus_of_a_large_vocabulary_is_right(top_p: float) -> None:
    """0.3 is found among the first candidates, 0.9999 needs the whole sort."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(5)) * 3
    sampling = Sampling(temperature=1, top_p=top_p, top_k=0, max_tokens=1)
    draws = 1000
    seeds = seed_tensor(list(range(draws)), CPU)
    drawn = sample(logits.expand(draws, -1), seeds, 0, sampling)
    assert chi_square_is_ordinary(drawn.bincount(minlength=5000), expected_probs(logits, sampling))


def test_large_and_negative_seeds_are_accepted() -> None:
    seeds = seed_tensor([2**63, 2**64 - 1, -5, 2**80 + 7], CPU)
    assert len(set(seeds.tolist())) == 4


@pytest.mark.parametrize("sampling", [PLAIN, PLAIN.model_copy(update={"top_k": 8, "top_p": 0.9})])
def test_a_sample_does_not_depend_on_its_batch(model_dir: Path, sampling: Sampling) -> None:
    wanted = requests(20)
    together = generator(model_dir).generate(wanted, sampling, "rollouts")
    assert generator(model_dir, batch_size=3).generate(wanted, sampling, "rollouts") == together
    reverse = generator(model_dir, batch_size=7).generate(wanted[::-1], sampling, "rollouts")
    assert reverse[::-1] == together
    alone = [generator(model_dir).generate([w], sampling, "rollouts")[0] for w in wanted[:5]]
    assert alone == together[:5]


def test_equal_prompts_with_different_seeds_differ(model_dir: Path) -> None:
    wanted = [GenerationRequest((1, 2, 3), seed) for seed in range(16)]
    completions = generator(model_dir).generate(wanted, PLAIN, "rollouts")
    assert len({c.token_ids for c in completions}) == 16
    again = generator(model_dir).generate(wanted, PLAIN, "rollouts")
    assert again == completions


def test_first_tokens_follow_the_model(model_dir: Path) -> None:
    draws = 4000
    one = PLAIN.model_copy(update={"max_tokens": 1})
    wanted = [GenerationRequest((5, 6, 7), request_seed(i)) for i in range(draws)]
    completions = generator(model_dir, batch_size=1000).generate(wanted, one, "rollouts")
    counts = Counter(c.token_ids[0] for c in completions)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        probs = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(0)
    assert chi_square_is_ordinary(torch.tensor([counts[i] for i in range(40)]), probs)


def test_greedy_in_batches_equals_row_by_row_and_transformers(model_dir: Path) -> None:
    wanted = requests(17)
    batched = generator(model_dir, batch_size=5).generate(wanted, GREEDY, "rollouts")
    rows = [generator(model_dir).generate([w], GREEDY, "rollouts")[0] for w in wanted]
    assert batched == rows
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for request, completion in zip(wanted, batched, strict=True):
        prompt = torch.tensor([request.prompt_token_ids])
        own = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert tuple(own[0, prompt.shape[1] :].tolist()) == completion.token_ids


def test_the_cache_with_room_holds_what_that_of_transformers_holds() -> None:
    """Also where it grows, and after operations that put other tensors in its place."""
    ours, theirs = LayerWithRoom(), DynamicLayer()
    addresses = []

    def both(operation: str, *arguments: object) -> None:
        for layer in (ours, theirs):
            getattr(layer, operation)(*arguments)
        assert ours.keys.equal(theirs.keys) and ours.values.equal(theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        addresses.append(ours.keys.data_ptr())

    def append(tokens: int, rows: int = 3) -> None:
        both("update", torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4))

    append(7)
    for _ in range(200):
        append(1)
    moves = sum(before != after for before, after in pairwise(addresses))
    assert moves == 3  # buffers of 71, 136 and 201 tokens were full
    both("crop", -5)
    append(1)
    both("batch_select_indices", torch.tensor([2, 0]))
    append(1, rows=2)
    both("reorder_cache", torch.tensor([1, 0]))
    append(2, rows=2)
    both("batch_repeat_interleave", 2)
    append(1, rows=4)
    for layer in (ours, theirs):
        layer.reset()
    append(3)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_generation_copies_no_keys_and_values(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(tmp_path / "model", family, eos_token_id=None, **SMALL)
    expected = generator(path).generate(requests(5), PLAIN, "test")
    layers = generator(path).model.config.num_hidden_layers
    concatenated = []
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer, "update", lambda *a, **k: concatenated.append(0) or update(*a, **k)
    )
    assert generator(path).generate(requests(5), PLAIN, "test") == expected
    assert not concatenated
    monkeypatch.setattr("nemo_trd.generation.local.cache_with_room", lambda model: {})
    assert generator(path).generate(requests(5), PLAIN, "test") == expected
    assert len(concatenated) == layers * PLAIN.max_tokens


def test_a_family_that_may_need_another_cache_keeps_that_of_transformers() -> None:
    assert cache_with_room(SimpleNamespace(config=SimpleNamespace(model_type="mamba"))) == {}


def test_greedy_ignores_top_k_top_p_and_seed(model_dir: Path) -> None:
    odd = GREEDY.model_copy(update={"top_k": 3, "top_p": 0.5})
    first = generator(model_dir).generate(requests(6, seed=0), GREEDY, "rollouts")
    assert generator(model_dir).generate(requests(6, seed=50), odd, "rollouts") == first


@torch.no_grad()
def test_penalties_are_those_of_each_rows_own_tokens(model_dir: Path) -> None:
    """Row by row, without padding; of the penalty on the prompt's tokens transformers knows too."""
    sampling = GREEDY.model_copy(update={"repetition_penalty": 1.4, "presence_penalty": 0.7})
    wanted = requests(9)
    assert 0 not in wanted[0].prompt_token_ids  # the padding
    found = generator(model_dir, batch_size=9).generate(wanted, sampling, "rollouts")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    repetition = RepetitionPenaltyLogitsProcessor(1.4)
    for request, completion in zip(wanted, found, strict=True):
        ids = list(request.prompt_token_ids)
        for token in completion.token_ids:
            row = torch.tensor([ids])
            scores = repetition(row, model(row).logits[:, -1])[0]
            for repeated in set(ids[len(request.prompt_token_ids) :]):
                scores[repeated] -= 0.7
            assert token == int(scores.argmax())
            ids.append(token)
    assert found != generator(model_dir).generate(wanted, GREEDY, "rollouts")


def test_generation_leaves_the_global_random_state_alone(model_dir: Path) -> None:
    local = generator(model_dir)
    before = torch.get_rng_state()
    local.generate(requests(4), PLAIN, "rollouts")
    assert torch.equal(torch.get_rng_state(), before)


def unbounded(model_dir: Path, count: int = 24) -> list[tuple[int, ...]]:
    """Greedy completions of the model without an EOS, all cut by length."""
    completions = generator(model_dir).generate(requests(count), GREEDY, "rollouts")
    assert {(len(c.token_ids), c.finish_reason) for c in completions} == {(12, "length")}
    return [c.token_ids for c in completions]


def cut_at(token_ids: tuple[int, ...], eos: set[int]) -> tuple[tuple[int, ...], str]:
    for i, token_id in enumerate(token_ids):
        if token_id in eos:
            return token_ids[: i + 1], "stop"
    return token_ids, "length"


@pytest.mark.parametrize("pad", ["none", "eos", "ordinary"])
@pytest.mark.parametrize("number_of_eos", [1, 3])
def test_completions_end_with_their_eos(
    model_dir: Path, tmp_path: Path, pad: str, number_of_eos: int
) -> None:
    """The ends of the free-running completions tell where the EOS must cut them."""
    free = unbounded(model_dir)
    by_frequency = [token for token, _ in Counter(sum(free, ())).most_common()]
    eos = [free[0][0], *by_frequency[-2:]][:number_of_eos]
    pads = {"none": None, "eos": eos[0], "ordinary": free[0][0]}
    settings = {"eos_token_id": eos if number_of_eos > 1 else eos[0], "pad_token_id": pads[pad]}
    path = make_model(tmp_path / "m", "qwen3", **(SMALL | settings))
    completions = generator(path, batch_size=7).generate(requests(24), GREEDY, "rollouts")
    expected = [cut_at(t, set(eos)) for t in free]
    assert [(c.token_ids, c.finish_reason) for c in completions] == expected
    assert any(len(t) == 1 for t, _ in expected)  # an EOS at once
    assert {"stop", "length"} == {reason for _, reason in expected}


def test_eos_at_the_length_limit_is_a_stop(model_dir: Path, tmp_path: Path) -> None:
    free = unbounded(model_dir, 1)[0]
    limit = next(i for i in range(1, 12) if free[i] not in free[:i]) + 1
    path = make_model(tmp_path / "m", "qwen3", **(SMALL | {"eos_token_id": free[limit - 1]}))
    tight = GREEDY.model_copy(update={"max_tokens": limit})
    (completion,) = generator(path).generate(requests(1), tight, "rollouts")
    assert (completion.token_ids, completion.finish_reason) == (free[:limit], "stop")


def test_tokenizer_eos_counts_beside_the_generation_config(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", "qwen3", tokenizer=True, eos_token_id=7)
    tokenizer_eos = 3
    assert generator(path).vocabulary.ends == {tokenizer_eos: tokenizer_eos, 7: 7}


def prefer(path: Path, *token_ids: int) -> None:
    """Make these tokens the most likely ones everywhere, the first most of all."""
    weights = load_file(path / "model.safetensors")
    norm, head = weights["model.norm.weight"], weights["lm_head.weight"]
    norm.fill_(0)
    norm[0] = 1  # then the logits are the first column of the head, times the hidden state's sign
    head[:, 0] = 0
    for rank, token_id in enumerate(token_ids):
        head[token_id, 0] = 9 - rank
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 50.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


PADDED = {"vocab_size": 300}  # the tokenizer has 261


def test_ids_without_a_token_are_never_sampled(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", "qwen3", tokenizer=True, **(SMALL | PADDED))
    prefer(path, 299, 261, 70)
    hot = PLAIN.model_copy(update={"temperature": 3.0})
    local = generator(path)
    assert local.vocabulary.never == tuple(range(261, 300))
    greedy = local.generate(requests(4), GREEDY, "rollouts")
    assert {token for c in greedy for token in c.token_ids} == {70}
    sampled = local.generate(requests(16), hot, "rollouts")
    assert max(token for c in sampled for token in c.token_ids) < 261


def test_a_teacher_speaks_in_the_words_of_its_student_and_ends_as_it_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher stops at 3 and 70 and knows two tokens more; the student stops at 3."""
    student = make_model(tmp_path / "s", "qwen3", tokenizer=True, **(SMALL | PADDED))
    teacher = make_model(tmp_path / "t", "qwen3", **(SMALL | PADDED))
    richer = byte_tokenizer()
    assert richer.add_tokens(["<|think|>", "<|/think|>"]) == 2
    richer.save_pretrained(teacher)
    for path, ends in ((student, 3), (teacher, [3, 70])):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    sources = [ModelSource(path=str(path)) for path in (teacher, student)]
    vocabulary = read_vocabulary(*sources)
    assert vocabulary.ends == {3: 3, 70: 3} and vocabulary.never == tuple(range(261, 300))
    assert f"ends its turn with {richer.decode([70])!r} (id 70)" in caplog.text
    assert "2 tokens that" in caplog.text and "<|think|>" in caplog.text
    assert read_vocabulary(sources[0]).never == tuple(range(263, 300))

    prefer(teacher, 261, 70)
    local = LocalGeneration(batch_size=64, dtype="fp32")
    model = LocalGenerator(str(teacher), local, False, False, vocabulary)
    answers = model.generate(requests(4), GREEDY, "refinements")
    assert [(c.token_ids, c.finish_reason) for c in answers] == [((3,), "stop")] * 4

    # Where the student stops at it too, nothing is put in its place.
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 70]}))
    assert read_vocabulary(*sources).ends == {3: 3, 70: 70}
    # A rewrite also ends where the student's turn would: what follows could not be said.
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 99]}))
    assert read_vocabulary(*sources).ends == {3: 3, 70: 3, 99: 99}


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "two"}', '{"eos_token_id": [1, "2"]}'])
def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    path = make_model(tmp_path / "m", "qwen3", tokenizer=True, **(SMALL | PADDED))
    (path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config.json"):
        read_vocabulary(ModelSource(path=str(path)))


def test_sampling_defaults_of_the_model_have_no_effect(model_dir: Path, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", "qwen3", **(SMALL | {"eos_token_id": None}))
    odd = {"do_sample": True, "temperature": 9.0, "top_k": 1, "repetition_penalty": 5.0}
    (path / "generation_config.json").write_text(json.dumps(odd | {"max_length": 3}))
    wanted = requests(8)
    expected = generator(model_dir).generate(wanted, PLAIN, "rollouts")
    assert generator(path).generate(wanted, PLAIN, "rollouts") == expected


def test_too_long_request_is_refused_before_anything_is_generated(model_dir: Path) -> None:
    local = generator(model_dir)
    local.model.generate = None  # calling it would be a TypeError
    long = [GenerationRequest((1,) * 53, 0)]
    with pytest.raises(ConfigError, match=r"max_tokens of rollouts = 12.*53.*= 64.*11 or less"):
        local.generate(requests(4) + long, GREEDY, "rollouts")
    with pytest.raises(ValueError, match="request 0 is empty"):
        local.generate([GenerationRequest((), 0)], GREEDY, "rollouts")
    with pytest.raises(ValueError, match="vocabulary of .* has 40"):
        local.generate([GenerationRequest((40,), 0)], GREEDY, "rollouts")


def test_longest_request_that_fits_is_generated(model_dir: Path) -> None:
    (completion,) = generator(model_dir).generate(
        [GenerationRequest((1,) * 52, 0)], GREEDY, "rollouts"
    )
    assert len(completion.token_ids) == 12


def test_no_requests_give_no_completions(model_dir: Path) -> None:
    assert generator(model_dir).generate([], PLAIN, "rollouts") == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_load_weights_changes_samples_and_version(family: str, tmp_path: Path) -> None:
    sizes = SMALL | {"eos_token_id": None}
    first, other = (make_model(tmp_path / f"{n}", family, seed=n, **sizes) for n in (0, 1))
    local = generator(first)
    before = local.generate(requests(4), PLAIN, "rollouts")
    assert {c.weight_version for c in before} == {0}
    local.load_weights(load_file(other / "model.safetensors").items(), version=3)
    after = local.generate(requests(4), PLAIN, "rollouts")
    assert {c.weight_version for c in after} == {3}
    fresh = generator(other).generate(requests(4), PLAIN, "rollouts")
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh]
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_may_come_under_either_name(tmp_path: Path, name: str) -> None:
    tied = SMALL | {"eos_token_id": None, "tie_word_embeddings": True}
    first = make_model(tmp_path / "a", "llama", seed=0, **tied)
    second = make_model(tmp_path / "b", "llama", seed=1, **tied)
    tensors = load_file(second / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors[name] = tensors.pop("model.embed_tokens.weight")
    local = generator(first)
    local.load_weights(tensors.items(), version=1)
    got = local.generate(requests(4), GREEDY, "rollouts")
    expected = generator(second).generate(requests(4), GREEDY, "rollouts")
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    both = tensors | {
        "model.embed_tokens.weight": tensors[name],
        "lm_head.weight": tensors[name] + 1,
    }
    with pytest.raises(ValueError, match="tied"):
        local.load_weights(both.items(), version=2)


def test_wrong_weights_are_refused(model_dir: Path) -> None:
    local = generator(model_dir)
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="'unknown.weight' does not exist"):
        local.load_weights([*tensors.items(), ("unknown.weight", torch.zeros(1))], 1)
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(48, 31\).*\(48, 32\)"):
        local.load_weights((tensors | {name: tensors[name][:, :-1]}).items(), 1)
    with pytest.raises(ValueError, match=rf"1 weights .* did not come.*{name}"):
        local.load_weights([t for t in tensors.items() if t[0] != name], 1)
    assert local.weight_version == 0


def test_a_directory_without_some_weights_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", "qwen3", **SMALL)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lack 1 weights, model.layers.1.mlp.up_proj.weight"):
        generator(path)


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN])
def test_logits_that_are_not_numbers_stop_the_run(model_dir: Path, sampling: Sampling) -> None:
    local = generator(model_dir)
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    local.load_weights(tensors.items(), version=5)
    with pytest.raises(RuntimeError, match="weight version 5"):
        local.generate(requests(2), sampling, "rollouts")


def test_progress_shows_requests_and_tokens_per_second(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    eos = unbounded(model_dir)[0][0]
    path = make_model(tmp_path / "m", "qwen3", **(SMALL | {"eos_token_id": eos}))
    quiet = generator(path, batch_size=8)
    long = PLAIN.model_copy(update={"max_tokens": 40})
    capfd.readouterr()
    expected = quiet.generate(requests(24), long, "rollouts")
    assert capfd.readouterr().err == ""
    shown = generator(path, batch_size=8, progress=True)
    assert shown.generate(requests(24), long, "rollouts") == expected
    err = capfd.readouterr().err
    assert "rollouts" in err and "/24" in err and "tok/s" in err
