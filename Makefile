# Every recipe is a line that can be typed by hand. Programs are called through .venv/bin/python,
# never through the scripts beside it: those break when the folder is moved.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup book notebooks site test test-portable lint serve bench clean moved

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --progress-bar off --no-deps
READY := .venv/.ready
# One thread a process: two notebooks are tested side by side, and sums keep their order.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(PY) -m pytest -n 2 --dist loadfile
NBVAL := --nbval-lax --nbval-current-env notebooks
# The stored outputs are a CPU's, and from the shipped records.
CPU := CUDA_VISIBLE_DEVICES= BNNBOOK_RESULTS= BNNBOOK_PRECISION=
PORT ?= 8000
# Freed memory waits for the next tensor: fresh pages are slow, on some virtual machines very slow.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 1073741824

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## create .venv with the locked packages

# One recipe, one shell: it holds the lock (file descriptor 9) until the packages are installed.
$(READY): requirements.lock pyproject.toml
	@set -eu -o pipefail; mkdir -p .cache; \
	for python in "$(PYTHON)" python3.13 python3.12 python3.11 none; do \
	  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break; \
	done; \
	if test "$$python" = none; then \
	  echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13: install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi; \
	exec 9> .cache/setup.lock; \
	"$$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || { \
	  echo "another make is installing the packages; waiting for it"; \
	  "$$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; }; \
	if test $(READY) -nt requirements.lock && test $(READY) -nt pyproject.toml \
	    && test "$$(cat $(READY))" = "$(CURDIR)"; then exit 0; fi; \
	rm -f $(READY); \
	if ! $(PY) -c 'import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	  echo "creating .venv with $$("$$python" --version)"; \
	  "$$python" -m venv --clear .venv; \
	fi; \
	echo "installing the locked packages (about 5 GB with PyTorch; minutes the first time)"; \
	$(PIP) -r requirements.lock 2>&1 | $(PY) -m tools.installing; \
	$(PIP) --no-build-isolation -e . 2>&1 | $(PY) -m tools.installing; \
	pwd -P > $(READY)

# A folder that was moved needs its packages' paths renewed.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): moved
moved:
endif

book: notebooks site ## execute what is not fresh, build the site and say where it is

notebooks: setup ## execute chapters that are not fresh (FORCE=1: all) and renew what pages show of them
	@$(PY) -m tools.chapters build $(if $(FORCE),--force)
	@$(PY) -m tools.claims_table
	@$(PY) -m tools.cover

site: setup ## build _build/html from notebooks/ as they are (STRICT=1: anew, warnings are errors)
	@$(PY) -m tools.website $(if $(STRICT),--strict)

test: lint site ## every check: style, tests, doctests, and the notebooks against their outputs
	@$(ONE_THREAD) $(PYTEST) --doctest-modules tests bnnbook
	@$(CPU) $(ONE_THREAD) $(PYTEST) $(NBVAL)

test-portable: setup ## the notebooks once more with all threads and an older CPU's instructions
	@$(CPU) ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(NBVAL)

lint: setup ## style of the code
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

serve: book ## show the book at http://localhost:8000 (PORT=…)
	@$(PY) -m http.server --directory _build/html --bind 127.0.0.1 $(PORT)

bench: setup ## time the library against plain PyTorch; writes benchmarks/results/DEVICE.json
	@$(PY) -m benchmarks

clean: ## remove the built site and all caches (not .venv, not notebooks/)
	rm -rf _build .cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
