"""The documentation says what is there, and what it shows is what happens."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import structure

from flashmoe.cli import cli
from llm_flashmoe import FlashMoE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"),
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of the languages."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in fenced if language in languages]


def commands(text: str) -> list[str]:
    """Return the commands of a page's shell blocks, those of a console without their output."""
    lines = [line for body in blocks(text, "sh", "shell") for line in _joined(body)]
    console = [line for body in blocks(text, "console") for line in _joined(body)]
    return lines + [line.removeprefix("$ ") for line in console if line.startswith("$ ")]


def _joined(body: str) -> list[str]:
    return body.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("option", list(FlashMoE.Options.model_fields))
def test_options_of_the_plugin_are_documented(option):
    assert f"| `{option}` |" in (ROOT / "docs/llm.md").read_text()
    assert FlashMoE.Options.model_fields[option].description
    assert FlashMoE.Options.model_fields[option].default is None


@pytest.mark.parametrize("command", list(cli.commands))
def test_commands_are_documented(command):
    assert f"`flashmoe {command}`" in (ROOT / "docs/commands.md").read_text()
    assert cli.commands[command].help


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_docs_exist(page):
    """Each `flashmoe ...` of a page is a command, and has the options that it is shown with."""
    for line in commands((ROOT / page).read_text()):
        words = shlex.split(line, comments=True)
        if words[:2] == ["llm", "flashmoe"]:
            words = words[1:]
        if words[:1] != ["flashmoe"]:
            continue
        command, words = cli, words[1:]
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, line
            command, words = command.commands[words[0]], words[1:]
        command.make_parser(click.Context(command)).parse_args(words)


@pytest.mark.slow
def test_readme_shows_what_its_commands_print(run_shell):
    """Every console block, run as it stands, prints what stands there."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        pytest.skip("the answers shown are those of a CPU, in float32")
    sessions = blocks(README, "console")
    assert sessions
    for command, shown in re.findall(r"^\$ (.*(?:\\\n.*)*)\n((?:(?!\$ ).*\n)*)", *sessions, re.M):
        assert run_shell(command).split() == shown.split()


def test_readme_python_runs(tmp_path):
    """Every Python block, with the demo model and fewer tokens."""
    from flashmoe.catalog import DEMO, find

    printed = []
    for body in blocks(README, "python"):
        body = body.replace("path/to/checkpoint", str(find(DEMO))).replace("=50", "=5")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(body, {})
        printed.append(out.getvalue())
    assert len(printed) == 2
    assert all(text.strip() for text in printed)
    assert "End(finish_reason=" in printed[1]


COGGED = [page for page in PAGES if "[[[cog" in (ROOT / page).read_text()]


@pytest.mark.parametrize("page", COGGED)
def test_generated_tables_are_current(page):
    """`make docs` writes them again."""
    command = [sys.executable, "-m", "cogapp", "--check", "--diff", page]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = (ROOT / "Makefile").read_text().split("\ndocs:")[1].split("\n\n")[0]
    assert page in recipe.split()


def test_model_table_of_the_readme_is_current():
    """`python tools/model_table.py --short` prints it."""
    command = [sys.executable, "tools/model_table.py", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout in README


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(ROOT / page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), target


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_benchmark_is_listed(script):
    assert f"`{script.name}`" in (ROOT / "benchmarks/README.md").read_text()


def test_every_package_has_one_line():
    """docs/architecture.md has a table of all packages and top-level modules."""
    table = re.findall(
        r"^\| `([\w.]+)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    packages = structure.package_graph(structure.imports(ROOT), structure.modules(ROOT))
    assert sorted(table) == sorted(packages)


def test_engine_page_python_runs():
    """Every Python block of docs/engine.md runs and prints events up to the last one."""
    (body,) = blocks((ROOT / "docs/engine.md").read_text(), "python")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(body.replace("=50", "=5"), {})
    assert "End(finish_reason=" in out.getvalue()


@pytest.fixture
def run_shell(tmp_path, monkeypatch):
    """A function that runs a command line in a directory of its own and returns what it prints."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run
