"""What of a completion a verifier reads."""

from __future__ import annotations

import pytest
from tiny_tokenizers import byte_level_tokenizer

from nemo_trd.data.chat import text_to_judge
from nemo_trd.data.types import Completion

TOKENIZER = byte_level_tokenizer()
MARKS = ["[THINK]", "[/THINK]", "<think>", "</think>", "<|channel|>", "<|message|>"]
TOKENIZER.add_tokens(MARKS, special_tokens=True)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("opening", "written", "judged"),
    [
        ("", "[THINK]maybe 5", ""),
        ("", "[THINK]5[/THINK]It is 6.<|end|>", "It is 6."),
        ("", "<|channel|>analysis<|message|>5", ""),
        ("", "<|channel|>analysis<|message|>5<|end|><|channel|>final<|message|>6<|end|>", "6"),
        ("<think>\n", "maybe 5</think>I do not know.<|end|>", "I do not know."),
        ("<think>\n", "maybe 5", ""),
        ("", "5 <|end|>", "5 "),
        ("", "<reasoning>5</reasoning>6", "<reasoning>5</reasoning>6"),
    ],
)
def test_thoughts_between_special_tokens_are_not_judged(
    opening: str, written: str, judged: str
) -> None:
    completion = Completion(ids(written), "stop", 0)
    prompt = ids("<|user|>1?<|end|><|assistant|>" + opening)
    assert text_to_judge(completion.text(TOKENIZER), prompt, completion, TOKENIZER) == judged
