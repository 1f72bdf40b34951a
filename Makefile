# make train: the whole path, from text to a trained model, on whatever is here. make test: everything CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# Without a GPU, PyTorch's build for CPUs, which is gigabytes smaller. TORCH_INDEX= takes the usual build all the same.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)
# Processes that train; by default one per GPU, two where there is none.
NPROC ?=

.PHONY: train study test lint install bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 3 GB on disk (6 GB with CUDA), mostly PyTorch. This often takes 2 to 5 minutes."
	$(if $(TORCH_INDEX),$(PIP) --retries 1 --no-deps --index-url $(TORCH_INDEX) torch || echo "No answer from there: the usual index is asked.")
	$(PIP) --editable '.[data,eval,scaling,hf,dev]'
	touch $@

data/corpus/train/manifest.json: $(INSTALLED) $(wildcard corpus/*.jsonl)
	$(BIN)/titan-dp prepare corpus/*.jsonl --out data/corpus --tokenizer bytes --validation-fraction 0.05

# exec: a shell in between would end at a Ctrl-C, while the ranks still save.
train: data/corpus/train/manifest.json
	exec $(BIN)/titan-dp train --config debug.toml $(if $(NPROC),--nproc $(NPROC))
	@printf '%s\n' "" "What next (README.md and docs/guides/ have more):" \
	    "  source $(VENV)/bin/activate    # once per shell" \
	    '  titan-dp generate outputs/debug --prompt "The whale "' \
	    "  titan-dp state-tracking train --group S3 --num-householder 2    # less than a minute of a CPU core" \
	    "  titan-dp prepare FILES --out data/mine --tokenizer bytes    # your own text"

study: data/corpus/train/manifest.json
	$(BIN)/titan-dp sweep cpu_study --launch local --at-once 2 --extend-edges
	$(BIN)/titan-dp sweep cpu_study_seeds --launch local --at-once 2
	test -e outputs/cpu_study/forecast.json || \
	    $(BIN)/titan-dp forecast outputs/cpu_study outputs/cpu_study_seeds --target size=1.35M,tokens=600K \
	        --out outputs/cpu_study/forecast.json
	$(BIN)/titan-dp sweep cpu_study_largest --launch local --at-once 2 --extend-edges
	$(BIN)/titan-dp report outputs/cpu_study outputs/cpu_study_seeds outputs/cpu_study_largest

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
	for script in op op_costs step loader prepare checkpoint trainer kernel_costs export generation length_extrapolation scaling report state_tracking estimate; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# What was installed and built. Not data/ and outputs/: they hold what took hours, and perhaps files of your own.
clean:
	rm -rf $(VENV) build *.egg-info
