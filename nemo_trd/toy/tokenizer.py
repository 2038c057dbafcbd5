"""A word-level Hugging Face tokenizer for the toy task, with a chat template.

Text is words separated by one space; a text of known words and its token ids are the same thing
in both directions.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from nemo_trd.toy.task import MARKS, NUMBERS, USUAL, product_labels, sum_labels

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# What conf/refinement/toy.yaml may say.
INSTRUCTIONS = (
    *("problem", "solution", "attempt", "rewrite", "solve", "the", "and", "keep", "fix"),
    *("right", "wrong", "steps", "only", "follow", ":", ",", "."),
)
WORDS = (*NUMBERS, *MARKS, *INSTRUCTIONS)
# Every turn ends with <|end|>, which is the EOS token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(products: int = USUAL) -> PreTrainedTokenizerFast:
    """The tokenizer that student and teacher share, for problems with at most so many products."""
    more = (*product_labels(products)[USUAL:], *sum_labels(products)[USUAL - 1 :])
    tokens = (PAD, UNKNOWN, END, *ROLES, *WORDS, *more)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(tokens)}, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=4096,
    )


def unknown_words(text: str) -> list[str]:
    """Words that the tokenizer would turn into <unk>."""
    return [word for word in text.split() if word not in WORDS]
