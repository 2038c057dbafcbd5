"""The key that servers ask for. It is shown nowhere: neither in logs nor on command lines."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from nemo_trd.config.errors import rule_broken


def read_api_key(variable: str, file: str | None) -> SecretStr | None:
    """The servers' key, from a file if one is given, else from the environment if it is there.

    Raises:
        ConfigError: the file cannot be read, or the key is empty or not printable ASCII.
    """
    if file is not None:
        try:
            key = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise rule_broken(
                "generation.vllm.api_key_file", file, f"it cannot be read: {error}", "mend it"
            ) from error
    elif variable in os.environ:
        key = os.environ[variable].strip()
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise rule_broken(
            "generation.vllm.api_key_file" if file else "generation.vllm.api_key_env",
            file or variable,
            "it holds no key: one word of printable ASCII characters",
            "write one into it, `openssl rand -hex 32` makes one",
        )
    return SecretStr(key)
