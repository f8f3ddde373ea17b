# Two commands are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench clean

help:
	@echo "make demo   install into $(VENV) and load a real FP8 checkpoint"
	@echo "make test   install what the tests need and run them, once per kernel path"
	@echo "make lint   ruff and mypy"
	@echo "make bench  run the benchmarks (some eight minutes on two cores)"

# torch first: with the pinned one there, nothing asks for another build
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 numpy
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml $(wildcard neuron_fp8_loader/codes/_native/*)
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) -e '.[test,lint]'
	@touch $@

install: $(VENV)/.package

demo: $(VENV)/.package
	@$(BIN)/python examples/demo.py

test: $(VENV)/.test
	@for path in $$($(BIN)/python -c 'from neuron_fp8_loader import kernel; print(*kernel.paths())'); do \
		echo "== kernel path $$path"; \
		NEURON_FP8_LOADER_KERNEL=$$path $(BIN)/python -m pytest || exit 1; \
	done

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# jax for the compile check's xla-cpu backend, which is left out where there is no wheel of it
$(VENV)/.bench: $(VENV)/.package
	$(PIP) -e '.[bench]'
	$(PIP) -e '.[xla]' || echo "no jax here: the compile check leaves xla-cpu out"
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info neuron_fp8_loader/codes/*.so
