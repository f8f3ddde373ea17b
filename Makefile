# Two commands are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PATHS := $(BIN)/python -c 'from neuron_fp8_loader import kernel; print(*kernel.paths())'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint bench clean

help:
	@echo "make demo   install into $(VENV) and load a real FP8 checkpoint"
	@echo "make test   install what the tests need and run them: those of the kernel on each of its paths, the rest once"
	@echo "make test-all  run all tests on each path"
	@echo "make lint   ruff, mypy, and the C with warnings as errors"
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

# what the kernel makes is tested on each of its paths, the rest once: the whole suite runs on the fastest, last
test: $(VENV)/.test
	@paths=$$($(PATHS)) || exit 1; set -- $$paths; fastest=$$1; shift; \
	for path in "$$@"; do \
		echo "== kernel path $$path, the tests that depend on it"; \
		NEURON_FP8_LOADER_KERNEL=$$path $(BIN)/python -m pytest -m kernel_path || exit 1; \
	done; \
	echo "== kernel path $$fastest, all tests"; \
	NEURON_FP8_LOADER_KERNEL=$$fastest $(BIN)/python -m pytest

test-all: $(VENV)/.test
	@paths=$$($(PATHS)) || exit 1; \
	for path in $$paths; do \
		echo "== kernel path $$path, all tests"; \
		NEURON_FP8_LOADER_KERNEL=$$path $(BIN)/python -m pytest || exit 1; \
	done

NATIVE := neuron_fp8_loader/codes/_native
PYTHON_H := $(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])'

# the C is compiled and thrown away, with warnings as errors; Python's own headers are not ours to mend
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for file in $(NATIVE)/*.c; do \
		$(CC) -std=c11 -O3 -fPIC -Wall -Wextra -Wconversion -Werror -isystem "$$($(PYTHON_H))" \
			-c $$file -o /dev/null || exit 1; \
	done

# jax for the compile check's xla-cpu backend, which is left out where there is no wheel of it
$(VENV)/.bench: $(VENV)/.package
	$(PIP) -e '.[bench]'
	$(PIP) -e '.[xla]' || echo "no jax here: the compile check leaves xla-cpu out"
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info neuron_fp8_loader/codes/*.so
