# Two commands: `make demo` trains a LoRA on the embedded tiny base and shows what it learned, `make test` runs the tests.
#
# Both make their own environment in .venv first. The torch that is installed can be chosen:
#   make demo TORCH=torch                  newest release
#   make demo TORCH="torch==2.13.0+cu130"  a build of your own package index
# and pip takes further arguments in PIP_ARGS, an index for instance. Everything else comes in the versions of constraints.txt, with
# which the tests last passed; `make test-newest` leaves them out, in an environment of its own.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
WORKERS ?= auto
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
LISTED := $(PIP) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: demo test test-all test-newest install install-dev clean help

help:
	@echo "make demo   train a LoRA on examples/demo with the embedded base; results in demo_output/"
	@echo "make test   run the tests; cross products of settings pairwise"
	@echo "make test-all   the same with cross products in full"
	@echo "make test-newest   the tests with the newest packages, without constraints.txt, in .venv-newest"
	@echo "make install   only make the environment in $(VENV)"

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

# torch comes first and alone, so that nothing else decides which build it is. open_clip is taken without its requirements:
# they would bring in torchvision, and one that does not fit torch breaks transformers. On a server without libGL the
# desktop build of OpenCV cannot be imported; the headless one is the same for us.
$(VENV)/installed: requirements.txt $(CONSTRAINTS) Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(LISTED) -r requirements.txt
	$(LISTED) --no-deps open-clip-torch
	@$(PY) -c "import cv2" 2>/dev/null || { $(PY) -m pip uninstall --quiet --yes opencv-python; $(LISTED) --force-reinstall --no-deps opencv-python-headless; }
	@$(PY) tools/check_environment.py
	@$(PY) -c "open('$(VENV)/installed', 'w').close()"

$(VENV)/installed-dev: $(VENV)/installed $(wildcard requirements-*.txt)
	$(LISTED) -r requirements-dev.txt
	@$(PY) -c "open('$(VENV)/installed-dev', 'w').close()"

demo: install
	$(PY) examples/demo/run_demo.py

# One thread per worker: workers that each use every core get in each other's way.
test: export OMP_NUM_THREADS ?= 1
test: install-dev
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) tests

test-all:
	$(MAKE) test PYTEST_ARGS="--full $(PYTEST_ARGS)"

# Made anew each time: pip keeps what is installed as long as it fits.
test-newest:
	$(PYTHON) -c "import shutil; shutil.rmtree('.venv-newest', ignore_errors=True)"
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(p, ignore_errors=True) for p in ('$(VENV)', '.venv-newest', 'demo_output', 'adapter_tools')]"
