"""What commands print: a table for a person at a terminal, tab-separated values in a pipe."""

import re

import pytest
from click.testing import CliRunner
from command_line import run
from pseudo_terminal import lines, show
from toys import write_toy

from flashmoe import terminal
from flashmoe.catalog import DEMO
from flashmoe.cli import cli
from flashmoe.cli.options import engine_options
from flashmoe.hub import registry

EXPONENT = re.compile(r"\d[eE][+-]?\d")
MAC = ("plan", DEMO, "--machine", "m3-max-48gb")


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


TABLES = {
    ("list",): ["name", "size", "bits", "K", "where"],
    ("info", DEMO): ["field", "value"],
    ("cache", "show"): ["field", "value"],
    MAC: ["field", "value"],
    ("plan", "--machine", "list"): ["machine", "memory", "memory GB/s", "SSD GB/s", "source"],
}


@pytest.mark.parametrize(("command", "columns"), TABLES.items(), ids=lambda x: " ".join(x))
def test_pipe_gets_a_header_and_tab_separated_values(command, columns):
    header, *rows = run(*command).splitlines()
    assert header.split("\t") == columns
    assert rows
    for row in rows:
        assert len(row.split("\t")) == len(columns)
        assert row == "\t".join(cell.strip() for cell in row.split("\t")), "nothing is padded"
        assert "\x1b" not in row
        assert not EXPONENT.search(row)


@pytest.mark.parametrize(("command", "columns"), TABLES.items(), ids=lambda x: " ".join(x))
def test_terminal_gets_a_table_that_fits(command, columns):
    shown = lines(show(*command, columns=60))
    assert shown[0].startswith(columns[0]) or shown[1].startswith(columns[0])
    assert any(line.startswith("─") for line in shown[:3])
    assert max(map(len, shown)) <= 60
    text = "".join(shown).replace(" ", "")
    for row in run(*command).splitlines()[1:]:
        assert row.split("\t")[0].replace(" ", "") in text, "nothing is cut"
    assert not EXPONENT.search(text)


def test_llm_prints_the_same_table(tmp_path):
    by_llm = show("flashmoe", "list", program="llm", LLM_USER_PATH=str(tmp_path / "llm"))
    shown = lines(show("list"))
    assert lines(by_llm) == shown
    assert shown[0].split() == TABLES["list",]


def test_list_names_the_way_to_a_model_only_on_a_terminal():
    assert "flashmoe download NAME" in lines(show("list"))[-1]
    assert "flashmoe download NAME" not in run("list")


def test_path_with_markup_and_control_codes_is_printed_as_it_is(tmp_path):
    toy = write_toy(tmp_path / "[red]toy[/red]", bits=8)
    registry.add("odd", toy)
    shown = "".join(line.strip() for line in lines(show("list", columns=200)))
    assert str(toy) in shown
    controls = write_toy(tmp_path / "a\tb\x1b[31m", bits=8)
    registry.add("controls", controls)
    row = next(line for line in run("list").splitlines() if line.startswith("controls"))
    assert len(row.split("\t")) == 5
    assert "\x1b" not in row


def test_home_is_a_tilde_on_a_terminal_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert any(line.split() == ["path", "~/cache"] for line in lines(show("cache")))
    assert f"path\t{tmp_path}/cache" in run("cache")


def test_measurements_of_a_drive_are_printed_one_by_one():
    command = ("bench", "disk", DEMO, "--no-keep", "--seconds", "0.01")
    header, *rows = run(*command).splitlines()
    assert header.split("\t") == ["io", "depth", "reads", "GB/s", "CPU ms per GB"]
    assert rows[-1].startswith("best: io="), "on stderr, which the runner puts behind"
    assert all(len(row.split("\t")) == 5 for row in rows[:-1])
    shown = lines(show(*command, columns=60))
    assert shown[0].split() == ["io", "depth", "reads", "GB/s", "CPU", "ms", "per", "GB"]
    assert len(shown) > 10
    assert max(map(len, shown)) <= 60


def test_remark_about_a_table_does_not_go_into_the_pipe(capsys):
    terminal.print_remark("sentence")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "sentence\n")


def test_narrow_table_keeps_the_first_column_whole(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{"name": "a-name-that-people-copy", "value": "x" * 60, "n": 123456}]
    terminal.print_table(rows, ("name", "value", "n"), right=("n",))
    shown = capsys.readouterr().out
    assert "a-name-that-people-copy" in shown
    assert max(map(len, shown.splitlines())) <= 40
    assert shown.count("x") == 60


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (4.0, "4"), (1e-7, "0.0000001"), (1.5e9, "1500000000")],
)
def test_cell_of_a_table_is_plain_text(value, text):
    assert terminal._cell(value) == text
    assert terminal._cell([value, value]) == f"{text}, {text}"


def test_shared_options_become_one_argument():
    import click

    @click.command()
    @engine_options("memory", "experts", experts="Another text.")
    def command(options):
        click.echo(f"{options.memory} {options.experts} {options.activations}")

    done = CliRunner().invoke(command, ["--memory", "8GB"])
    assert done.output == "8GB None float32\n"
    assert "Another text." in CliRunner().invoke(command, ["--help"]).output


@pytest.mark.parametrize("name", list(cli.commands))
def test_help_says_what_a_command_does_in_one_short_sentence(name):
    """In the list of commands click cuts longer ones."""
    command = cli.commands[name]
    assert not command.get_short_help_str(59).endswith("...")
    for parameter in command.params:
        help_text = getattr(parameter, "help", None)
        assert help_text is None or help_text.rstrip().endswith(".")
