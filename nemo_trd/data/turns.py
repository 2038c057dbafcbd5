"""Reads conversations in the layouts of OpenAI (role, content) and ShareGPT (from, value)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nemo_trd.data.chat import ROLES
from nemo_trd.data.control_tokens import Message
from nemo_trd.data.row import RowReader

# Role of each name by which datasets call a speaker.
SPEAKERS = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(reader: RowReader, column: str) -> list[Message]:
    """Messages of a conversation, each with role and content.

    Raises:
        BadRow: it is no conversation, or holds something that is no text.
    """
    value = reader.value("messages", column)
    turns = _as_list(value)
    if not turns:
        rule = "it must be a list of messages that is not empty"
        raise reader.bad("messages", column, value, rule)
    messages = []
    for position, message in enumerate(turns):
        speaker, content = _speaker_and_content(message)
        if speaker not in SPEAKERS:
            rule = (
                f"message {position} must be an object whose role is one of {ROLES}, or whose "
                '"from" is human, gpt or system'
            )
            raise reader.bad("messages", column, value, rule)
        role = SPEAKERS[speaker]
        if role == "system" and position > 0:
            rule = "only the first message may be from the system"
            raise reader.bad("messages", column, value, rule)
        if role == "system" and _is_blank(content):
            continue  # an empty system prompt is none, as in a column of system prompts
        text = _text(reader, column, value, position, content)
        # Parquet gives every message every key; a null stands for a key that is not there.
        others = {k: v for k, v in message.items() if v is not None and k not in ("from", "value")}
        # The other keys of a message reach the template: they must be text as well.
        reader.valid("messages", column, json.dumps(others, ensure_ascii=False, default=str))
        messages.append({**others, "role": role, "content": text})
    if not messages:
        raise reader.bad("messages", column, value, "it holds nothing but an empty system prompt")
    return messages


def _is_blank(content: Any) -> bool:
    return content in (None, []) or (isinstance(content, str) and not content.strip())


def ends_with_user(
    reader: RowReader, column: str, messages: Sequence[Message], setting: str
) -> None:
    """Check that the last message is from the user.

    Raises:
        BadRow: there is nothing that the student could answer.
    """
    if not messages or messages[-1]["role"] != "user":
        rule = "the last message must be from the user"
        if messages and messages[-1]["role"] == "assistant":
            rule += f" (as a worked solution it can be taken away: {setting}=reference_solution)"
        raise reader.bad("messages", column, messages, rule)


def _as_list(value: Any) -> list[Any] | None:
    """Messages as a list; also from JSON in a text, and from a list for each key (`datasets`)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            return None
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def _speaker_and_content(message: Any) -> tuple[str | None, Any]:
    if not isinstance(message, dict):
        return None, None
    speaker = message.get("role") or message.get("from")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    return speaker.strip().lower() if isinstance(speaker, str) else None, content


def _text(reader: RowReader, column: str, value: Any, position: int, content: Any) -> str:
    """Text of a message; its parts, where it has several, become lines."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            kind = part.get("type")
            if kind not in (None, *TEXT_PARTS) or not isinstance(part.get("text"), str):
                rule = f"message {position} holds a part of type {kind!r}, and only texts are read"
                raise reader.bad("messages", column, value, rule)
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        rule = f"the content of message {position} must be a text that is not empty"
        raise reader.bad("messages", column, value, rule)
    return reader.valid("messages", column, content)
