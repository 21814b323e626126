# Everything lies inside this checkout: .venv (trainer), .venv-sglang (rollout servers), runs/, .cache/.
# An environment is installed anew only when what is pinned for it, this path or the Python version has changed.
# DEVICE=cuda installs for GPUs: other pins, on Python 3.12. Unless it is said, it is what .venv was made for.

DEVICE ?= $(shell cat .venv/.device 2>/dev/null || echo cpu)
PYTHON_LATEST ?= python3.12
ifeq ($(DEVICE),cpu)
PYTHON ?= python3
PYTHONS := 3.11 or 3.12
TORCH := requirements/torch.txt
SERVER := requirements/sglang.txt requirements/sglang-nodeps.txt
else ifeq ($(DEVICE),cuda)
PYTHON ?= $(PYTHON_LATEST)
PYTHONS := 3.12
TORCH := requirements/cuda/torch.txt
SERVER := requirements/cuda/server.txt
else
$(error DEVICE = $(DEVICE): it is cpu or cuda)
endif
TRAINER := $(TORCH) requirements/trainer.txt
LATEST := requirements/cuda/torch.txt requirements/trainer.txt
KERNELS := requirements/cuda/kernels.txt requirements/cuda/kernels-nodeps.txt

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

RUN := .venv/bin/python -m
# Two files at a time: many tests wait, for a server or for ranks. A file stays together, since its tests share both.
PYTEST := -q -n 2 --dist loadfile --durations=15

# digest WORDS,FILES: a short name for their content
digest = $(shell (echo "$(CURDIR) $(1)"; cat $(2)) 2>/dev/null | sha256sum | cut -c1-16)
VERSION := $(shell $(PYTHON) -V 2>/dev/null)

EXTENSION := setup.py pyproject.toml $(wildcard megatron_gspo/csrc/*)
TRAINER_STAMP := .venv/.packages-$(call digest,$(VERSION),$(TRAINER))
EXTENSION_STAMP := .venv/.extension-$(call digest,$(VERSION),$(TRAINER) $(EXTENSION))
KERNELS_STAMP := .venv/.kernels-$(call digest,$(VERSION),$(TRAINER) $(KERNELS))
SGLANG_STAMP := .venv-sglang/.packages-$(call digest,$(VERSION),$(TORCH) $(SERVER))
LATEST_STAMP := .venv-latest/.packages-$(call digest,,$(LATEST) $(EXTENSION))
COLD_START := .cache/quickstart/.cold-start-$(call digest,,examples/quickstart/prepare.py examples/quickstart/sft.toml)

.PHONY: help
help: ## show this
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1#\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'#' '{ printf "%-17s %s\n", $$1, $$2 }'

.PHONY: install
install: ## install both environments into this checkout (DEVICE=cuda: for GPUs)
	@$(MAKE) -s -j2 $(EXTENSION_STAMP) $(SGLANG_STAMP)

.PHONY: packages
packages: ## install all that both environments take from elsewhere: the layer of an image that a change of code keeps
	@$(MAKE) -s -j2 $(TRAINER_STAMP) $(SGLANG_STAMP)

.PHONY: servers
servers: $(SGLANG_STAMP) ## install the rollout servers' environment alone

.PHONY: kernels
kernels: ## with DEVICE=cuda: compile Transformer Engine and apex into the trainer's environment
	@[ $(DEVICE) = cuda ] || { echo "error: these kernels are for GPUs: make kernels DEVICE=cuda" >&2; exit 1; }
	@$(MAKE) -s $(KERNELS_STAMP)

.PHONY: quickstart
quickstart: install ## install, then train a tiny mixture of experts with GSPO and show its report
	@if [ ! -e $(COLD_START) ] || [ ! -e runs/quickstart-sft/hf/config.json ]; then \
	    .venv/bin/python examples/quickstart/prepare.py .cache/quickstart; \
	    .venv/bin/megatron-gspo train examples/quickstart/sft.toml train.overwrite=true; \
	    rm -f .cache/quickstart/.cold-start-*; touch $(COLD_START); \
	fi
	@.venv/bin/megatron-gspo train examples/quickstart/gspo.toml train.overwrite=true

.PHONY: test
test: install browser bubblewrap ## install, then run all tests
	OMP_NUM_THREADS=1 $(RUN) pytest $(PYTEST)

.PHONY: test-slow
test-slow: install ## install, then run the tests that take minutes, which `make test` leaves out
	OMP_NUM_THREADS=1 $(RUN) pytest -q -s -m slow_suite --durations=0

.PHONY: test-slurm
test-slurm: install ## install, then run the job script on a Slurm of two nodes on this machine (as root; installs Debian's if need be)
	OMP_NUM_THREADS=1 $(RUN) pytest -q -s -m slurm_suite tests/slurm --durations=0

.PHONY: test-sandbox
test-sandbox: install bubblewrap ## install, then run a thousand hostile programs in the sandbox: some three minutes
	OMP_NUM_THREADS=1 $(RUN) pytest -q -s -m sandbox_suite tests/sandbox --durations=10

FUZZ_TIMES ?= 2
FUZZ_SEED ?= 1

.PHONY: fuzz
fuzz: install ## at least 10,000 malformed inputs of every kind, from FUZZ_SEED
	OMP_NUM_THREADS=1 FUZZ_TIMES=$(FUZZ_TIMES) $(RUN) pytest -q tests/fuzz --hypothesis-seed=$(FUZZ_SEED)

.PHONY: chaos
chaos: install ## install, then strike short runs with a hundred faults, ten of them with real servers (FAULTS=..., SEED=...)
	OMP_NUM_THREADS=1 $(RUN) tests.chaos --faults $(or $(FAULTS),100) --seed $(or $(SEED),17) --real 10

.PHONY: test-latest
test-latest: $(LATEST_STAMP) $(SGLANG_STAMP) browser bubblewrap ## run all tests on Python 3.12, the newest Megatron-Core and the GPU servers' torch (PYTHON_LATEST=...)
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest $(PYTEST)

.PHONY: browser
browser: ## find a Chromium for the tests of the report, or install Debian's (CHROMIUM=...)
	@$(find_browser) || $(install_browser) || echo "no Chromium: the report will not be tested in a browser; apt-get install chromium as root, or name one: make CHROMIUM=/path/to/chromium test" >&2

find_browser = { command -v "$${CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome; } >/dev/null
as_root = $$([ "$$(id -u)" = 0 ] || echo sudo -n) env DEBIAN_FRONTEND=noninteractive
install_browser = { echo "Installing Chromium with apt-get" && { $(as_root) apt-get update && $(as_root) apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1; }

.PHONY: bubblewrap
bubblewrap: ## find bubblewrap, which isolates the programs that models write, or install Debian's
	@command -v bwrap >/dev/null || $(install_bubblewrap) || echo "no bubblewrap: programs will not be tested in the sandbox; apt-get install bubblewrap as root" >&2

install_bubblewrap = { echo "Installing bubblewrap with apt-get" && { $(as_root) apt-get update && $(as_root) apt-get install -y --no-install-recommends bubblewrap; } >/dev/null 2>&1; }

.PHONY: lint
lint: $(EXTENSION_STAMP) ## check style and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

.PHONY: lock
lock: ## resolve the packages for GPUs anew, into requirements/cuda
	$(call require,PYTHON_LATEST,3.12)
	@$(PYTHON_LATEST) -m venv --clear build/lock
	@build/lock/bin/python $(PIP) --upgrade pip packaging
	@build/lock/bin/python tools/lock.py

.PHONY: docs
docs: $(EXTENSION_STAMP) ## build the documentation into build/docs (three and a half minutes of a processor)
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

# environment PYTHON,DIRECTORY,DEVICE: an empty one unless it is there with the same Python, for the same device
define environment
@[ "$$($(2)/bin/python -V 2>/dev/null) $$(cat $(2)/.device 2>/dev/null || echo cpu)" = "$$($(1) -V) $(3)" ] || $(1) -m venv --clear $(2)
@echo $(3) >$(2)/.device
endef

# Each file of requirements, for pip.
files = $(addprefix -r ,$(1))

PIP := -m pip install --quiet --disable-pip-version-check

$(TRAINER_STAMP):
	$(call require,PYTHON,$(PYTHONS))
	@echo "Installing the trainer's packages into .venv (some minutes)"
	$(call environment,$(PYTHON),.venv,$(DEVICE))
	@.venv/bin/python $(PIP) -r $(TORCH)
	@.venv/bin/python $(PIP) $(call files,$(TRAINER))
	@rm -f .venv/.packages-*; touch $@

$(EXTENSION_STAMP): $(TRAINER_STAMP)
	@echo "Building megatron_gspo into .venv"
	@.venv/bin/python $(PIP) --no-build-isolation --no-deps -e .
	@.venv/bin/python -m pip check
	@rm -f .venv/.extension-*; touch $@

# apex and Transformer Engine ask for their flags by environment variables. FORCE_BUILD: nothing else is downloaded.
$(KERNELS_STAMP): $(TRAINER_STAMP)
	@$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc --version >/dev/null || { echo "error: no nvcc in $${CUDA_HOME:-/usr/local/cuda}: install the CUDA toolkit that torch was built with, or set CUDA_HOME" >&2; exit 1; }
	@echo "Compiling Transformer Engine and apex into .venv (half an hour or more)"
	@.venv/bin/python $(PIP) $(call files,$(TRAINER) $(firstword $(KERNELS)))
	@NVTE_PYTORCH_FORCE_BUILD=TRUE APEX_CPP_EXT=1 APEX_CUDA_EXT=1 PATH="$(CURDIR)/.venv/bin:$$PATH" \
	    .venv/bin/python $(PIP) --no-build-isolation --no-deps -r $(lastword $(KERNELS))
	@.venv/bin/python -m pip check
	@rm -f .venv/.kernels-*; touch $@

$(SGLANG_STAMP):
	$(call require,PYTHON,$(PYTHONS))
	@echo "Installing SGLang into .venv-sglang (some minutes)"
	$(call environment,$(PYTHON),.venv-sglang,$(DEVICE))
	$(sglang_$(DEVICE))
	@rm -f .venv-sglang/.packages-*; touch $@

# On a CPU SGLang goes without most of what it names: CUDA packages, and another torch.
define sglang_cpu
@.venv-sglang/bin/python -m pip uninstall --quiet --yes sglang 2>/dev/null # else pip lists what it thinks it lacks
@.venv-sglang/bin/python $(PIP) -r $(TORCH)
@.venv-sglang/bin/python $(PIP) -r $(TORCH) -r $(firstword $(SERVER))
@.venv-sglang/bin/python $(PIP) --no-deps -r $(lastword $(SERVER))
endef

define sglang_cuda
@.venv-sglang/bin/python $(PIP) -r $(SERVER)
@.venv-sglang/bin/python -m pip check
endef

$(LATEST_STAMP):
	$(call require,PYTHON_LATEST,3.12)
	@echo "Installing the trainer's packages into .venv-latest (some minutes)"
	$(call environment,$(PYTHON_LATEST),.venv-latest,cuda)
	@.venv-latest/bin/python $(PIP) -r $(firstword $(LATEST))
	@.venv-latest/bin/python $(PIP) $(call files,$(LATEST))
	@.venv-latest/bin/python $(PIP) --no-build-isolation --no-deps -e .
	@rm -f .venv-latest/.packages-*; touch $@
