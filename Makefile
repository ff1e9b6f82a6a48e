# make pretrain   sets everything up and trains an encoder: on speech it synthesises, or on AUDIO=folder
# make test       sets everything up and runs the tests
# make lint       ruff and mypy
# make clean      removes what the above made

PYTHON ?= python3
VENV   ?= .venv
AUDIO  ?=
RUN    ?= runs/$(if $(AUDIO),$(shell basename "$$(realpath "$(AUDIO)")"),demo)
STEPS  ?= 420

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO      := demo
SOURCES   := $(shell find csrc _build -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.py')

.PHONY: pretrain test lint clean

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
	    --data.valid 0.05 --trainer.max_steps $(STEPS) --trainer.val_check_interval 50 --trainer.checkpoint_every 50 $$resume

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build dist runs fastssl/*.so fastssl/_build_report.json *.egg-info
