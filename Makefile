# make pretrain   install everything, and train an encoder on synthesised speech, or on the recordings in AUDIO=folder
# make test       install everything, and run the tests
# make lint       run ruff and mypy
# make sanitize   test the CPU kernels in a copy built with GCC's address and undefined behaviour sanitizers
# make clean      remove everything that the other targets created

PYTHON ?= python3
VENV   ?= .venv
AUDIO  ?=
RUN    ?= runs/$(if $(AUDIO),$(shell basename "$$(realpath "$(AUDIO)")"),demo)
STEPS  ?= 420
CAPABILITIES ?= avx512 avx2 default
SANITIZED_TESTS ?= -k "((native and cpu) or cpu_kernel or threads or single_frame or test_prepacked_conv) and not triton"

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO      := demo
SOURCES   := $(shell find csrc _build -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.py')

.PHONY: pretrain test lint sanitize clean

# Install torch first, so that the package is built against it and pip does not download a second version.
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

# Work in a copy, to keep the build in use. Python itself is not instrumented, so the sanitizers' runtimes must be
# preloaded. On a machine without AVX-512, run `make sanitize CAPABILITIES="avx2 default"`.
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
