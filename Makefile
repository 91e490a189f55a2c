# `make demo` and `make test` need nothing but a Python >= 3.12; each makes a virtual environment
# of its own, and installs a CUDA jaxlib if there is an NVIDIA GPU.

SUITABLE := import sys; sys.exit(sys.version_info < (3, 12))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python; do \
	$$p -c '$(SUITABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)
comma := ,
# The first line of nvidia-smi's table names the CUDA version that the driver supports.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA.* Version: *\([0-9]*\).*/\1/p' | head -n 1)
GPU_EXTRA := $(if $(CUDA),$(if $(filter 12,$(CUDA)),$(comma)cuda12,$(comma)cuda13))

VENV := .venv
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: demo test lint types notebooks test-lowest test-kernels test-gpu test-models clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/demo/.done ## load a real chat model, quantize it to FP8, compare, chat
	@$(VENV)/demo/bin/jaxquant demo

test: $(VENV)/test/.done ## run all tests
	@$(VENV)/test/bin/python -c 'from jaxquant.demo.run import smollm2; smollm2()'
	@JAXQUANT_TEST_MODEL=$$($(VENV)/test/bin/python -c \
		'from jaxquant.demo.run import smollm2; print(smollm2())') \
		$(VENV)/test/bin/python -m pytest

lint: $(VENV)/test/.dev ## ruff: lint and format
	@$(VENV)/test/bin/ruff check . && $(VENV)/test/bin/ruff format --check .

types: $(VENV)/test/.dev ## pyright
	@$(VENV)/test/bin/pyright --pythonpath $(VENV)/test/bin/python

notebooks: $(VENV)/test/.dev ## run the notebooks
	@$(VENV)/test/bin/python -m pytest --nbmake notebooks

test-lowest: $(VENV)/lowest/.done ## run the core tests with the lowest allowed versions
	@$(VENV)/lowest/bin/python -m pytest tests --ignore tests/demo -p no:cacheprovider

test-kernels: $(VENV)/kernels/.done ## compile the GPU kernels for an H200; needs no GPU
	@$(VENV)/kernels/bin/python -m pytest tests/*/test_*aot.py tests/transform/test_hlo.py

test-gpu: $(VENV)/test/.done ## run the kernels' tests on this machine's Hopper GPU
	@JAXQUANT_TEST_GPU=1 $(VENV)/test/bin/python -m pytest tests/matmul tests/attention

test-models: $(VENV)/models/.done ## run transformers that other people wrote, in FP8
	@$(VENV)/models/bin/python -m pytest tests/transform/test_third_party.py

clean: ## remove the virtual environments
	rm -rf $(VENV)

# $(call install,NAME,WHAT): make the environment NAME and install WHAT into it.
define install
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.12 found; set PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV)/$(1) with $$($(PYTHON) --version)$(if $(CUDA), for CUDA $(CUDA))"
	@$(PYTHON) -m venv $(VENV)/$(1)
	@$(VENV)/$(1)/bin/python -m pip install $(PIP_FLAGS) $(2)
endef

$(VENV)/demo/.done: pyproject.toml
	$(call install,demo,-e '.[demo$(GPU_EXTRA)]')
	@touch $@

$(VENV)/test/.done: pyproject.toml
	$(call install,test,-e '.[test$(GPU_EXTRA)]')
	@touch $@

$(VENV)/test/.dev: $(VENV)/test/.done
	@$(VENV)/test/bin/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@touch $@

# Without its dependencies the CUDA plugin compiles, but finds no GPU libraries.
$(VENV)/kernels/.done: pyproject.toml
	$(call install,kernels,-e '.[test]')
	@version=$$($(VENV)/kernels/bin/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	$(VENV)/kernels/bin/python -m pip install $(PIP_FLAGS) --no-deps \
		jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

$(VENV)/models/.done: pyproject.toml
	$(call install,models,-e '.[test-models]')
	@touch $@

$(VENV)/lowest/.done: pyproject.toml constraints-lowest.txt
	$(call install,lowest,-e '.[test]' -c constraints-lowest.txt)
	@touch $@
