"""Conversations and chat templates: from messages to the token ids of a prompt.

Imports neither torch nor transformers; `tokenizer` is always a Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_trd.config import rule_broken
from nemo_trd.types import TokenIds

Message = dict[str, Any]  # {"role": ..., "content": ...}
ROLES = ("system", "user", "assistant")
RESERVED_TEMPLATE_KWARGS = {"tokenize", "add_generation_prompt", "conversation", "chat_template"}


def check_chat_template(
    tokenizer: Any, chat_template_kwargs: dict[str, Any], section: str = "data"
) -> None:
    """Raises ConfigError when the tokenizer has no chat template or an argument is ours."""
    if not getattr(tokenizer, "chat_template", None):
        raise rule_broken(
            "tokenizer",
            getattr(tokenizer, "name_or_path", ""),
            "it has no chat template, which turns a problem into a prompt",
            "use the directory of an instruct model, or put a chat_template.jinja into this one",
        )
    reserved = RESERVED_TEMPLATE_KWARGS & set(chat_template_kwargs)
    if reserved:
        raise rule_broken(
            f"{section}.chat_template_kwargs",
            sorted(reserved),
            "these arguments are set by the program",
            "remove them",
        )


def render_chat(
    messages: Sequence[Message], tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> TokenIds:
    """The conversation as token ids, ending where the assistant's turn begins.

    Raises:
        jinja2.TemplateError: the template does not take such a conversation.
    """
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    # The template has written the special tokens; the tokenizer must not add a second BOS.
    # `verbose` off: the caller checks lengths and reports them with numbers.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def conversation(system: str | None, user: str) -> list[Message]:
    """A user's turn, after a system prompt where there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": user}]


def transcript(messages: list[Message]) -> str:
    """What a refinement template shows as the problem: all that the student was told."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
