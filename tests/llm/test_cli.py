"""Test the plugin through the `llm` command: what people type, what they see, what is logged."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from flashmoe.catalog import CATALOGUE, DEMO, find
from llm_flashmoe.options import Options

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

GREEDY = ("-m", DEMO, "-o", "temperature", "0", "-o", "max_tokens", "60")
FUNCTIONS = """
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

def upper(text: str) -> str:
    "Write a text in upper case."
    return text.upper()
"""


def logs(run_llm, *args) -> list[dict]:
    return json.loads(run_llm("logs", "--json", "-n", "0", *args).stdout)


def test_agent_in_one_command_answers_and_is_logged(run_llm, tmp_path):
    """The log has every round in order."""
    done = run_llm(*GREEDY, "--functions", FUNCTIONS, "What is 17 plus 25? Use the tool.", "--td")
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert "add({'a': 17, 'b': 25})" in done.stderr
    first, second = logs(run_llm)
    assert first["conversation_id"] == second["conversation_id"]
    assert [t["name"] for t in first["tools"]] == ["add", "upper"]
    (call,) = first["tool_calls"]
    assert (call["name"], call["arguments"]) == ("add", {"a": 17, "b": 25})
    (result,) = second["tool_results"]
    assert (result["name"], result["output"]) == ("add", "42")
    assert result["tool_call_id"] == call["tool_call_id"]
    assert first["response_json"]["finish_reason"] == "tool_calls"
    with sqlite3.connect(tmp_path / "llm" / "logs.db") as db:
        kinds = [k for (k,) in db.execute("select type from parts order by rowid")]
    assert kinds[:4] == ["text", "tool_call", "tool_result", "text"]
    short = ("-o", "temperature", "0", "-o", "max_tokens", "30")
    more = run_llm("-c", "--functions", FUNCTIONS, "What was the result?", *short)
    assert more.returncode == 0, more.stderr
    details = json.loads(logs(run_llm)[-1]["token_details"])
    assert details["cached_tokens"] > 100


def test_answer_fits_the_schema_of_the_command_line(run_llm):
    done = run_llm("-m", DEMO, "--schema", "name, age int", "Invent a dog", "-o", "seed", "1")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"name", "age"}
    multi = '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}'
    done = run_llm(*GREEDY, "--schema-multi", multi, "Count", "-o", "max_tokens", "100")
    if done.returncode == 0:
        assert isinstance(json.loads(done.stdout)["items"], list)
    else:
        assert "cut short" in done.stderr
    assert logs(run_llm)[0]["schema_json"]


def test_reasoning_is_shown_and_logged_or_left_out(run_llm):
    ask = (*GREEDY, "-o", "think", "1", "Why is the sky blue?")
    shown = run_llm(*ask)
    hidden = run_llm(*ask, "-R", "--no-stream")
    assert shown.stdout == hidden.stdout
    assert hidden.stderr == ""
    (first, second) = logs(run_llm)
    assert first["reasoning"].strip()
    assert second["reasoning"] is None
    assert first["reasoning"].strip() in shown.stderr
    assert "## Reasoning" in run_llm("logs", "-n", "2").stdout
    usage = run_llm("logs", "-n", "1", "-u").stdout
    assert '"reasoning_tokens"' in usage


def test_templates_fragments_and_system_prompts_are_used(run_llm, tmp_path):
    (tmp_path / "notes.txt").write_text("My name is Emma.")
    saved = run_llm("--system", "You are kind.", *GREEDY, "--save", "kind")
    assert saved.returncode == 0, saved.stderr
    done = run_llm("-t", "kind", "-f", str(tmp_path / "notes.txt"), "What is my name?")
    assert "Emma" in done.stdout, done.stderr
    (entry,) = logs(run_llm)
    assert entry["system"] == "You are kind."
    assert entry["options_json"]["max_tokens"] == 60


def test_stored_option_is_used(run_llm):
    assert run_llm("models", "options", "set", DEMO, "max_tokens", "3").returncode == 0
    done = run_llm("-m", DEMO, "Tell me a story.", "--async", "-u")
    assert done.returncode == 0, done.stderr
    assert "3 output" in done.stderr


def test_options_and_features_are_listed(run_llm):
    listed = run_llm("models", "--options", "-q", DEMO).stdout
    for name, field in Options.model_fields.items():
        assert f"{name}: " in listed
        assert " ".join(field.description.split()[:4]) in " ".join(listed.split())
    for feature in ("streaming", "schemas", "tools", "async"):
        assert f"- {feature}" in listed
    names = run_llm("models").stdout
    for name in CATALOGUE:
        assert f"flashmoe: {name} (not on this disk, " in names
    plugins = json.loads(run_llm("plugins").stdout)
    (plugin,) = [p for p in plugins if p["name"] == "llm-flashmoe"]
    assert sorted(plugin["hooks"]) == ["register_commands", "register_models"]


def test_registered_model_and_its_alias_are_known(run_llm):
    done = run_llm("flashmoe", "register", find(DEMO), "--name", "mine", "--alias", "own")
    assert done.returncode == 0, done.stderr
    done = run_llm("-m", "own", "Hello.", "-o", "max_tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "flashmoe: mine (aliases: own)" in run_llm("models").stdout
    assert logs(run_llm)[0]["model"] == "mine"
    run_llm("flashmoe", "remove", "mine")


def test_broken_registry_does_not_break_llm(run_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "models.json").write_text("{")
    done = run_llm("models")
    assert done.returncode == 0
    assert f"flashmoe: {DEMO}" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("-m", "qwen3.5-397b-flash", "hi"),
         ("Error: qwen3.5-397b-flash is not on this disk: it is about 224 GB. To get it, run: "
          "flashmoe download qwen3.5-397b-flash\n",)),
        ((*GREEDY, "--schema", '{"type": "strng"}', "x"), ("not a valid JSON schema", "strng")),
        ((*GREEDY, "-a", "README.md", "x"), ("does not support",)),
        ((*GREEDY, "-o", "nonsense", "1", "x"), ("nonsense",)),
        ((*GREEDY, "--functions", FUNCTIONS, "--cl", "1", "What is 3 plus 4? Use the tool."),
         ("Chain limit",)),
    ],
)  # fmt: skip
def test_mistake_is_an_error_without_a_traceback(run_llm, args, words):
    done = run_llm(*args)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
    for word in words:
        assert word in done.stderr, line


def test_plugin_imports_no_other_package_for_llm_models(tmp_path):
    """The plugin imports nothing that llm does not import itself, so llm starts as fast."""
    code = (
        "import sys, json; from click.testing import CliRunner; from llm.cli import cli\n"
        "CliRunner().invoke(cli, ['models'])\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    env = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    modules = []
    for more in ({}, {"LLM_LOAD_PLUGINS": ""}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=env | more, capture_output=True, text=True
        )
        modules.append(set(json.loads(done.stdout)))
    new = modules[0] - modules[1] - set(sys.stdlib_module_names)
    assert new <= {"flashmoe", "llm_flashmoe"}
