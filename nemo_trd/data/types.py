"""Types that flow through the loop: prompts, rollouts, refinements, trajectories, micro-batches.

Everything up to `Trajectory` is token ids in plain tuples, so that it can be pickled between
ranks, written as JSON and compared in tests. `TokenScores` holds arrays, `Microbatch` tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nemo_trd.verifiers.judgement import Answer

if TYPE_CHECKING:
    import numpy as np
    import torch

TokenIds = tuple[int, ...]
FinishReason = Literal["stop", "stop_string", "length", "abort"]
Rejection = Literal[
    "subset",  # refinement.subset leaves this rollout alone
    "context_overflow",  # the refinement prompt does not fit refinement.max_context_tokens
    "empty",  # the rewrite holds nothing but the terminating EOS
    "aborted",
    "truncated",  # it reached generation.refinement.max_tokens
    "nll_gap",  # beyond refinement.max_student_nll_gap
    "not_stored",  # generation.stored has no rewrite of this rollout
]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Natural log-probabilities that a model gives the n label tokens of one sequence.

    They are those of its distribution at temperature 1, over its whole vocabulary.
    """

    top_ids: np.ndarray  # int64 [n, k], the k most probable tokens at the place of each label
    top_logprobs: np.ndarray  # float32 [n, k], descending
    label_logprobs: np.ndarray  # float32 [n], of the label itself

    def first(self, count: int) -> TokenScores:
        """Those of the first `count` labels."""
        return TokenScores(
            self.top_ids[:count], self.top_logprobs[:count], self.label_logprobs[:count]
        )


if TYPE_CHECKING:
    Scores = TokenScores | None
else:  # to pydantic, which reads and writes completions without them
    Scores = Any


@dataclass(frozen=True)
class Completion:
    """Result of a generator for one request.

    `token_ids` ends with the EOS token exactly when `finish_reason` is "stop". With "stop_string"
    they are the tokens that lie wholly before a text of `Sampling.stop`, possibly none; `tail` is
    the part of the next token before that text.
    `weight_version` is the version of the weights that sampled it (0 for a frozen teacher); where
    several did, the oldest. Then `versions` has each with the first token that it sampled.
    `logprobs`, where the generator was asked for them, are natural log-probabilities of the tokens
    under the generator's own model and arithmetic: at temperature 1, over the whole vocabulary,
    before top-k and top-p, each token given those before it. `scores`, where they were asked for,
    are the same of each token and of the most likely ones at its place.
    `drafts`, of a server that checks some, are how many tokens were drafted, and how many of these
    it accepted. `redrawn` older completions were thrown away (`GenerationRequest.oldest_version`).
    """

    token_ids: TokenIds
    finish_reason: FinishReason
    weight_version: int
    logprobs: tuple[float, ...] | None = None
    tail: str = ""
    scores: Scores = field(default=None, compare=False, repr=False)
    drafts: tuple[int, int] | None = field(default=None, compare=False)
    versions: tuple[tuple[int, int], ...] = ()  # (version, first token)
    redrawn: int = field(default=0, compare=False)

    def text(self, tokenizer: Any) -> str:
        """Decode it without special tokens, up to the stop string that ended it, if any."""
        return tokenizer.decode(self.token_ids, skip_special_tokens=True) + self.tail


@dataclass(frozen=True)
class StoredPair:
    """y_o and y_r of one prompt, drawn before the run."""

    rollout: Completion
    refinement: Completion | None  # None: the teacher was not asked


@dataclass(frozen=True)
class Prompt:
    """One problem of the dataset."""

    index: int  # position in the dataset file, before any filtering: stable across runs
    problem: str  # the text that refinement templates show to the teacher
    token_ids: TokenIds  # x: the student's chat template, generation prompt included
    reference_solution: str | None = None  # y*: worked solution, seen by the teacher in OPSD only
    answer: Answer | None = None  # final answer, for the verifier
    # Messages behind `token_ids`, for a teacher with a chat template of its own. None
    # where only the ids are known: such a teacher sees these.
    messages: tuple[dict[str, Any], ...] | None = field(default=None, hash=False)
    stored: StoredPair | None = None  # with generation.stored


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue. Equal requests draw with equal random numbers.

    They give equal completions where logits are equal. On a GPU a batch of another size sums in
    another order: logits differ by rounding, and a draw that is as close may fall otherwise.
    """

    prompt_token_ids: TokenIds
    seed: int
    # Requests of equal affinity share a long prefix (a problem); servers cache it. No other effect.
    affinity: int | None = field(default=None, compare=False)
    # Weights older than these must not sample any token. None: the generator's own rule holds.
    oldest_version: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rollout:
    """y_o: one sample of the student for one prompt."""

    prompt: Prompt
    sample_index: int  # 0 .. samples of this prompt in this step - 1
    completion: Completion
    text: str  # decoded without special tokens
    correct: bool | None  # the verifier's verdict; None where there is no answer to compare with


@dataclass(frozen=True)
class FittedContext:
    """Teacher context within its token budget."""

    token_ids: TokenIds
    shortened: tuple[str, ...] = ()  # "rollout", "reference_solution": texts cut to fit


@dataclass(frozen=True)
class RefinementPrompt:
    """c_T for one rollout, or the reason why the teacher is not asked to rewrite it."""

    rollout: Rollout
    token_ids: TokenIds | None  # None exactly when `rejection` is set
    rejection: Rejection | None = None  # "subset", "context_overflow" or "aborted" (y_o itself)
    shortened: tuple[str, ...] = ()  # "rollout", "reference_solution": texts cut to fit
    # The same as the teacher sees it that scores, where teacher.chat_template_kwargs differ.
    scored_token_ids: TokenIds | None = None

    @property
    def scoring_context(self) -> TokenIds | None:
        """c_T of the loss with `algorithm.teacher_context=refine`."""
        return self.scored_token_ids or self.token_ids


@dataclass(frozen=True)
class Refinement:
    """y_r: the teacher's rewrite of a rollout, or the reason why there is none to train on."""

    request: RefinementPrompt
    completion: Completion | None  # None when no rewrite was asked for
    text: str  # decoded without special tokens; empty without a completion
    correct: bool | None  # the verifier's verdict on the rewrite
    rejection: Rejection | None  # None: accepted


@dataclass(frozen=True)
class Trajectory:
    """One sequence to train on: student context x + y, teacher context c_T + y."""

    prompt_index: int
    sample_index: int
    source: Literal["refinement", "rollout"]
    student_context: TokenIds
    teacher_context: TokenIds
    labels: TokenIds  # y, its terminating EOS included
    weight_version: int  # version of the student that sampled y_o
    shortened: tuple[str, ...] = ()  # names of the texts that were cut to fit its budget

    @property
    def name(self) -> str:
        """Name of the trajectory in error messages and samples."""
        return f"prompt {self.prompt_index} sample {self.sample_index} ({self.source})"


@dataclass(frozen=True)
class LabelValues:
    """Divergence and NLLs of each label of one trajectory, in nats, before the step's update."""

    divergence: list[float]  # before the clip
    student_nll: list[float]  # at the loss's temperature, as the teacher's
    teacher_nll: list[float]


@dataclass
class ContextBatch:
    """The sequences of one micro-batch as one model sees them, packed (THD).

    They are segments of one row, one after the other; where that is to be longer, a last segment
    without labels fills it up.
    """

    tokens: torch.Tensor  # int64 [1, t]
    position_ids: torch.Tensor  # int64 [1, t], from 0 in each segment
    label_positions: torch.Tensor  # int64 [n]: index into the row of what predicts label i
    lengths: tuple[int, ...]  # tokens of each of the s segments
    cu_seqlens: torch.Tensor  # int32 [s + 1]: their borders
    # int64 [t]: places of the tokens in the pack, for the part of it that a context parallel rank
    # holds (`megatron.context_parallel`); lengths and borders are those of the pack. None: all.
    places: torch.Tensor | None = None


@dataclass
class Microbatch:
    """Trajectories as tensors.

    Label i of the student is label i of the teacher, whose packs have the labels one after the
    other.
    """

    student: ContextBatch
    teacher: tuple[ContextBatch, ...]
    labels: torch.Tensor  # int64 [n], n = 0 for a filler that keeps ranks in lock-step
    trajectory_index: torch.Tensor  # int64 [n]: which entry of `trajectories` a label belongs to
    label_index: torch.Tensor  # int64 [n]: which label of that trajectory it is
    trajectories: tuple[Trajectory, ...]
