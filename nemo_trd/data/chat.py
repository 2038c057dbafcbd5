"""Conversations and chat templates: from messages to the token ids of a prompt.

Imports neither torch nor transformers; `tokenizer` is always a Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_trd.data.control_tokens import Message, encode_chat
from nemo_trd.data.types import Completion, TokenIds
from nemo_trd.verifiers.thoughts import THOUGHT_ENDS, THOUGHT_OPENED

ROLES = ("system", "user", "assistant")


def render_chat(
    messages: Sequence[Message], tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> TokenIds:
    """The conversation as token ids, ending where the assistant's turn begins.

    Control tokens are what the template writes; what messages spell is text (`control_tokens`).

    Raises:
        jinja2.TemplateError: the template does not take such a conversation.
    """
    return encode_chat(
        messages,
        lambda given: render_text(given, tokenizer, chat_template_kwargs),
        tokenizer,
        chat_template(tokenizer, chat_template_kwargs),
    )


def render_text(
    messages: Sequence[Message],
    tokenizer: Any,
    chat_template_kwargs: dict[str, Any],
    generation_prompt: bool = True,
) -> str:
    """What the chat template makes of a conversation.

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
    """The source of the template that `render_text` uses; some tokenizers have several."""
    return tokenizer.get_chat_template(tools=chat_template_kwargs.get("tools"))


def conversation(system: str | None, user: str) -> list[Message]:
    """A user's turn, after a system prompt where there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": user}]


def transcript(messages: list[Message]) -> str:
    """What a refinement template shows as the problem: all that the student was told."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


_OPENING_TOKENS = 32  # at least as many as the sign of an opened thought has


def text_to_judge(text: str, prompt: Sequence[int], completion: Completion, tokenizer: Any) -> str:
    """What of the text of a completion a verifier is to read.

    Nothing where the prompt ends with the sign that opens a thought (as chat templates of models
    that always think do) and the completion has none that ends it: the text shows neither, and a
    \\boxed{} in it would be taken for an answer.
    """
    if not THOUGHT_OPENED.search(tokenizer.decode(list(prompt[-_OPENING_TOKENS:]))):
        return text
    written = tokenizer.decode(list(completion.token_ids)) + completion.tail
    return text if THOUGHT_ENDS.search(written) else ""
