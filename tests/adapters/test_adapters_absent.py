"""Adapters without the packages that they translate for: in nobody's way, and clear about it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from nemo_trd.adapters.needed import needed


def test_importing_the_package_imports_no_adapter() -> None:
    code = (
        "import sys, nemo_trd, nemo_trd.adapters; "
        "heavy = {'torch', 'hydra', 'nemo', 'nemo_aligner', 'megatron'} & sys.modules.keys(); "
        "others = [m for m in sys.modules if m.startswith('nemo_trd.adapters.')]; "
        "assert not heavy and not others, (heavy, others)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=400)


def test_training_imports_no_other_package() -> None:
    code = (
        "import sys, nemo_trd.train; "
        "found = {'nemo', 'nemo_aligner', 'nemo_rl', 'megatron.bridge'} & sys.modules.keys(); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=400)


@pytest.mark.parametrize(
    ("module", "words"),
    [("nemo_aligner", ["nemo-aligner==0.7.0", "requirements-aligner.txt", "no extra"])],
)
def test_using_an_adapter_without_its_package_names_it(module: str, words: list[str]) -> None:
    with pytest.raises(ImportError) as refused:
        importlib.import_module(f"nemo_trd.adapters.{module}")
    for word in [*words, "Fix:"]:
        assert word in str(refused.value)


def test_amending_a_recipe_without_megatron_bridge_names_it() -> None:
    from nemo_trd.adapters.megatron_bridge import TRD, trd_callback, trd_recipe
    from nemo_trd.config.load import compose

    sizes = ["train.micro_batch_size=1", "train.max_tokens_per_micro_batch=null"]
    trd = TRD(compose(sizes))
    for use in (lambda: trd_recipe(None, trd), lambda: trd_callback(trd)):
        with pytest.raises(ImportError, match=r"megatron-bridge==0.6.2.*nemo_trd\[megatron-bridge"):
            use()


def test_a_missing_dependency_of_the_package_is_named_too() -> None:
    with pytest.raises(ImportError, match="package==1.*no_such_module.*Fix: install it"):  # noqa: SIM117
        with needed("package==1", "install it"):
            importlib.import_module("no_such_module")
