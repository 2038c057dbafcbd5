"""Generation inside the training process: Hugging Face `generate`, batched and left-padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteria,
)
from transformers.utils.logging import disable_progress_bar

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import LocalGeneration, ModelSource, Sampling
from nemo_trd.data.types import Completion, GenerationRequest, TokenIds
from nemo_trd.generation.gumbel import SeededSampler, seed_tensor
from nemo_trd.generation.pending import Pending
from nemo_trd.generation.protocol import Done
from nemo_trd.generation.stop_strings import StopStrings, decoder
from nemo_trd.models.directory import tensors_with_copies
from nemo_trd.models.dtypes import torch_dtype
from nemo_trd.models.family import FAMILIES, fused_tensors
from nemo_trd.models.vocabulary import Vocabulary, read_vocabulary

# The environment of NeMo-Aligner has transformers 4: an older name, and another kind of cache.
if int(transformers.__version__.split(".")[0]) >= 5:
    from nemo_trd.generation.kv_cache import cache_with_room

    _DTYPE_ARGUMENT = "dtype"
else:

    def cache_with_room(model: Any) -> dict[str, Any]:
        return {}

    _DTYPE_ARGUMENT = "torch_dtype"
# Stands in the left padding, which the attention mask hides, and after a row's EOS, where it is
# cut off. So it may be any id, an EOS or an ordinary token alike.
_FILLER = 0
_PROGRESS_INTERVAL = 16  # tokens between two looks at which rows have ended


class LocalGenerator:
    """A Hugging Face model that samples in this process, on CUDA where there is any.

    Implements `nemo_trd.generation.protocol.Generator`. Its `vocabulary` is the model's own, unless
    one is given. `weight_version` is 0 until `load_weights`, and stays 0 for a frozen teacher.

    Raises:
        ConfigError: `path` lacks weights that the model needs.
    """

    def __init__(
        self,
        path: str,
        local: LocalGeneration,
        trust_remote_code: bool,
        progress: bool,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.path = path
        self.batch_size = local.batch_size
        self.progress = progress
        if not progress:
            disable_progress_bar()  # transformers' own, of loading weights
        self.weight_version = 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(path, torch_dtype(local.dtype), trust_remote_code)
        self.model.to(self.device)
        source = ModelSource(path=path, trust_remote_code=trust_remote_code)
        self.vocabulary = vocabulary or read_vocabulary(source)
        self.eos_token_ids = frozenset(self.vocabulary.ends)
        self._decode = decoder(path, trust_remote_code)
        # Sampling defaults that come with a model (Qwen3: temperature 0.6, top-k 20) would
        # otherwise join in wherever a call leaves a value open.
        self.model.generation_config = GenerationConfig()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        description: str,
        done: Done | None = None,
    ) -> list[Completion]:
        """Completions in the order of `requests`; see `Generator`.

        Raises:
            ConfigError: a prompt with `sampling.max_tokens` exceeds what the model can attend to.
            ValueError: an empty prompt, or a token id outside the vocabulary.
            RuntimeError: the model's logits are not a number.
        """
        self._check(requests, sampling, description)
        by_length = sorted(
            range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids), reverse=True
        )
        completions: dict[int, Completion] = {}
        with self._progress_bar(len(requests), description) as progress:
            for start in range(0, len(requests), self.batch_size):
                chosen = by_length[start : start + self.batch_size]
                rows = self._generate_batch([requests[i] for i in chosen], sampling, progress)
                completions.update(zip(chosen, rows, strict=True))
                if done:
                    for position in chosen:
                        done(position, completions[position])
        return [completions[i] for i in range(len(requests))]

    async def stream(
        self, requests: Sequence[Pending], sampling: Sampling, description: str, done: Done
    ) -> None:
        """Complete all requests once the last one is known: batches go by length."""
        asked = [await request for request in requests]
        made = [(position, request) for position, request in enumerate(asked) if request]
        completions = self.generate([request for _, request in made], sampling, description)
        for (position, _), completion in zip(made, completions, strict=True):
            done(position, completion)

    @torch.inference_mode()
    def _generate_batch(
        self, requests: list[GenerationRequest], sampling: Sampling, progress: _Progress | None
    ) -> list[Completion]:
        prompts = [request.prompt_token_ids for request in requests]
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        input_ids = [[_FILLER] * n + list(p) for n, p in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        seeds = seed_tensor([request.seed for request in requests], self.device)
        prompt_ids = torch.tensor(input_ids, device=self.device)
        attention_mask = torch.tensor(mask, device=self.device)
        sampler = SeededSampler(seeds, prompt_ids, attention_mask, sampling)
        watching: list[StoppingCriteria] = [progress.watch(width)] if progress else []
        if sampling.stop:
            watching.append(_StopStrings(self._stops(sampling), prompts, width, self.eos_token_ids))
        sequences = self.model.generate(
            prompt_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                use_cache=True,
                disable_compile=True,
                eos_token_id=sorted(self.eos_token_ids) or None,
                suppress_tokens=list(self.vocabulary.never) or None,
                pad_token_id=_FILLER,
            ),
            logits_processor=[sampler],
            stopping_criteria=watching or None,
            **cache_with_room(self.model),
        )
        if sampler.saw_nan:
            raise RuntimeError(
                f"the logits of {self.path} are not a number with weight version "
                f"{self.weight_version}: training has diverged, or the weights are damaged"
            )
        rows = sequences[:, width:].tolist()
        completions = [self._cut(row, p, sampling) for row, p in zip(rows, prompts, strict=True)]
        if progress:
            progress.finish_batch(completions)
        return completions

    def _cut(self, token_ids: list[int], prompt: TokenIds, sampling: Sampling) -> Completion:
        """The completion in a row: its tokens before a text of `stop`, or up to the first id that
        ends it, with the end that it is given."""
        ids, version = tuple(token_ids), self.weight_version
        ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
        before = ids[: ends[0]] if ends else ids
        if sampling.stop and (cut := self._stops(sampling).cut(prompt, before)) is not None:
            return Completion(cut.token_ids, "stop_string", version, tail=cut.tail)
        if ends:
            return Completion(self.vocabulary.ended(ids[: ends[0] + 1]), "stop", version)
        return Completion(ids, "length", version)

    def _stops(self, sampling: Sampling) -> StopStrings:
        return StopStrings(sampling.stop, self._decode)

    def _check(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> None:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for number, request in enumerate(requests):
            prompt = request.prompt_token_ids
            if not prompt:
                raise ValueError(f"{description}: the prompt of request {number} is empty")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise ValueError(
                    f"{description}: request {number} has token ids from {min(prompt)} to "
                    f"{max(prompt)}, the vocabulary of {self.path} has {vocabulary}"
                )
            if limit is not None and len(prompt) + sampling.max_tokens > limit:
                raise rule_broken(
                    f"max_tokens of {description}",
                    sampling.max_tokens,
                    f"with a prompt of {len(prompt)} tokens it exceeds max_position_embeddings = "
                    f"{limit} of {self.path}",
                    f"set it to {limit - len(prompt)} or less, or shorten the prompts"
                    if len(prompt) < limit
                    else "shorten the prompts",
                )

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy tensors into the model as they come; nothing is kept of them.

        A weight that several names share (tied embeddings) may come under any of them. If this
        raises, the model may be a mixture of old and new weights: do not generate from it.

        Raises:
            ValueError: an unknown name, a wrong shape, a weight that did not come, or two
                different tensors for one shared weight.
        """
        own = weights_by_name(self.model)
        loaded: set[int] = set()
        for name, tensor in tensors:
            if name not in own:
                raise ValueError(f"weight {name!r} does not exist in {self.path}")
            target = own[name]
            if target.shape != tensor.shape:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, "
                    f"the model of {self.path} has {tuple(target.shape)}"
                )
            with torch.no_grad():
                source = tensor.to(target.device, target.dtype)
                if target.data_ptr() in loaded and not torch.equal(target, source):
                    raise ValueError(f"weight {name!r} is tied to one that came with other values")
                target.copy_(source)
            loaded.add(target.data_ptr())
        missing = [name for name, target in own.items() if target.data_ptr() not in loaded]
        if missing:
            raise ValueError(f"{len(missing)} weights of {self.path} did not come: {missing[:5]}")
        self.weight_version = version

    @contextmanager
    def _progress_bar(self, total: int, description: str) -> Iterator[_Progress | None]:
        if not self.progress:
            yield None
            return
        with tqdm(total=total, desc=description, unit="seq", leave=False) as bar:
            yield _Progress(bar, sorted(self.eos_token_ids))


class _Progress:
    """Shows how many requests are done, and tokens per second, also within a batch."""

    def __init__(self, bar: tqdm, eos_token_ids: list[int]) -> None:
        self.bar = bar
        self.eos_token_ids = eos_token_ids
        self.done = 0  # requests and tokens of the batches that are finished
        self.tokens = 0

    def watch(self, prompt_width: int) -> StoppingCriteria:
        return _Watch(self, prompt_width)

    def finish_batch(self, completions: list[Completion]) -> None:
        self.done += len(completions)
        self.tokens += sum(len(completion.token_ids) for completion in completions)
        self.show(self.done, self.tokens)

    def show(self, done: int, tokens: int) -> None:
        seconds = self.bar.format_dict["elapsed"]
        if seconds > 0:
            self.bar.set_postfix_str(f"{tokens / seconds:,.0f} tok/s", refresh=False)
        self.bar.update(done - self.bar.n)


class _StopStrings(StoppingCriteria):
    """Ends the rows that have come to a text of `stop`; `_cut` takes it off."""

    def __init__(
        self,
        stops: StopStrings,
        prompts: list[TokenIds],
        prompt_width: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.stops = stops
        self.prompts = prompts
        self.prompt_width = prompt_width
        self.ended: list[bool] = [False] * len(prompts)
        self.eos_token_ids = eos_token_ids

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        rows = input_ids[:, self.prompt_width :].tolist()
        for number, (prompt, row) in enumerate(zip(self.prompts, rows, strict=True)):
            if not self.ended[number]:
                self.ended[number] = row[-1] in self.eos_token_ids or self.stops.ends(prompt, row)
        return torch.tensor(self.ended, device=input_ids.device)


class _Watch(StoppingCriteria):
    """Never stops anything; it is where `generate` lets us look at the batch in the making."""

    def __init__(self, progress: _Progress, prompt_width: int) -> None:
        self.progress = progress
        self.prompt_width = prompt_width

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        generated = input_ids[:, self.prompt_width :]
        if generated.shape[1] % _PROGRESS_INTERVAL == 0:
            eos = torch.tensor(self.progress.eos_token_ids, device=input_ids.device)
            ended = torch.isin(generated, eos).cumsum(1) > 0  # from the EOS on
            done = int(ended[:, -1].sum())
            tokens = int((~ended).sum()) + done
            self.progress.show(self.progress.done + done, self.progress.tokens + tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load_model(
    path: str, dtype: torch.dtype, trust_remote_code: bool, device_map: str | None = None
) -> Any:
    """A `PreTrainedModel`; typed Any because its decorators hide the signature of `to`.

    Raises:
        ConfigError: `path` lacks weights that the model needs.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        device_map=device_map,
        **{_DTYPE_ARGUMENT: dtype},
    )
    model, loading = loaded
    if loading["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise rule_broken(
            "path of the model",
            path,
            f"its files lack {len(loading['missing_keys'])} weights, "
            f"{min(loading['missing_keys'])} among them",
            "copy the directory again",
        )
    with torch.no_grad():
        for name, file in tensors_with_copies(Path(path), "path of the model").items():
            with safe_open(file, framework="pt") as opened:
                weights_by_name(model)[name].copy_(opened.get_tensor(name))
    return model.eval().requires_grad_(False)


def weights_by_name(model: Any) -> dict[str, torch.Tensor]:
    """Weights of a `PreTrainedModel` under the names of its files, experts one by one."""
    own = dict(model.state_dict())
    fused = fused_tensors(model.config) if model.config.model_type in FAMILIES else {}
    for name, (_, modules) in fused.items():
        if name in own:  # transformers 4 computes expert by expert
            whole, below = own.pop(name), name.rpartition(".")[0]
            for number, expert in enumerate(whole):
                rows = expert.split([rows for _, rows in modules])
                for (module, _), part in zip(modules, rows, strict=True):
                    own[f"{below}.{number}.{module}.weight"] = part
    return own
