"""The README says what is there."""

import re
from pathlib import Path

import pytest

from flashmoe.cli import cli
from llm_flashmoe import FlashMoE

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("option", list(FlashMoE.Options.model_fields))
def test_option_is_not_documented(option):
    assert re.search(rf"`[\w ]*\b{option}\b[\w ]*`", README)
    assert FlashMoE.Options.model_fields[option].description
    assert FlashMoE.Options.model_fields[option].default is None


@pytest.mark.parametrize("command", list(cli.commands))
def test_command_is_not_documented(command):
    assert f"flashmoe {command}" in README
    assert cli.commands[command].help


def test_python_example_fails(capsys):
    """The example of the README, run with the demo model and fewer tokens."""
    from flashmoe.catalog import DEMO, find

    block = README.split("mlx-lm's tools take it:")[1].split("|")[0]
    code = "\n".join(line[4:] for line in block.splitlines() if line.startswith("    "))
    assert code.startswith("import flashmoe")
    code = code.replace("path/to/checkpoint", str(find(DEMO))).replace("=50", "=5")
    exec(code, {})
    assert capsys.readouterr().out.strip()
