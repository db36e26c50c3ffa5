# Everything runs in .venv, made from constraints.txt: `make demo` and `make test` need only Python >= 3.11, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard compiler/*.py compiler/*/*.py compiler/*/*/*.py compiler/report/report.* passes/*.py passes/*/*.py runtime/*/*.py)

.PHONY: demo test lint types examples install clean

demo: install
	$(BIN)/foldcut demo --output demo-output $(if $(REWRITES),--rewrites $(REWRITES))

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# two at a time with a thread each; an example's output comes whole, and one that fails fails all
examples: install
	printf '%s\n' examples/*.py | xargs -P 2 -I{} sh -c \
	  'said=$$(OMP_NUM_THREADS=1 $(BIN)/python {} 2>&1); code=$$?; printf "== %s\n%s\n" {} "$$said"; exit $$code'

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with 2.13.0 installed, nothing later pulls a CUDA build. A strict editable install links file by
# file, so a new source file installs again.
# OpenVINO and TensorRT-RTX (which builds engines without a GPU) come along so that their tests run.
$(STAMP): $(BIN)/python pyproject.toml constraints.txt $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,openvino,tensorrt-rtx]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo-output *.egg-info
