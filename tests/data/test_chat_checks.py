"""What is refused of a chat template at the start, and with which words."""

from typing import Any

import pytest
from tiny_tokenizers import (
    CHATML_TEMPLATE,
    DROPS_SYSTEM,
    IGNORES_PROMPT,
    OPENS_THOUGHT,
    byte_level_tokenizer,
    chatml_tokenizer,
)

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.chat_checks import check_chat_template, opening, thought, unread
from nemo_trd.toy.tokenizer import build_tokenizer

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}"
)
ALWAYS = IGNORES_PROMPT + "<|im_start|>assistant\n"


def check(template: str, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
    check_chat_template(chatml_tokenizer("bytes", template), kwargs or {}, **options)


def refused(template: str, kwargs: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(template, kwargs, **options)
    assert "Fix: " in str(error.value)
    return str(error.value)


def test_templates_as_published_are_accepted() -> None:
    check(CHATML_TEMPLATE, {"enable_thinking": False}, system_prompt="Be brief.")
    check(OPENS_THOUGHT)
    check(LLAMA2)  # needs no generation prompt: the answer follows [/INST]
    check(ALWAYS)
    marked = "{% generation %}{{ content | trim }}{% endgeneration %}"
    check(CHATML_TEMPLATE.replace("{{ content | trim }}", marked), {"enable_thinking": True})
    for tokenizer in (byte_level_tokenizer(), build_tokenizer()):
        check_chat_template(tokenizer, {}, system_prompt="Be brief.")


def test_a_dropped_system_prompt_is_named() -> None:
    check(DROPS_SYSTEM)
    message = refused(DROPS_SYSTEM, system_prompt="You solve problems.")
    assert message.startswith("data.system_prompt = 'You solve problems.'")
    assert "leaves system messages out" in message and "data.system_prompt=null" in message
    other = refused(
        DROPS_SYSTEM.replace("{% for", "You solve problems.{% for"),  # written by itself, always
        system_prompt="You solve problems.",
        system_field="refinement.templates.system",
    )
    assert other.startswith("refinement.templates.system = ")


@pytest.mark.parametrize(
    "template",
    [IGNORES_PROMPT, "{% for m in messages %}{{ m.content }}\n{% endfor %}"],
    ids=["headers", "nothing"],
)
def test_a_template_that_ignores_the_generation_prompt_is_refused(template: str) -> None:
    message = refused(template)
    assert message.startswith("tokenizer = 'tiny ChatML bytes'")
    assert "ignores add_generation_prompt" in message


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("\n\n{% if %}", "line 3: Expected an expression"),
        ("{{ 'a' | nosuch }}", "line 1: No filter named 'nosuch'"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_a_syntax_error_is_called_so_with_its_line(wrong: str, told: str) -> None:
    message = refused(wrong, system_prompt="Be brief.")
    assert "syntax error in line" in message and told in message
    assert "system" not in message


def test_a_template_that_does_not_show_the_problem_is_refused() -> None:
    assert "leaves out the user's message" in refused("{{ messages[0].role }}")
    broken = refused("{{ messages[0].content + 1 }}", system_prompt="Be brief.")
    assert "does not take a user's message (TypeError" in broken


def test_an_argument_that_is_never_read_is_named_with_the_one_that_was_meant() -> None:
    message = refused(CHATML_TEMPLATE, {"enable_thinkin": False})
    assert message.startswith("data.chat_template_kwargs.enable_thinkin = False")
    assert "never reads it" in message and "did you mean enable_thinking?" in message
    message = refused(CHATML_TEMPLATE, {"xyz": 1}, section="benchmarks.gsm8k")
    assert message.startswith("benchmarks.gsm8k.chat_template_kwargs.xyz = 1")
    assert "it reads enable_thinking" in message
    assert "set by the program" in refused(CHATML_TEMPLATE, {"messages": []})


def test_an_argument_that_stands_there_for_another_template_is_no_mistake() -> None:
    check(ALWAYS, {"think": False}, inherited=True)
    assert unread(chatml_tokenizer("bytes", ALWAYS), {"think": False}) == ["think"]
    assert "Fix: remove it" in refused(ALWAYS, {"think": False})


@pytest.mark.parametrize(
    ("template", "kwargs", "written", "state"),
    [
        (CHATML_TEMPLATE, {}, "<|im_start|>assistant\n", "none"),
        (
            CHATML_TEMPLATE,
            {"enable_thinking": False},
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "closed",
        ),
        (OPENS_THOUGHT, {}, "<|im_start|>assistant\n<think>\n", "open"),
        (LLAMA2, {}, "", "none"),
    ],
)
def test_how_a_turn_opens_is_known(
    template: str, kwargs: dict[str, Any], written: str, state: str
) -> None:
    found = opening(chatml_tokenizer("bytes", template), kwargs)
    assert (found, thought(found)) == (written, state)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("[THINK]", "open"),
        ("[THINK]x[/THINK]", "closed"),
        ("<seed:think>", "open"),
        ("<|START_THINKING|><|END_THINKING|>", "closed"),
        ("<thought>", "open"),
        ("I think", "none"),
    ],
)
def test_blocks_of_thought_are_known_by_their_tags(text: str, state: str) -> None:
    assert thought(text) == state
