# Two commands: `make demo` trains a LoRA on the embedded tiny base and shows what it learned, `make test` runs the tests.
#
# Both make their own environment in .venv first. The torch that is installed can be chosen:
#   make demo TORCH=torch                  newest release
#   make demo TORCH="torch==2.13.0+cu130"  a build of your own package index
# and pip takes further arguments in PIP_ARGS, an index for instance.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
WORKERS ?= auto

VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo test install install-dev clean help

help:
	@echo "make demo   train a LoRA on examples/demo with the embedded base; results in demo_output/"
	@echo "make test   run all tests"
	@echo "make install   only make the environment in $(VENV)"

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

# torch comes first and alone, so that nothing else decides which build it is. open_clip is taken without its requirements:
# they would bring in torchvision, and one that does not fit torch breaks transformers. On a server without libGL the
# desktop build of OpenCV cannot be imported; the headless one is the same for us.
$(VENV)/installed: requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps open-clip-torch
	@$(PY) -c "import cv2" 2>/dev/null || { $(PY) -m pip uninstall --quiet --yes opencv-python; $(PIP) --force-reinstall --no-deps opencv-python-headless; }
	@$(PY) tools/check_environment.py
	@$(PY) -c "open('$(VENV)/installed', 'w').close()"

$(VENV)/installed-dev: $(VENV)/installed setup.py
	$(PIP) "pytest>=8" "pytest-xdist>=3.5" "diffusers>=0.34" "peft>=0.15" "sentencepiece>=0.2" "scipy>=1.11"
	@$(PY) -c "open('$(VENV)/installed-dev', 'w').close()"

demo: install
	$(PY) examples/demo/run_demo.py

# One thread per worker: workers that each use every core get in each other's way.
test: export OMP_NUM_THREADS ?= 1
test: install-dev
	$(PY) -m pytest -q -n $(WORKERS) tests

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(p, ignore_errors=True) for p in ('$(VENV)', 'demo_output', 'adapter_tools')]"
