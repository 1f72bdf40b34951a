# make train: the whole path, from text to a trained model, on whatever is here. make test: everything CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Processes that train; by default one per GPU, two where there is none.
NPROC ?=

.PHONY: train study test lint install bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,eval,scaling,hf,dev]'
	touch $@

data/corpus/train/manifest.json: $(INSTALLED) $(wildcard corpus/*.jsonl)
	$(BIN)/titan-dp prepare corpus/*.jsonl --out data/corpus --tokenizer bytes --validation-fraction 0.05

# exec: a shell in between would end at a Ctrl-C, while the ranks still save.
train: data/corpus/train/manifest.json
	exec $(BIN)/titan-dp train --config debug.toml $(if $(NPROC),--nproc $(NPROC))

study: data/corpus/train/manifest.json
	$(BIN)/titan-dp sweep cpu_study --launch local --at-once 2
	$(BIN)/titan-dp report outputs/cpu_study

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two at a time, a file each: much of a test that starts processes is waiting. One thread each: on few cores torch's threads
# wait for each other by spinning. No test sees a GPU; where there is one
# the kernels' tests then run again, on it.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python -m pytest tests/kernels; fi

bench: $(INSTALLED)
	for script in op loader checkpoint trainer kernel_costs export generation length_extrapolation scaling report state_tracking estimate; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# What was installed and built. Not data/ and outputs/: they hold what took hours, and perhaps files of your own.
clean:
	rm -rf $(VENV) build *.egg-info
