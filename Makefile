# Everything happens in .venv; nothing else is touched but the usual caches. `make help` lists the targets.
PYTHON ?= python3
TORCH ?= 2.14.1
TORCHVISION ?= 0.29.1
DALI ?= auto
JOBS ?= 2
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

# What clang-format sees, and what clang-tidy sees: CMake compiles those of csrc/ that need no CUDA.
CPP := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.cu')
HEADERS := $(shell find csrc tests/csrc -name '*.h' -o -name '*.cuh')
TIDY := $(VENV)/tidy
TIDY_STAMPS := $(patsubst %,$(TIDY)/%.log,$(filter-out csrc/ops/cuda/%,$(filter csrc/%.cpp,$(CPP))))

# A stamp records what an installation was made from; a second call installs nothing.
TORCH_STAMP := $(VENV)/.torch-$(TORCH)-$(TORCHVISION)
BASE_STAMP := $(VENV)/.fastssl
DALI_STAMP := $(VENV)/.dali-$(DALI)
BENCH_STAMP := $(VENV)/.bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint tidy bench bench-quick gpu-check

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) TORCHVISION=$(TORCHVISION) DALI=auto|dali|dali-cu13|none JOBS=$(JOBS) ARGS='...'"

setup: $(BASE_STAMP) $(DALI_STAMP) ## Install fastssl, its tools and DALI into .venv

demo: $(BASE_STAMP) $(DALI_STAMP) ## Train MoCo on the embedded data; ARGS='--help' lists the options
	@$(PY) -m fastssl.train moco $(ARGS)

# A process for each of two cores, whose threads do not spin while they wait for one.
test: lint $(DALI_STAMP) ## Lint, then test; ARGS='-m "not slow"' goes to pytest
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(BASE_STAMP) ## Check style, format, types and what clang finds in the C++
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP) $(HEADERS)
	@$(MAKE) --no-print-directory -j2 tidy

# torch's headers take a clang-tidy many seconds, so a log says that a file is clean; a header dirties them all.
tidy: $(if $(shell command -v $(CXX)),$(TIDY_STAMPS))
	@$(if $(shell command -v $(CXX)),,echo "clang-tidy is left out: there is no C++ compiler")

$(TIDY)/%.log: % $(HEADERS) .clang-tidy CMakeLists.txt pyproject.toml | $(TIDY)/compile_commands.json
	@echo "clang-tidy $<"
	@mkdir -p $(dir $@)
	@$(VENV)/bin/clang-tidy --quiet -p $(TIDY) $< > $@ 2>&1 || { cat $@; exit 1; }

# How each file is compiled. Nothing is: this only asks CMake.
$(TIDY)/compile_commands.json: CMakeLists.txt $(CPP)
	@PATH="$(abspath $(VENV)/bin):$$PATH" cmake -S . -B $(TIDY) $$($(PY) -c \
	    'import pybind11, sys, torch; print(f"-DPython_EXECUTABLE={sys.executable} -DFASTSSL_TORCH={torch.__path__[0]} \
	    -Dpybind11_DIR={pybind11.get_cmake_dir()}")') > $(TIDY).log || { cat $(TIDY).log; exit 1; }
	@touch $@

bench: $(BENCH_STAMP) ## Measure everything beside its peers, write benchmarks/results/ and the README's figures; ARGS goes to pytest
	@$(PY) -m benchmarks $(ARGS)

bench-quick: $(BENCH_STAMP) ## The smallest cases in under three minutes, written nowhere
	@$(PY) -m pytest benchmarks/ --benchmark-only --quick $(ARGS)

gpu-check: $(BENCH_STAMP) ## Tests, benchmarks, predictions and a trace on a GPU; one folder of results; ARGS='--help' lists the options
	@$(PY) -m benchmarks.gpu_check $(ARGS)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fastssl needs Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(PY)
	@echo "installing torch $(TORCH) and torchvision $(TORCHVISION) (about 5.5 GB, once)"
	@$(PIP) install torch==$(TORCH) torchvision==$(TORCHVISION)
	@touch $@

# pip hides a build's output, and with it the reason why the extension or CUDA was left out; hence the log.
$(BASE_STAMP): $(TORCH_STAMP) $(SOURCES)
	@echo "building and installing fastssl and its tools"
	@$(PIP) install 'setuptools>=77' wheel 'pybind11>=3.0,<4' $$(command -v cmake > /dev/null || echo cmake)
	@$(PY) -m pip install -v --no-build-isolation -e '.[dev]' > $(VENV)/install.log 2>&1 || \
	    { cat $(VENV)/install.log; exit 1; }
	@grep 'building extension' $(VENV)/install.log || true
	@touch $@

$(BENCH_STAMP): pyproject.toml | $(BASE_STAMP) $(DALI_STAMP)
	@echo "installing the peers"
	@$(PIP) install 'fastssl[bench]'
	@touch $@

$(DALI_STAMP): pyproject.toml | $(BASE_STAMP)
	@extra=$(DALI); \
	if [ $$extra = auto ]; then \
	    case $$($(PY) -c 'import torch; print(torch.version.cuda)') in \
	        12.*) extra=dali ;; 13.*) extra=dali-cu13 ;; *) extra=none ;; \
	    esac; \
	fi; \
	if [ $$extra != none ]; then \
	    echo "installing the extra $$extra (about 1 GB, once)"; \
	    $(PIP) install "fastssl[$$extra]"; \
	fi
	@touch $@
