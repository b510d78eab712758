# make demo       the environment, then a small GPT-2 trained sparse on the text in the package (about two minutes)
# make test       the environment, then the tests but for the slow ones
# make test-slow  the slow ones: random kills, whole comparisons, compiled runs
# make test-slurm the recipes of recipes/slurm on a SLURM that it starts on this machine (root; Debian, installs SLURM)
# make check      formatting, lints and types; make format mends the first two

PYTHON ?= python3
VENV   ?= .venv
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
# Without a GPU only a CPU build will do: the default build would bring gigabytes of CUDA libraries. Where pip does not
# find one by itself, set TORCH_INDEX to PyTorch's index of CPU wheels (pytorch.org, "Get started", pip, CPU).
# On a login node without a GPU of a cluster that has them: make GPU=1.
GPU    ?= $(shell command -v nvidia-smi 2>/dev/null)
TORCH_PIN   := torch==$(TORCH)$(if $(GPU),,+cpu)
TORCH_INDEX ?=
comma  := ,
EXTRAS := dev$(if $(GPU),$(comma)cuda13)
DONE   := $(VENV)/.done
PYTEST := $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile  # a file's tests share what they have trained

.PHONY: demo test test-slow test-slurm check format bench-cpu render build clean

demo: $(DONE)  # 75 is a clean stop, and the same command resumes
	$(VENV)/bin/slope pretrain || [ $$? -eq 75 ]

test: $(DONE)
	$(PYTEST) -m "not slow and not slurm"

test-slow: $(DONE)
	$(PYTEST) -m slow

test-slurm: $(DONE)  # the processes mostly wait for their jobs
	tests/slurm/cluster.sh up
	$(VENV)/bin/python -m pytest --numprocesses 8 --maxschedchunk 1 -m slurm tests/slurm; \
	  status=$$?; tests/slurm/cluster.sh down; exit $$status

check: $(DONE)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(DONE)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench-cpu: $(DONE)
	$(VENV)/bin/python -m slope_cli.benchmarks.cpu_step
	$(VENV)/bin/python -m slope_cli.benchmarks.demo
	$(MAKE) render

render: $(DONE)
	$(VENV)/bin/python -m slope_cli.benchmarks.render

build: $(DONE)
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(DONE): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH_PIN)" || \
	  { echo "No CPU build of torch $(TORCH) was found: run make with TORCH_INDEX=<PyTorch's index of CPU wheels>" >&2; exit 1; }
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@
