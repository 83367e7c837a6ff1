"""The README says what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe.cli import cli
from llm_flashmoe import FlashMoE

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("option", list(FlashMoE.Options.model_fields))
def test_option_is_not_documented(option):
    assert re.search(rf"`[\w ]*\b{option}\b[\w ]*`", README)
    assert FlashMoE.Options.model_fields[option].description
    assert FlashMoE.Options.model_fields[option].default is None


@pytest.mark.parametrize("command", list(cli.commands))
def test_command_is_not_documented(command):
    assert f"flashmoe {command}" in README
    assert cli.commands[command].help


def test_langchain_example_fails(capsys):
    section = README.split("## Use it from LangChain")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_python_example_fails(capsys):
    """The examples of the README, run with the demo model and fewer tokens."""
    from flashmoe.catalog import DEMO, find

    section = README.split("## Use it from Python")[1].split("\n## ")[0]
    first, second = (
        "\n".join(line[4:] for line in part.splitlines() if line.startswith("    ") or not line)
        for part in section.split("Chats, tools")
    )
    first = first.replace("path/to/checkpoint", str(find(DEMO))).replace("=50", "=5")
    assert "import flashmoe" in first
    exec(first, {})
    assert capsys.readouterr().out.strip()
    assert "with Engine" in second
    exec(second, {})
    assert "End(finish_reason=" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "docs/plan.md", "docs/pruning.md"])
def test_tables_are_old(name):
    """`make docs` writes them anew."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "cogapp", "--check", "--diff", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout


def test_room_is_not_in_the_picture():
    """docs/architecture.md and docs/engine.md name every module of the engine."""
    root = Path(__file__).parents[2]
    text = (root / "docs/architecture.md").read_text() + (root / "docs/engine.md").read_text()
    for module in (root / "core/flashmoe").glob("*.py"):
        if not module.stem.startswith("__"):
            assert re.search(rf"\b{module.stem}\b", text), module.stem
