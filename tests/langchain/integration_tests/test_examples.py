"""The examples of docs/langchain.md, each from a process of its own."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from flashmoe.requests import RANGES
from langchain_flashmoe import ChatFlashMoE, errors

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


def test_example_is_missing():
    assert [title for title, _ in EXAMPLES] == list(EXPECTED)


@pytest.mark.parametrize(("title", "code"), EXAMPLES)
def test_example_fails(title, code, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert EXPECTED[title] in done.stdout


def test_docs_are_old():
    """`make docs` writes the table anew."""
    path = Path(__file__).parents[3] / "docs" / "langchain.md"
    done = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "--diff", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_name_is_not_in_the_docs():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ours = [kind.__name__ for kind in kinds if kind.__module__ == errors.__name__]
    assert len(ours) == 6
    for name in (*ours, *RANGES, *ChatFlashMoE.__annotations__):
        assert f"`{name}`" in DOCS, name


def test_example_of_the_class_fails():
    text = inspect.getdoc(ChatFlashMoE)
    sections = dict(re.findall(r"^(\w+):\n((?:    .+\n)+)", text, re.M))
    names: dict = {}
    for title in ("Instantiate", "Invoke", "Stream"):
        exec(dedent(sections[title]), names)
    assert names["chunk"].response_metadata["finish_reason"] == "stop"
