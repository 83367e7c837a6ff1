"""Test `flashmoe serve` as a process: how it starts, serves llm, and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner
from toys import write_chat_toy

from flashmoe.catalog import CATALOGUE
from flashmoe.cli import cli
from flashmoe.cli.serving import one_checkpoint, served_models, shared_experts
from flashmoe.errors import SettingError
from flashmoe.hub import registry
from flashmoe.options import EngineOptions

FLASHMOE = str(Path(sys.executable).parent / "flashmoe")


@contextmanager
def serving(*args, **environ):
    """Run the server, and yield the process and the URL that it printed."""
    command = [FLASHMOE, "serve", *map(str, args), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
    ) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)


@pytest.mark.slow
def test_llm_is_served_until_ctrl_c(run_llm, tmp_path, toy):
    """Serve a registered model with a key, and end with Ctrl-C during a streamed answer."""
    registry_home = tmp_path / "config"
    env = {"FLASHMOE_CONFIG": str(registry_home), "FLASHMOE_API_KEY": "s3cret"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMOE_CONFIG", env["FLASHMOE_CONFIG"])
        registry.add("mine", toy, ("m",))
    with serving("mine", "--experts", "2", "--memory", "2GB", **env) as (process, url):
        (tmp_path / "llm").mkdir()
        (tmp_path / "llm" / "extra-openai-models.yaml").write_text(
            f"- model_id: served\n  model_name: m\n  api_base: {url}\n  api_key_name: mine\n"
            "  supports_tools: true\n  supports_schema: true\n"
        )
        options = ("-m", "served", "-o", "temperature", "0", "-o", "max_tokens", "9")
        refused = run_llm(*options, "Hello", "--key", "wrong")
        assert "API key is missing or wrong" in refused.stderr
        answer = run_llm(*options, "Hello", "--key", "s3cret")
        assert answer.returncode == 0, answer.stderr
        client = openai.OpenAI(base_url=url, api_key="s3cret", max_retries=0)
        fields = {"model": "m", "temperature": 0, "max_tokens": 9}
        hello = [{"role": "user", "content": "Hello"}]
        completion = client.chat.completions.create(messages=hello, **fields)
        assert answer.stdout.strip() == completion.choices[0].message.content.strip()
        assert (completion.model, completion.flashmoe["experts"]) == ("mine", 2)
        logged = json.loads(run_llm("logs", "--json").stdout)[0]
        assert logged["input_tokens"] == completion.usage.prompt_tokens
        structured = run_llm(
            *options[:5],
            "-o",
            "max_tokens",
            "150",
            "--key",
            "s3cret",
            "A dog",
            "--schema",
            '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}',
        )
        assert json.loads(structured.stdout)["n"] in (1, 2), structured.stderr
        stream = client.chat.completions.create(
            messages=hello, **fields | {"max_tokens": 3900}, stream=True
        )
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
        assert process.stdout.read() == ""


def test_sigterm_ends_the_server_cleanly(toy):
    with serving(toy, "--slots", "5", "-v") as (process, url):
        # A model without a registered name has the name that was typed.
        (model,) = httpx.get(url + "/models", timeout=120).json()["data"]
        assert model["id"] == str(toy)
        process.terminate()
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--host", "0.0.0.0"), "an API key is required: set FLASHMOE_API_KEY"),
        (("--host", "::"), "an API key is required"),
        (("--host", "192.0.2.7"), "an API key is required"),
        (("--api-key", ""), "must be printable ASCII and must not be empty"),
        (("--api-key", "k\u00e4se"), "must be printable ASCII"),
        (("--host", "192.0.2.7", "--api-key", "k"), "cannot listen at"),
        (("--host", "no.such.host.invalid", "--api-key", "k"), "is not an address of this machine"),
        (("--queue", "-1"), "queue=-1 must be 0 or more"),
        (("--timeout", "0"), "timeout=0.0 must be above 0"),
        (("--max-body", "x"), "'x' is not a memory size"),
        (("--batch", "0"), "batch=0 must be 1 or more"),
        (("--experts", "99"), "experts=99"),
    ],
)
def test_server_refuses_to_start_with(toy, args, words):
    done = CliRunner().invoke(cli, ["serve", str(toy), "--port", "0", *args])
    assert done.exit_code == 1
    assert words in done.output
    assert "Traceback" not in done.output


def test_port_in_use_is_refused(toy):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = CliRunner().invoke(cli, ["serve", str(toy), "--port", port])
    assert done.exit_code == 1
    assert "choose another --port" in done.output


def test_known_model_is_served_with_its_own_experts(tmp_path, toy, monkeypatch):
    """The known model has more experts per token than the toy, so its own K is refused."""
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path))
    name = "qwen3.5-397b-flash"
    registry.add(name, toy, repo=CATALOGUE[name].repo)
    done = CliRunner().invoke(cli, ["serve", name, "--port", "0"])
    assert done.exit_code == 1
    assert "experts=4 is out of range" in done.output


def test_importing_the_command_line_does_not_import_the_server():
    code = (
        "import sys, flashmoe.cli\n"
        "print(*({'starlette', 'uvicorn', 'jsonschema', 'mlx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "", done.stderr


def test_names_of_one_checkpoint_share_its_engine(own_directories, toy, tmp_path):
    registry.add("big", toy, ("b",))
    registry.add("other", write_chat_toy(tmp_path / "other"), ())
    path, known = one_checkpoint(["big", str(toy)])
    assert (path, [m.name for m in known]) == (toy, ["big", str(toy)])
    first, second = served_models(path, known, ["b", str(toy)], EngineOptions())
    assert first.names == ("big", "b")
    assert second.names == (str(toy),)
    models = [replace(known[0], experts=2), replace(known[0], experts=1)]
    assert shared_experts(EngineOptions(), models).experts == 2
    assert shared_experts(EngineOptions(), [models[0], known[0]]).experts is None
    assert shared_experts(EngineOptions(experts=3), models).experts == 3
    with pytest.raises(SettingError, match="different checkpoints"):
        one_checkpoint(["big", "other"])
