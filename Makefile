# make tune   find the fastest kernels for this machine        make check      format, lint, types, docs
# make test   the tests that this machine can run              make generated  render generated/ anew
# make quick  those of them that are quick                     make format     let the formatters rewrite
# make thorough  what both leave out: the other parameters of tests whose parameters are many and alike
# make docs   the tables in docs/ from the code                make docs-site  the pages as a site in dist/site
#
# All make their own environment in .venv. On a machine whose Python has torch and the rest already, name it
# instead and nothing is installed:   make test PYTHON=python3

SHELL := /bin/sh
VENV ?= .venv
TORCH ?= torch==2.13.0  # what is installed where the environment has no torch and the machine has no NVIDIA driver
PYTEST_FLAGS ?=
TUNE_FLAGS ?=

ifdef PYTHON
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
HEADERS = $(shell find templates tests/emulator -name '*.h' -o -name '*.cuh' -o -name '*.cpp') $(wildcard fagen/runtime/csrc/*)
PARALLEL = $(shell $(PY) -c 'import xdist' 2>/dev/null && printf '%s' '-n auto --dist loadgroup')
GPU := $(shell command -v nvidia-smi)
CLANG_FORMAT = $(shell command -v $(dir $(PY))clang-format || command -v clang-format)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: tune test quick thorough check check-format check-lint check-types check-cpp format generated docs docs-site clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

tune: $(READY)
	$(PY) -m fagen tune $(TUNE_FLAGS)

# On all cores, where pytest-xdist is. What needs the GPU runs after the rest, alone (5: the flags leave no test there).
test: $(READY)
ifeq ($(GPU),)
	$(PY) -m pytest $(PARALLEL) $(PYTEST_FLAGS)
else
	@failed=0; set -x; $(PY) -m pytest $(PARALLEL) --ignore=tests/gpu $(PYTEST_FLAGS) || failed=$$?; \
	$(PY) -m pytest tests/gpu $(PYTEST_FLAGS) || [ $$? = 5 ] || failed=1; exit $$failed
endif

quick: $(READY)
	$(PY) -m pytest $(PARALLEL) -m 'not slow and not gpu and not thorough' $(PYTEST_FLAGS)

thorough: $(READY)
	$(PY) -m pytest $(PARALLEL) -m thorough $(PYTEST_FLAGS)

check: check-format check-lint check-types check-cpp
	$(PY) -m pytest -q tests/repository/test_docs.py tests/repository/test_hygiene.py

check-format: $(READY)
	$(PY) -m ruff format --check .

check-lint: $(READY)
	$(PY) -m ruff check .

check-types: $(READY)
	$(PY) -m mypy

check-cpp: $(READY)
	@if [ -z "$(CLANG_FORMAT)" ]; then echo 'no clang-format: the C++ headers are not checked'; \
	else $(CLANG_FORMAT) --dry-run --Werror $(HEADERS); fi

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	@if [ -n "$(CLANG_FORMAT)" ]; then $(CLANG_FORMAT) -i $(HEADERS); fi

generated: $(READY)
	$(PY) -m fagen.cli.generated

docs: $(READY)
	$(PY) docs/tables.py

docs-site: $(READY)
	$(PY) docs/site.py dist/site

$(VENV)/.ready: pyproject.toml
	@python=; for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo 'fagen needs Python 3.11 or newer, and found none on PATH' >&2; exit 4; fi; \
	if ! [ -x $(VENV)/bin/pip ] && ! $$python -m venv $(VENV); then \
	  echo "$$python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  echo 'or use a Python that has torch already: make test PYTHON=python3' >&2; rm -rf $(VENV); exit 4; fi
	@if $(PY) -c 'import torch' 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null 2>&1; then $(PY) -m pip install torch; \
	else $(PY) -m pip install '$(strip $(TORCH))' || $(PY) -m pip install torch; fi
	$(PY) -m pip install -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
