"""Checks of a chat template before any model is built: it is rendered and parsed.

Imports neither torch nor transformers; `tokenizer` is always a Hugging Face tokenizer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.data.chat import chat_template, conversation, render_text
from nemo_trd.data.control_tokens import Message
from nemo_trd.verifiers.thoughts import THOUGHT_BEGINS, THOUGHT_ENDS

# Arguments that apply_chat_template takes besides the variables of a template.
RESERVED_TEMPLATE_KWARGS = {
    *("tokenize", "add_generation_prompt", "continue_final_message", "conversation", "messages"),
    *("chat_template", "padding", "truncation", "max_length", "tokenizer_kwargs"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens"),
}
_WORDS = "Quokka{}quagga"  # stand in for the texts of a conversation


def check_chat_template(
    tokenizer: Any,
    chat_template_kwargs: dict[str, Any],
    section: str = "data",
    system_prompt: str | None = None,
    system_field: str = "data.system_prompt",
    inherited: bool = False,
) -> None:
    """Refuse a chat template that does not show its messages or ignores its arguments.

    Args:
        section: section of the settings that holds `chat_template_kwargs`.
        system_field: setting that holds `system_prompt`.
        inherited: whether they stand there for another template, which may read what this one
            does not.

    Raises:
        ConfigError: there is none, or it has a syntax error; an argument is ours, or is never
            read; the system prompt or the user's message is left out; nothing opens the
            assistant's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise _tokenizer_error(
            tokenizer,
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
    _check_rendering(tokenizer, chat_template_kwargs, system_prompt, system_field)
    if not inherited:
        _check_names(tokenizer, chat_template_kwargs, section)
    _check_generation_prompt(tokenizer, chat_template_kwargs)


def left_out(
    messages: Sequence[Message], tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> list[int]:
    """Positions of the messages that the chat template does not show.

    None where it takes the conversation with these texts only.
    """
    words = [_WORDS.format(position) for position in range(len(messages))]
    marked_messages = [{**m, "content": word} for m, word in zip(messages, words, strict=True)]
    if _refusal(tokenizer, chat_template_kwargs, marked_messages) is not None:
        return []
    text = render_text(marked_messages, tokenizer, chat_template_kwargs)
    return [position for position, word in enumerate(words) if word not in text]


def _check_rendering(
    tokenizer: Any, kwargs: dict[str, Any], system_prompt: str | None, system_field: str
) -> None:
    refusal = _refusal(tokenizer, kwargs, conversation(None, "?"))
    if refusal is None and system_prompt:
        refusal = _refusal(tokenizer, kwargs, conversation(system_prompt, "?"))
        if refusal is not None:
            raise rule_broken(
                system_field,
                system_prompt,
                f"the chat template of {_name(tokenizer)!r} takes no such system message "
                f"({refusal})",
                f"set {system_field}=null, and say it in the user's turn",
            )
    if isinstance(refusal, TemplateSyntaxError):
        raise _tokenizer_error(
            tokenizer,
            f"its chat template has a syntax error in line {refusal.lineno}: {refusal.message}",
            "correct chat_template.jinja there, or chat_template in its tokenizer_config.json",
        )
    if refusal is not None:
        raise _tokenizer_error(
            tokenizer,
            f"its chat template does not take a user's message ({refusal!r})",
            "correct it, or use the directory of an instruct model",
        )
    messages = conversation(system_prompt, "?")
    hidden = left_out(messages, tokenizer, kwargs)
    if len(messages) - 1 in hidden:
        raise _tokenizer_error(
            tokenizer, "its chat template leaves out the user's message", "correct it"
        )
    if hidden:
        raise rule_broken(
            system_field,
            system_prompt,
            f"the chat template of {_name(tokenizer)!r} leaves system messages out",
            f"set {system_field}=null, and say it in the user's turn, or correct the template",
        )


def _refusal(
    tokenizer: Any, kwargs: dict[str, Any], messages: Sequence[Message]
) -> Exception | None:
    try:
        render_text(messages, tokenizer, kwargs)
    except Exception as error:  # a template is a foreign program
        return error
    return None


def unread(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> list[str]:
    """Arguments that the template does not read."""
    variables = _variables(chat_template(tokenizer, chat_template_kwargs))
    return [key for key in chat_template_kwargs if key not in variables]


def _check_names(tokenizer: Any, kwargs: dict[str, Any], section: str) -> None:
    variables = _variables(chat_template(tokenizer, kwargs))
    for key in unread(tokenizer, kwargs):
        close = difflib.get_close_matches(key, variables, n=1)
        settable = ", ".join(sorted(variables - {"messages", "add_generation_prompt"}))
        fix = f"did you mean {close[0]}?" if close else f"it reads {settable}"
        if not settable:
            fix = "remove it"
        if section == "data":
            fix += "; what only the teacher's reads goes into chat_template_kwargs of refinement "
            fix += "and teacher"
        raise rule_broken(
            f"{section}.chat_template_kwargs.{key}",
            kwargs[key],
            f"the chat template of {_name(tokenizer)!r} never reads it",
            fix,
        )


class _GenerationTag(Extension):
    """Tag that transformers adds to Jinja: {% generation %} around an assistant's words."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """Names of the variables that a template reads."""
    environment = Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def _check_generation_prompt(tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a template whose prompt does not end where the completion begins.

    Most templates add the head of the assistant's turn on request. Some need none (Llama 2: the
    completion follows `[/INST]`): there the last turn of a finished conversation stands at that
    place.
    """
    messages = conversation(None, _WORDS.format(0))
    with_prompt = render_text(messages, tokenizer, kwargs)
    if with_prompt != render_text(messages, tokenizer, kwargs, generation_prompt=False):
        return
    reply = _WORDS.format(1)
    finished = [*messages, {"role": "assistant", "content": reply}]
    if _refusal(tokenizer, kwargs, finished) is None:
        text = render_text(finished, tokenizer, kwargs, generation_prompt=False)
        before, _, after = text.partition(with_prompt.rstrip())
        ends_the_turn = with_prompt.rpartition(_WORDS.format(0))[2].strip()
        if ends_the_turn and not before and after.lstrip().startswith(reply):
            return
    raise _tokenizer_error(
        tokenizer,
        "its chat template ignores add_generation_prompt: nothing tells the model that the "
        "assistant's turn begins",
        "let it write the head of that turn with {% if add_generation_prompt %}",
    )


# --- how turns open, for student and teacher ---


def opening(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> str:
    """Text that the template writes after the user's turn, before the assistant's first word."""
    messages = conversation(None, _WORDS.format(0))
    text = render_text(messages, tokenizer, chat_template_kwargs)
    without = render_text(messages, tokenizer, chat_template_kwargs, generation_prompt=False)
    if text.startswith(without):
        return text[len(without) :]
    return text.rpartition(_WORDS.format(0))[2]


def thought(text: str) -> Literal["open", "closed", "none"]:
    """State of a text's last block of thought: open at its end, closed, or none there."""
    begin, end = (
        max((match.start() for match in sign.finditer(text)), default=-1)
        for sign in (THOUGHT_BEGINS, THOUGHT_ENDS)
    )
    if begin == end:
        return "none"
    return "closed" if end > begin else "open"


def thinking_variables(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> list[str]:
    """Arguments of the template that seem to switch thinking."""
    variables = _variables(chat_template(tokenizer, chat_template_kwargs))
    return sorted(name for name in variables if re.search("think|reason", name))


def _tokenizer_error(tokenizer: Any, rule: str, fix: str) -> ConfigError:
    return rule_broken("tokenizer", _name(tokenizer), rule, fix)


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "")
