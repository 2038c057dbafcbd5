"""Real tokenizers, made here: nothing is downloaded and every token is known."""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
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


# As Qwen3's: an earlier turn is shown without its thoughts, and thinking can be switched off.
CHATML_TEMPLATE = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
DROPS_SYSTEM = CHATML_TEMPLATE.replace(" in messages %}", " in messages if m.role != 'system' %}")
IGNORES_PROMPT = CHATML_TEMPLATE.partition("{% if add_generation_prompt %}")[0]
OPENS_THOUGHT = CHATML_TEMPLATE.replace(
    "{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}"
)
CHATML_CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")


def chatml_tokenizer(
    spelling: str = "bytes", chat_template: str = CHATML_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A tokenizer of the Qwen kind (`bytes`), or one that spells words in another way.

    bytes: byte-level BPE. first, always, legacy: words that begin with ▁, which text after a
    control token gets as well, or not (Llama 2). unigram: its model knows control tokens too.
    `<think>` is an added token, but not a special one.
    """
    trainer: trainers.Trainer
    if spelling == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=350, initial_alphabet=alphabet, show_progress=False
        )
    else:
        letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
        special = ["<unk>", *CHATML_CONTROLS[:3]]
        scheme = "first" if spelling == "legacy" else spelling.replace("unigram", "always")
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        if spelling == "unigram":
            core = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(
                vocab_size=200,
                special_tokens=special,
                unk_token="<unk>",
                initial_alphabet=letters,
                show_progress=False,
            )
        if spelling == "legacy":
            prepended = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            core.normalizer = normalizers.Sequence(prepended)
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(CORPUS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
        name_or_path=f"tiny ChatML {spelling}",
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer
