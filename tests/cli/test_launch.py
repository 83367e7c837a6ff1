"""Test that `flashmoe launch` gives an agent a server, and ends with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashmoe.cli import cli
from flashmoe.cli.agents import AGENTS, Endpoint

FLASHMOE = str(Path(sys.executable).parent / "flashmoe")
#: Stands for the program of an agent: it asks the server that it was given, and then ends.
AGENT = """\
#!{python}
import json, os, sys, httpx
base, key = os.environ["ANTHROPIC_BASE_URL"], os.environ["ANTHROPIC_AUTH_TOKEN"]
fields = {{"model": os.environ["ANTHROPIC_MODEL"], "max_tokens": 3}}
fields["messages"] = [{{"role": "user", "content": "Hi"}}]
url = base + "/v1/messages"
statuses = [httpx.post(url, json=fields, timeout=60).status_code]
headers = {{"Authorization": "Bearer " + key}}
statuses.append(httpx.post(url, json=fields, headers=headers, timeout=60).status_code)
print(json.dumps([statuses, sys.argv[1:], url]))
sys.exit(7)
"""


def test_agent_gets_a_server_of_its_own_which_ends_with_it(tmp_path):
    program = tmp_path / "claude"
    program.write_text(AGENT.format(python=sys.executable))
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    command = [FLASHMOE, "launch", "claude", "flashmoe-demo", "--", "-p", "--continue"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 7, done.stderr
    statuses, arguments, url = json.loads(done.stdout)
    assert statuses == [401, 200]
    assert arguments == ["-p", "--continue"]
    assert "context of 4096" in done.stderr
    (log,) = tmp_path.glob("flashmoe-launch-*/server.log")
    assert "POST /v1/messages 200" in log.read_text()


def test_agent_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(cli, ["launch", "codex", "flashmoe-demo"])
    assert result.exit_code == 1
    assert "npm install -g @openai/codex" in result.output


@pytest.mark.parametrize("name", AGENTS)
def test_agent_is_told_of_address_key_and_model(name, tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "k3y", "some-model", 50_000, tmp_path)
    arguments, environ = AGENTS[name].configure(endpoint)
    told = " ".join([*arguments, *environ.values()])
    assert "127.0.0.1:9" in told
    assert "some-model" in told
    # Other users of the machine see command lines.
    assert "k3y" in " ".join(environ.values())
    assert "k3y" not in " ".join(arguments)
