"""Which model a running server says that it serves, and whether that is the one in a directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from nemo_trd.config.errors import rule_broken
from nemo_trd.data.types import TokenIds
from nemo_trd.generation.api import CHECK_SECONDS, INITIAL_WEIGHTS

log = logging.getLogger(__name__)

# Digits, words, white space, other alphabets: tokenizers differ on one of them.
PROBE = "The sum of 1234 and 0.5 is\n\n  \\boxed{1234.5}; naïve, 数学, \t🙂"
URLS, NAME = "generation.vllm.teacher.urls", "generation.vllm.teacher.served_name"


@dataclass(frozen=True)
class Served:
    """Model, weights and tokenizer of one server, as it reports them."""

    url: str
    names: tuple[str, ...]  # its model's id, and the path that it was loaded from
    weights: str | None  # label of their version; None: it does not tell
    probe: TokenIds | None  # what its tokenizer makes of `PROBE`; None: it does not tell


def ask(url: str, api_key: SecretStr | None) -> Served | None:
    """None, with a warning, where the server does not answer: generation will find that too."""
    headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
    try:
        with httpx.Client(
            base_url=url, headers=headers, timeout=CHECK_SECONDS, trust_env=False
        ) as client:
            models = _json(client.get("/v1/models")).get("data") or [{}]
            names = [models[0].get(key) for key in ("id", "root")]
            label = _json(client.get("/weight_info")).get("weight_version")
            body = {"prompt": PROBE, "add_special_tokens": False, "model": names[0]}
            tokens = _json(client.post("/tokenize", json=body)).get("tokens")
    except (httpx.HTTPError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        log.warning("%s was not asked which model it serves: %s", url, what)
        return None
    return Served(
        url,
        tuple(str(name) for name in names if name),
        None if label is None else str(label),
        None if tokens is None else tuple(tokens),
    )


def _json(response: httpx.Response) -> Mapping[str, Any]:
    """Nothing where a server has no such endpoint."""
    content = response.json() if response.status_code == 200 else {}
    return content if isinstance(content, Mapping) else {}


def check_weights_and_tokenizer(served: Served, tokenizer: Any) -> None:
    """Refuse a server of something else than a frozen model with this tokenizer.

    Raises:
        ConfigError
    """
    if served.weights not in (None, INITIAL_WEIGHTS):
        raise rule_broken(
            URLS,
            served.url,
            f"its weights have been replaced (version {served.weights}), as those of the student's "
            "servers are; a teacher keeps the weights that it has loaded",
            "give servers of the teacher alone, freshly started",
        )
    expected = tuple(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if served.probe is not None and served.probe != expected:
        raise rule_broken(
            URLS,
            served.url,
            f"it serves {_named(served)}, whose tokenizer makes {list(served.probe[:8])}... of a "
            f"text of which that of model.teacher.path makes {list(expected[:8])}...",
            "serve the model of model.teacher.path there",
        )


def check_name(served: Served, directory: Path, served_name: str | None) -> None:
    """Refuse a server that reports another model than that of `directory`.

    Names are compared without the directories before them: what is /models/Qwen3-8B here may be
    Qwen/Qwen3-8B there.

    Raises:
        ConfigError
    """
    expected = {served_name} if served_name is not None else names_of(directory)
    if not served.names:
        log.warning("%s does not say which model it serves", served.url)
        return
    reported = {*served.names} | {last_name(name) for name in served.names}
    if {name.casefold() for name in reported} & {name.casefold() for name in expected}:
        return
    raise rule_broken(
        URLS,
        served.url,
        f"it serves {_named(served)}, and {NAME if served_name else 'model.teacher.path'} is "
        f"{' or '.join(sorted(expected))}",
        f"serve the teacher there; if it is the teacher, set {NAME}={last_name(served.names[-1])}",
    )


def check_log_probabilities(
    served: Served, reported: list[float], own: list[float], allowed: float, tokens: list[str]
) -> float:
    """The mean |difference| of the log-probabilities of one short text, in nats.

    Raises:
        ConfigError: it is more than `allowed`.
    """
    sizes = [abs(there - here) for there, here in zip(reported, own, strict=True)]
    mean = sum(sizes) / len(sizes)
    if mean <= allowed:
        return mean
    worst = max(range(len(sizes)), key=sizes.__getitem__)
    raise rule_broken(
        URLS,
        served.url,
        f"it serves {_named(served)}, whose log-probabilities differ from those of the teacher's "
        f"weights by {mean:.4f} nats on average over {len(sizes)} tokens, where {allowed:g} are "
        f"expected at most; the most at {tokens[worst]!r}: {reported[worst]:.3f} there, "
        f"{own[worst]:.3f} here",
        "serve the model of model.teacher.path there; if only its precision differs, raise "
        "generation.vllm.teacher.max_difference",
    )


def names_of(directory: Path) -> set[str]:
    """Under which names the model of a directory may be served."""
    names = {last_name(str(directory)), last_name(str(directory.resolve()))}
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        names.add(last_name(str(settings.get("_name_or_path") or "")))
    except (OSError, ValueError, AttributeError):
        pass  # what reads the model tells that
    return names - {""}


def last_name(path: str) -> str:
    """The last part of a path or of ORGANISATION/MODEL; in a hub's cache, the model's name."""
    parts = [part for part in path.split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else (parts or [""])[-1]


def _named(served: Served) -> str:
    return " from ".join(dict.fromkeys(served.names)) or "a model without a name"
