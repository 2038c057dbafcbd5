"""Real tokenizers, made here: nothing is downloaded and every token is known."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is defined and not think %}"
    "<think></think>{% endif %}{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHAT_TEMPLATE
)
CORPUS = [
    "Tom has 3 apples and buys 12 more. How many apples does he have? He has 3 + 12 = 15.",
    "The answer is 15. This is a solution with some steps; the first step is right.",
    "[... 123 tokens left out ...]",
]


def byte_level_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, merges: int = 120
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any text comes back as it went in, with chat special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special) + merges,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    # As Llama's: encoding adds a BOS of its own, unless it is told not to.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=chat_template,
        name_or_path="tiny byte-level BPE",
    )
