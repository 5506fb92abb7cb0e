# `make demo` and `make test` are all that is needed on a machine with Python 3.11+ and make.
# Everything happens in ./.venv; nothing outside this folder is changed.

PYTHON ?= python3
CORES ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	if [ "$$n" -gt 8 ]; then n=8; fi; echo "$$n")
PYTEST_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

unexport PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PYTHONNOUSERSITE := 1

PIP := .venv/bin/python -m pip --quiet --require-virtualenv
WITH_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
DEMO := results/comparison/config

# A stamp holds the folder it was made in: scripts of a virtual environment hold absolute paths, so
# one that was moved or whose Python is gone is made anew, like one that was never finished.
ifneq ($(shell .venv/bin/python -c "" 2>/dev/null && cat .venv/.core-stamp 2>/dev/null),$(CURDIR))
.venv/.core-stamp: FORCE
endif
ifneq ($(shell .venv-vllm/bin/python -c "" 2>/dev/null && cat .venv-vllm/.stamp 2>/dev/null),$(CURDIR))
.venv-vllm/.stamp: FORCE
endif

.PHONY: help demo test test-fast test-cluster vllm-test lint format envs clean clean-results FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: .venv/.core-stamp ## install, run the default comparison, write its report, print its table
	@$(WITH_VENV) snakemake --cores $(CORES) --quiet rules
	@if [ ! $(DEMO)/report.html -nt $(DEMO)/table.csv ]; then \
		$(WITH_VENV) snakemake --cores 1 --quiet all --report $(DEMO)/report.html; \
	fi
	@.venv/bin/tlora table config/config.yaml

test: .venv/.dev-stamp .venv-vllm/.stamp ## install and run all tests
	@$(WITH_VENV) OMP_NUM_THREADS=1 python -m pytest --ignore=tests/cluster --numprocesses $(CORES) \
		--dist loadfile --no-loadscope-reorder --durations 40 $(PYTEST_ARGS)

test-cluster: .venv/.dev-stamp ## tests on a real, throw-away Slurm (root on Debian)
	@$(WITH_VENV) OMP_NUM_THREADS=1 python -m pytest tests/cluster --numprocesses 3 \
		--dist loadfile $(PYTEST_ARGS)

test-fast: .venv/.dev-stamp ## the tests that are not marked slow (under three minutes)
	@$(WITH_VENV) OMP_NUM_THREADS=1 python -m pytest -m "not slow" --numprocesses 2 $(PYTEST_ARGS)

vllm-test: .venv-vllm/.stamp ## install vLLM for the CPU, which only tests use (1.4 GB, x86-64)

lint: .venv/.dev-stamp ## check style, formatting, the workflow and the direction of imports
	@$(WITH_VENV) ruff check .
	@$(WITH_VENV) ruff format --check .
	@$(WITH_VENV) snakefmt --check Snakefile workflow
	@$(WITH_VENV) snakemake --lint
	@$(WITH_VENV) lint-imports

format: .venv/.dev-stamp ## rewrite Python and Snakemake files in the project's style
	@$(WITH_VENV) ruff check --fix --exit-zero --quiet .
	@$(WITH_VENV) ruff format .
	@$(WITH_VENV) snakefmt Snakefile workflow

envs: ## write envs/*.yaml from envs/*.lock
	@$(PYTHON) envs/render.py

clean: ## remove .venv, .venv-vllm, build products and tools' caches; results stay
	@rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find tlora tests workflow envs -name __pycache__ -type d -prune -exec rm -rf {} +

clean-results: ## remove results, logs and Snakemake's records (asks; YES=1 does not ask)
	@if [ "$${YES:-}" != 1 ]; then \
		read -r -p "Remove results, logs and .snakemake in $$PWD? [y/N] " answer || true; \
		[ "$${answer:-}" = y ] || { echo "nothing removed"; exit 1; }; \
	fi; \
	rm -rf results logs .snakemake

# torch comes first and with its own dependencies, because a CUDA build needs more than is listed.
.venv/.core-stamp: envs/core.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "$(PYTHON): not found; Python 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("%s is Python %d.%d; \
	3.11 or newer is needed: make PYTHON=..." % (sys.executable, v[0], v[1]))'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "python3-venv is missing: install it (Debian, Ubuntu: apt-get install" \
		"python3-venv) and start make again" >&2; exit 1; }
	@if [ "$$(cat .venv/.core-stamp 2>/dev/null)" != "$(CURDIR)" ] || ! .venv/bin/python -c ""; then \
		echo "making .venv (some minutes; about 2 GB, more where torch is a CUDA build)"; \
		"$(PYTHON)" -m venv --clear .venv; \
	fi
	@rm -f .venv/.core-stamp .venv/.dev-stamp
	@.venv/bin/python -m pip install --constraint envs/core.lock torch
	@echo "installing envs/core.lock"; $(PIP) install --no-deps --requirement envs/core.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@.venv/bin/python -m pip check
	@.venv/bin/python -c 'import torch'
	@printf '%s\n' "$(CURDIR)" > $@

# Tests train with DeepSpeed, score generated programs and run lm_eval: the extras of these names.
.venv/.dev-stamp: .venv/.core-stamp envs/dev.lock envs/train.lock envs/code.lock envs/lm_eval.lock
	@rm -f $@
	@echo "installing $(filter %.lock,$^)"
	@$(PIP) install --no-deps $(addprefix --requirement ,$(filter %.lock,$^))
	@.venv/bin/python -m pip check
	@touch $@

# An environment on top of .venv: torch and most of the rest is not installed twice. Tests that need
# it are skipped where it cannot be had; its stamp then says why.
.venv-vllm/.stamp: .venv/.dev-stamp envs/vllm-test.lock
	@mkdir -p .venv-vllm; echo '*' > .venv-vllm/.gitignore; echo "not finished" > $@; reason=; \
	paths='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	pip=".venv/bin/python -m pip --python .venv-vllm/bin/python install --no-deps"; \
	if [ "$$(uname -sm)" != "Linux x86_64" ] || ! grep -qw avx2 /proc/cpuinfo; then \
		reason="needs Linux on x86-64 with AVX2"; \
	else \
		echo "installing envs/vllm-test.lock"; \
		{ .venv/bin/python -m venv --without-pip .venv-vllm && \
		.venv/bin/python -c "$$paths" > "$$(.venv-vllm/bin/python -c "$$paths")/core.pth" && \
		$$pip --requirement envs/vllm-test.lock && \
		$$pip --no-build-isolation --editable . && \
		.venv-vllm/bin/python -c 'from vllm import LLM'; } > .venv-vllm/install.log 2>&1 || \
			reason="could not be installed, see .venv-vllm/install.log"; \
	fi; \
	if [ -n "$$reason" ]; then \
		echo "$$reason" > $@; echo "vLLM for the CPU: $$reason: its tests will be skipped" >&2; \
	else printf '%s\n' "$(CURDIR)" > $@; fi

FORCE:
