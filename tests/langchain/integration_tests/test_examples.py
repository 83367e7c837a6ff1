"""Test the examples of docs/langchain.md, each in a process of its own."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from flashmoe.requests import RANGES
from langchain_flashmoe import ChatFlashMoE, errors

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

DOCS = (Path(__file__).parents[3] / "docs" / "langchain.md").read_text()
EXAMPLES = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", DOCS, re.S | re.M)
EXPECTED = {
    "A chain: prompt, model, parser": "dog",
    "Streaming": "'input_token_details': {'cache_read': ",
    "Async": "given up, and the model is free again",
    "An agent with tools": "{'input_tokens': 192, 'output_tokens': 4, 'total_tokens': 196, "
    "'input_token_details': {'cache_read': 165}",
    "Structured extraction": "mood='",
    "Retrieval (RAG) with an in-memory vector store": "The library opens at nine",
    "Batch": "tree",
}


def test_every_example_has_its_expected_output():
    assert [title for title, _ in EXAMPLES] == list(EXPECTED)


@pytest.mark.parametrize(("title", "code"), EXAMPLES)
def test_example_prints_its_expected_output(title, code, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert EXPECTED[title] in done.stdout


def test_generated_table_is_up_to_date():
    """`make docs` updates the table."""
    path = Path(__file__).parents[3] / "docs" / "langchain.md"
    done = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "--diff", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_docs_name_every_error_and_option():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    names_of_errors = [kind.__name__ for kind in kinds if kind.__module__ == errors.__name__]
    assert len(names_of_errors) == 6
    for name in (*names_of_errors, *RANGES, *ChatFlashMoE.__annotations__):
        assert f"`{name}`" in DOCS, name


def test_examples_of_the_class_run():
    text = inspect.getdoc(ChatFlashMoE)
    sections = dict(re.findall(r"^(\w+):\n((?:    .+\n)+)", text, re.M))
    names: dict = {}
    for title in ("Instantiate", "Invoke", "Stream"):
        exec(dedent(sections[title]), names)
    assert names["chunk"].response_metadata["finish_reason"] == "stop"
