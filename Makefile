# make pretrain   sets everything up and trains an encoder: on speech it synthesises, or on AUDIO=folder
# make test       sets everything up and runs the tests
# make lint       ruff and mypy
# make sanitize   builds a copy with GCC's address and undefined behaviour sanitizers and runs the CPU kernels' tests
# make clean      removes what the above made

PYTHON ?= python3
VENV   ?= .venv
AUDIO  ?=
RUN    ?= runs/$(if $(AUDIO),$(shell basename "$$(realpath "$(AUDIO)")"),demo)
STEPS  ?= 420
CAPABILITIES ?= avx512 avx2 default
SANITIZED_TESTS ?= -k "((native and cpu) or cpu_kernel or threads or single_frame) and not triton"

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO      := demo
SOURCES   := $(shell find csrc _build -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.py')

.PHONY: pretrain test lint sanitize clean

# torch first: the package is then built against it, and no second one is fetched.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(DEMO)/utterances.tsv: | $(INSTALLED)
	$(BIN)/python -m fastssl.data.synthetic $(DEMO) --minutes 30 --seed 0

pretrain: $(INSTALLED) $(if $(AUDIO),,$(DEMO)/utterances.tsv)
	resume=$$(test ! -f "$(RUN)/config.yaml" || echo --resume); \
	$(BIN)/fastssl pretrain "$(or $(AUDIO),$(DEMO))" --recipe wav2vec2-tiny --output "$(RUN)" \
	    --data.valid 0.05 --trainer.max_steps $(STEPS) --trainer.val_check_interval 50 --trainer.checkpoint_every 50 \
	    --quality.every 140 $$resume

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A copy, so that the build in use stays. Python itself is not instrumented, hence the preloaded runtimes. A machine
# without AVX-512 runs `make sanitize CAPABILITIES="avx2 default"`.
sanitize: $(INSTALLED)
	mkdir -p build/sanitize
	cp -a _build csrc fastssl tests setup.py pyproject.toml README.md LICENSE build/sanitize
	cd build/sanitize && FASTSSL_SKIP_CUDA=1 FASTSSL_REQUIRE_EXT=cpu \
	    CXX="g++ -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	    $(abspath $(BIN))/python setup.py build_ext --inplace
	cd build/sanitize && for capability in $(CAPABILITIES); do \
	    FASTSSL_CPU_CAPABILITY=$$capability ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(for name in asan ubsan stdc++; do g++ -print-file-name=lib$$name.so; done | xargs)" \
	    $(abspath $(BIN))/python -m pytest -p no:cacheprovider tests/ops $(SANITIZED_TESTS) || exit 1; done

clean:
	rm -rf $(VENV) $(DEMO) build dist runs fastssl/*.so fastssl/_build_report.json *.egg-info
