# Everything lies inside this checkout: .venv (trainer), .venv-sglang (rollout servers), runs/, .cache/.
# An environment is installed anew only when what is pinned for it, this path or the Python version has changed.

PYTHON ?= python3
PYTHON_LATEST ?= python3.12
TORCH := torch==2.13.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

RUN := .venv/bin/python -m
# Two files at a time: many tests wait, for a server or for ranks. A file stays together, since its tests share both.
PYTEST := -q -n 2 --dist loadfile --durations=15

# digest WORDS,FILES: a short name for their content
digest = $(shell (echo "$(CURDIR) $(TORCH) $(1)"; cat $(2)) 2>/dev/null | sha256sum | cut -c1-16)
VERSION := $(shell $(PYTHON) -V 2>/dev/null)

EXTENSION := setup.py pyproject.toml $(wildcard megatron_gspo/csrc/*)
TRAINER_STAMP := .venv/.packages-$(call digest,$(VERSION),requirements/trainer.txt)
EXTENSION_STAMP := .venv/.extension-$(call digest,$(VERSION),requirements/trainer.txt $(EXTENSION))
SGLANG_STAMP := .venv-sglang/.packages-$(call digest,$(VERSION),requirements/sglang.txt requirements/sglang-nodeps.txt)
LATEST_STAMP := .venv-latest/.packages-$(call digest,,requirements/trainer.txt $(EXTENSION))
COLD_START := .cache/quickstart/.cold-start-$(call digest,,examples/quickstart/prepare.py examples/quickstart/sft.toml)

.PHONY: help
help: ## show this
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1#\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'#' '{ printf "%-17s %s\n", $$1, $$2 }'

.PHONY: install
install: ## install both environments into this checkout
	@$(MAKE) -s -j2 $(EXTENSION_STAMP) $(SGLANG_STAMP)

.PHONY: quickstart
quickstart: install ## install, then train a tiny mixture of experts with GSPO and show its report
	@if [ ! -e $(COLD_START) ] || [ ! -e runs/quickstart-sft/hf/config.json ]; then \
	    .venv/bin/python examples/quickstart/prepare.py .cache/quickstart; \
	    .venv/bin/megatron-gspo train examples/quickstart/sft.toml train.overwrite=true; \
	    rm -f .cache/quickstart/.cold-start-*; touch $(COLD_START); \
	fi
	@.venv/bin/megatron-gspo train examples/quickstart/gspo.toml train.overwrite=true

.PHONY: test
test: install browser ## install, then run all tests
	OMP_NUM_THREADS=1 $(RUN) pytest $(PYTEST)

.PHONY: test-slow
test-slow: install ## install, then run the tests that take minutes, which `make test` leaves out
	OMP_NUM_THREADS=1 $(RUN) pytest -q -s -m slow_suite --durations=0

.PHONY: test-latest
test-latest: $(LATEST_STAMP) $(SGLANG_STAMP) browser ## run all tests on Python 3.12 and the newest Megatron-Core (PYTHON_LATEST=...)
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest $(PYTEST)

.PHONY: browser
browser: ## find a Chromium for the tests of the report, or install Debian's (CHROMIUM=...)
	@$(find_browser) || $(install_browser) || echo "no Chromium: the report will not be tested in a browser; apt-get install chromium as root, or name one: make CHROMIUM=/path/to/chromium test" >&2

find_browser = { command -v "$${CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome; } >/dev/null
as_root = $$([ "$$(id -u)" = 0 ] || echo sudo -n) env DEBIAN_FRONTEND=noninteractive
install_browser = { echo "Installing Chromium with apt-get" && { $(as_root) apt-get update && $(as_root) apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1; }

.PHONY: lint
lint: $(EXTENSION_STAMP) ## check style and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

.PHONY: docs
docs: $(EXTENSION_STAMP) ## build the documentation into build/docs
	$(RUN) sphinx -W --keep-going -q -b html docs build/docs
	@echo "The documentation: $(CURDIR)/build/docs/index.html"

.PHONY: clean
clean: ## remove what was built and cached; environments and runs stay
	rm -rf build dist *.egg-info docs/api megatron_gspo/_packing*.so .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f .venv/.extension-* .venv-latest/.packages-*
	find megatron_gspo tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## also remove the environments
	rm -rf .venv .venv-sglang .venv-latest

# require VARIABLE,VERSIONS: one clear line for each thing that is missing. (A pyenv shim is there and does not run.)
define require
@$($(1)) -c '' 2>/dev/null || { echo "error: $($(1)) does not run ($$($($(1)) -V 2>&1 | head -1)): install Python $(2), or name one: make $(1)=/path/to/python$(lastword $(2))" >&2; exit 1; }
@$($(1)) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(2)".split())' || { echo "error: $($(1)) is $$($($(1)) -V 2>&1): Python $(2) is needed; name one: make $(1)=/path/to/python$(lastword $(2))" >&2; exit 1; }
@$($(1)) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $($(1)) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
@[ -e "$$($($(1)) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || { echo "error: $($(1)) has no headers (Python.h): install its development package (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
@command -v $${CXX:-g++} >/dev/null || { echo "error: no C++ compiler ($${CXX:-g++}): install one (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
endef

# environment PYTHON,DIRECTORY: an empty one unless it is there with the same Python
define environment
@[ "$$($(2)/bin/python -V 2>/dev/null)" = "$$($(1) -V)" ] || $(1) -m venv --clear $(2)
endef

PIP := -m pip install --quiet --disable-pip-version-check

$(TRAINER_STAMP):
	$(call require,PYTHON,3.11 or 3.12)
	@echo "Installing the trainer's packages into .venv (some minutes)"
	$(call environment,$(PYTHON),.venv)
	@.venv/bin/python $(PIP) $(TORCH)
	@.venv/bin/python $(PIP) $(TORCH) -r requirements/trainer.txt
	@rm -f .venv/.packages-*; touch $@

$(EXTENSION_STAMP): $(TRAINER_STAMP)
	@echo "Building megatron_gspo into .venv"
	@.venv/bin/python $(PIP) --no-build-isolation --no-deps -e .
	@.venv/bin/python -m pip check
	@rm -f .venv/.extension-*; touch $@

$(SGLANG_STAMP):
	$(call require,PYTHON,3.11 or 3.12)
	@echo "Installing SGLang into .venv-sglang (some minutes)"
	$(call environment,$(PYTHON),.venv-sglang)
	@.venv-sglang/bin/python -m pip uninstall --quiet --yes sglang 2>/dev/null # else pip lists what it thinks it lacks
	@.venv-sglang/bin/python $(PIP) $(TORCH)
	@.venv-sglang/bin/python $(PIP) $(TORCH) -r requirements/sglang.txt
	@.venv-sglang/bin/python $(PIP) --no-deps -r requirements/sglang-nodeps.txt
	@rm -f .venv-sglang/.packages-*; touch $@

$(LATEST_STAMP):
	$(call require,PYTHON_LATEST,3.12)
	@echo "Installing the trainer's packages into .venv-latest (some minutes)"
	$(call environment,$(PYTHON_LATEST),.venv-latest)
	@.venv-latest/bin/python $(PIP) $(TORCH)
	@.venv-latest/bin/python $(PIP) $(TORCH) -r requirements/trainer.txt
	@.venv-latest/bin/python $(PIP) --no-build-isolation --no-deps -e .
	@rm -f .venv-latest/.packages-*; touch $@
