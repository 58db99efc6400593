# Every target does its own set-up: virtual environment, dependencies, extension (rebuilt when its sources change).
#
#   PYTHON=python3.12     the Python to make the environment with (3.11 or newer)
#   VENV=.venv            the environment; one that exists is used as it is, with the torch it has
#   REUSE_TORCH=1         use the torch that PYTHON already has
#   TORCH=torch==2.13.0   what pip installs where there is no torch yet
#   ARGS=...              passed on to pytest, the demo or the benchmark

PYTHON ?= python3
VENV ?= .venv
REUSE_TORCH ?= 0
ASKED := $(if $(filter command line environment override,$(origin TORCH)),--torch-asked)
TORCH ?= torch==2.13.0
ARGS ?=

# `make demo` alone installs what the demo needs; any other goal installs the rest as well.
GOALS := $(or $(MAKECMDGOALS),help)
ADDED := $(filter docs,$(GOALS)) $(if $(filter wheel,$(GOALS)),release)
EXTRAS := $(if $(filter-out demo,$(GOALS)),$(if $(strip $(ADDED)),--extras demo data ray bench plot dev $(ADDED)),--extras demo)
BIN := $(VENV)/bin
# A process per core, up to four; the tests of a file stay together, as they share what they compute once.
PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile
EXT := build/extension.txt
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)
REUSE := $(if $(filter 1 true yes,$(REUSE_TORCH)),--reuse-torch)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-matrix docs wheel fuzz scale soak load bench calls zoo gpu gpu-1 gpu-2 prebuilt cuda-check sanitize lint format build env clean FORCE

help: ## this list
	@echo "gradkern: make <target>"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "Variables (PYTHON, VENV, REUSE_TORCH, TORCH, ARGS) are explained at the top of the Makefile."

demo: $(EXT) ## train two small networks on real data, explain them, write an HTML report
	$(BIN)/python examples/demo.py $(ARGS)

test: $(EXT) ## the tests, but for the slow ones (a process per core)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(EXT) ## all tests
	$(PYTEST) $(ARGS)

docs: $(EXT) ## the documentation site with its executed gallery, in build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs $(ARGS)

test-matrix: $(EXT) ## tests with the oldest and newest Python, torch and Captum (ARGS="--all PYTHON/TORCH/CAPTUM ..."; GBs)
	$(BIN)/python tools/test_matrix.py $(ARGS)

wheel: $(EXT) ## a manylinux wheel in dist/, proven in fresh environments (ARGS="PYTHON/TORCH/CAPTUM ..."; GBs)
	$(BIN)/python tools/wheel.py $(ARGS)

fuzz: $(EXT) ## 25,000 random networks against the plain executor, others each time
	GRADKERN_FUZZ=20000 $(BIN)/python -m pytest -q tests/runtime/test_random_programs.py -k "kernels or splits" $(ARGS)

scale: $(EXT) ## random networks, each of a seed (ARGS="programs 0 100000", "captured 0 2000" or "rules 0 100000")
	$(BIN)/python -m tests.support.scale $(ARGS)

soak: $(EXT) ## dataset runs under kills, full disks and damage; ARGS="--minutes 30 --seed 1"
	$(BIN)/python -m tests.support.soak $(ARGS)

load: $(EXT) ## threads, many calls and models, interrupts, forks, little memory; ARGS="--minutes 5"
	$(BIN)/python -m tests.support.load $(ARGS)

bench: $(EXT) ## benchmarks against torch, Captum and tangermeme, and shares of the peak, with their goals
	$(BIN)/python -m benchmarks.questions $(filter --quick,$(ARGS))
	$(BIN)/python -m benchmarks.small_calls $(filter --quick,$(ARGS))
	$(BIN)/python -m benchmarks.few_inputs $(filter --quick,$(ARGS))
	$(BIN)/python -m benchmarks.sequences $(filter --quick,$(ARGS))
	$(BIN)/python -m benchmarks.ceilings $(filter --quick,$(ARGS))
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.networks $(if $(filter --quick,$(ARGS)),--quick,--compiled)

calls: $(EXT) ## calls of 1, 8 and 64 samples beside every way of torch and JAX, one thread, half an hour
	$(BIN)/python -m benchmarks.environment build/jax benchmarks/jax.txt
	build/jax/bin/python -m benchmarks.small_calls --compiled $(ARGS)

zoo: $(EXT) ## networks of other people's packages against plain torch; writes docs/zoo.md (ARGS=--quick: two networks)
	$(BIN)/python -m benchmarks.environment build/zoo benchmarks/zoo/requirements.txt
	build/zoo/bin/python -W ignore -m benchmarks.zoo $(ARGS)

gpu: ## everything that needs a GPU, in two parts of at most eight minutes (make gpu-1, make gpu-2); logs in OUT (build/gpu)
	@PYTHON='$(PYTHON)' tools/gpu.sh 1 && PYTHON='$(PYTHON)' tools/gpu.sh 2

gpu-1 gpu-2:
	@PYTHON='$(PYTHON)' tools/gpu.sh $(@:gpu-%=%)

prebuilt: ## the extension with CUDA for another machine's PYTHON (ARGS="--torch torch==2.11.0"), in build/prebuilt
	@$(PYTHON) tools/cuda_check.py --keep build/prebuilt $(ARGS)

cuda-check: ## build, link and import the whole extension with CUDA, without a GPU (an environment of 5 GB)
	@$(PYTHON) tools/cuda_check.py $(ARGS)

sanitize: $(EXT) ## the CUDA kernels on the host under the address, undefined-behaviour and thread sanitizers (ARGS=--cpu: and the CPU's)
	$(BIN)/python -m tests.support.sanitizers $(ARGS)

lint: env ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: env ## format everything in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

build: $(EXT) ## the environment and the compiled extension

env: build/env.txt ## the environment alone

clean: ## remove what was built (not the environment)
	rm -rf build report *.egg-info gradkern/_C*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# Runs always and touches its file only when the environment changed, so that nothing is rebuilt in vain.
build/env.txt: FORCE
	@$(PYTHON) tools/setup_env.py --venv '$(VENV)' --torch '$(TORCH)' $(ASKED) $(REUSE) $(EXTRAS)

$(EXT): build/env.txt $(SOURCES)
	@echo "building the extension (a minute or two the first time)"
	@set -o pipefail; GRADKERN_REQUIRE_EXT=1 $(BIN)/python setup.py build_ext --inplace 2>&1 | tee build/extension.log \
		| sed -nu 's/^\(\[[0-9]*\/[0-9]*\]\).*\/\([a-z_0-9]*\)\.o\.d .*/  \1 \2/p' \
		|| { tail -n 60 build/extension.log; echo "The extension did not build; the whole log: build/extension.log"; exit 1; }
	@grep -h '^gradkern: ' build/extension.log || true
	@touch $@

FORCE:
