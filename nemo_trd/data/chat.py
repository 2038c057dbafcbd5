"""Conversations and chat templates: from messages to the token ids of a prompt.

Imports neither torch nor transformers; `tokenizer` is always a Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_trd.data.control_tokens import Message, encode_chat
from nemo_trd.data.types import Completion, TokenIds
from nemo_trd.verifiers.thoughts import (
    THOUGHT_BEGINS,
    THOUGHT_ENDS,
    THOUGHT_OPENED,
    without_thoughts,
)

ROLES = ("system", "user", "assistant")


def render_chat(
    messages: Sequence[Message], tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> TokenIds:
    """Token ids of a conversation, ending where the assistant's turn begins.

    Only the template writes control tokens; what messages spell is text (`control_tokens`).

    Raises:
        jinja2.TemplateError: the template does not take such a conversation.
    """
    return encode_chat(
        messages,
        lambda hidden: render_text(hidden, tokenizer, chat_template_kwargs),
        tokenizer,
        chat_template(tokenizer, chat_template_kwargs),
    )


def render_text(
    messages: Sequence[Message],
    tokenizer: Any,
    chat_template_kwargs: dict[str, Any],
    generation_prompt: bool = True,
) -> str:
    """Text that the chat template renders for a conversation.

    Args:
        generation_prompt: whether the head of the assistant's turn is added.

    Raises:
        jinja2.TemplateError: the template does not take such a conversation.
    """
    return tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=generation_prompt,
        **chat_template_kwargs,
    )


def chat_template(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> str:
    """Source of the template that `render_text` uses; some tokenizers have several."""
    return tokenizer.get_chat_template(tools=chat_template_kwargs.get("tools"))


def conversation(system: str | None, user: str) -> list[Message]:
    """Messages of one user turn, after a system prompt where there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": user}]


def transcript(messages: list[Message]) -> str:
    """Problem as a refinement template shows it: every message that the student got, as text."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


_OPENING_TOKENS = 32  # at least as many as the sign of an opened thought has


def text_to_judge(text: str, prompt: Sequence[int], completion: Completion, tokenizer: Any) -> str:
    """Part of a completion's text that a verifier reads.

    Empty where the prompt ends with the sign that opens a thought (as chat templates of models
    that always think do) and the completion has none that ends it: the text shows neither, and a
    \\boxed{} in it would be taken for an answer. Where signs of thought are special tokens, which
    `text` lacks, it is what the completion says outside of its thoughts.
    """
    decoded = tokenizer.decode(list(completion.token_ids)) + completion.tail
    opening = tokenizer.decode(list(prompt[-_OPENING_TOKENS:]))
    if THOUGHT_OPENED.search(opening) and not THOUGHT_ENDS.search(decoded):
        return ""
    if _thought_signs(decoded) == _thought_signs(text):
        return text
    said = without_thoughts(decoded)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            said = said.replace(token.content, "")
    return said


def _thought_signs(text: str) -> int:
    return len(THOUGHT_BEGINS.findall(text)) + len(THOUGHT_ENDS.findall(text))
