"""Let coding agents make one tool call each with a server of the demo model; print transcripts.

The demo model is too small to work for an agent, and its context too short. So the server gets a
copy of it with a longer context, and a proxy in front of the server holds the first answer to one
harmless call (its schema allows nothing else), and lets the second answer be a few words. All else
is as it would be: the agents' own requests, with all of their tools, and what they make of the
answers.

    python tools/try_agents.py codex claude opencode aider

The agents must be installed. They run in a temporary home directory, and need no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from flashmoe.catalog import DEMO, find
from flashmoe.cli.agents import AGENTS, Endpoint

SAID = "flashmoe-was-here"
CONTEXT = 65_536
#: How each agent is asked for one thing, without questions to the user.
ASK = "Say hello with your shell tool."
ARGUMENTS = {
    "codex": ["exec", "--skip-git-repo-check", ASK],
    "claude": ["-p", ASK, "--tools", "Bash", "--allowedTools", "Bash"] + ["--max-turns", "3"],
    "opencode": ["run", ASK],
    "aider": ["--message", ASK, "--yes-always", "--no-git", "--no-auto-commits", "--no-pretty"]
    + ["--no-stream", "--edit-format", "whole", "--no-show-model-warnings"],
}
#: The tools that run a command, in the order in which they are taken.
SHELLS = ("exec_command", "shell_command", "shell", "Bash", "bash")
#: What aider makes of an answer: it has no tools, and writes the files that are in the text.
FILE = f"hello.txt\n```\n{SAID}\n```\n"


class Proxy:
    """Passes requests on to a server, and holds the first answer with tools to one call.

    Args:
        url: base URL of the server, without /v1.
        key: its key.
        model: the name that it serves.
    """

    def __init__(self, url: str, key: str, model: str):
        self._client = httpx.AsyncClient(base_url=url, timeout=600)
        self._key = key
        self._model = model
        self.log: list[str] = []
        routes = [Route("/{path:path}", self._pass_on, methods=["GET", "POST", "HEAD"])]
        self.app = Starlette(routes=routes)

    async def _pass_on(self, request: Request) -> Response:
        body = await request.body()
        path = "/" + request.path_params["path"]
        note = ""
        if request.method == "POST" and body:
            fields = json.loads(body)
            if "model" in fields:
                fields["model"] = self._model
            note = self._edit(path, fields)
            body = json.dumps(fields).encode()
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        sent = self._client.build_request(request.method, path, content=body, headers=headers)
        response = await self._client.send(sent, stream=True)
        self.log.append(f"{request.method} {path} {response.status_code}{note}")
        if response.status_code >= 400:
            self.log.append((await response.aread()).decode()[:500])
            return Response(response.content, response.status_code)
        kind = response.headers["content-type"]
        return StreamingResponse(response.aiter_bytes(), response.status_code, media_type=kind)

    def _edit(self, path: str, fields: dict) -> str:
        """Hold the answer to what is wanted, and return what is notable about the request."""
        if path.endswith("count_tokens"):
            return ""
        limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
        fields[limit] = 24
        fields["temperature"] = 0
        tools = [t for tool in fields.get("tools") or () for t in tool.get("tools", [tool])]
        note = f": {len(tools)} tools, {len(json.dumps(fields)) // 1000} kB"
        if any(word in json.dumps(fields) for word in ("tool_result", "function_call_output")):
            note += ", with the result of a call"
        if '"role": "tool"' in json.dumps(fields):
            note += ", with the result of a call"
        if "with the result" in note:
            # Without these words in what the result is, the tool did not run.
            note += f" that has {SAID!r}" if self._result_is_there(fields) else ""
            # A sentence is enough. An answer that is cut would be asked for again.
            fields[limit] = 100
            fields["stop_sequences" if path.endswith("messages") else "stop"] = ["."]
            fields["tool_choice"] = {"type": "none"} if path.endswith("messages") else "none"
            return note
        shell = next((t for name in SHELLS for t in tools if _name(t) == name), None)
        if shell is None:
            if not tools:
                fields[limit] = 60
                fields["response_format"] = {"type": "regex", "pattern": re.escape(FILE)}
                if path.endswith(("messages", "responses")):
                    del fields["response_format"]
            return note
        _narrow(shell)
        fields[limit] = 100
        if path.endswith("messages"):
            fields["tool_choice"] = {"type": "tool", "name": _name(shell)}
            fields["thinking"] = {"type": "disabled"}
        elif path.endswith("responses"):
            fields["tool_choice"] = {"type": "function", "name": _name(shell)}
        else:
            function = {"name": _name(shell)}
            fields["tool_choice"] = {"type": "function", "function": function}
        return f"{note}, held to a call of {_name(shell)}"

    def _result_is_there(self, fields: dict) -> bool:
        last = json.dumps((fields.get("input") or fields.get("messages") or [""])[-1])
        return SAID in last


def _name(tool: dict) -> str:
    return tool.get("name") or tool.get("function", {}).get("name", "")


def _narrow(tool: dict) -> None:
    """Let the schema of a shell tool allow one command only."""
    inner = tool.get("function", tool)
    schema = inner["input_schema" if "input_schema" in inner else "parameters"]
    known = schema["properties"]
    name = next(n for n in ("command", "cmd") if n in known)
    words = ["echo", SAID]
    value: Any = words if known[name].get("type") == "array" else " ".join(words)
    kept = {n: {"enum": ["Says hello"]} for n in schema.get("required", ()) if n != name}
    schema["properties"] = {name: {"enum": [value]}} | kept
    schema["required"] = [name, *kept]
    schema["additionalProperties"] = False


def long_demo(directory: Path) -> Path:
    """Return a copy of the demo model with a longer context."""
    copy = Path(shutil.copytree(find(DEMO), directory / "demo"))
    text = (copy / "config.json").read_text()
    text = re.sub(r'("max_position_embeddings": )\d+', rf"\g<1>{CONTEXT}", text)
    (copy / "config.json").write_text(text)
    return copy


def try_agent(name: str, url: str, key: str, directory: Path) -> bool:
    """Run one agent, print the transcript, and return whether its tool call came back."""
    proxy = Proxy(url, key, str(directory / "demo"))
    config = uvicorn.Config(proxy.app, port=0, log_level="error", lifespan="off")
    # The answer that an agent left alone may still come.
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        pass
    port = server.servers[0].sockets[0].getsockname()[1]
    home = directory / name
    (home / "work").mkdir(parents=True)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", key, "demo", CONTEXT, home)
    first, environ = AGENTS[name].configure(endpoint)
    own = {"HOME": str(home), "CODEX_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    own |= {"XDG_DATA_HOME": str(home / "data"), "CI": "1", "NO_COLOR": "1"}
    command = [AGENTS[name].program, *first, *ARGUMENTS[name]]
    if name == "codex":  # its own sandbox needs rights that containers do not have
        command.insert(-1, "--dangerously-bypass-approvals-and-sandbox")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=420,
            stdin=subprocess.DEVNULL,
            env=os.environ | environ | own,
            cwd=home / "work",
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as e:
        output, status = str(e), -1
    finally:
        server.should_exit = True
        thread.join()
    written = (home / "work" / "hello.txt").exists()
    came_back = any(f"that has {SAID!r}" in line for line in proxy.log) or written
    shown = " ".join([AGENTS[name].program, "SETTINGS", *command[1 + len(first) :]])
    print(f"### {name}\n\n    $ {shown}")
    for line in proxy.log:
        print("    " + line)
    print(f"    (exit status {status}; the tool ran: {came_back})\n")
    for line in output.strip().splitlines()[-25:]:
        print("    | " + line[:160].replace(str(home), "HOME"))
    print(flush=True)
    return came_back


def main() -> None:
    """Try the agents that are named on the command line."""
    names = sys.argv[1:] or [*AGENTS]
    with tempfile.TemporaryDirectory(prefix="flashmoe-agents-") as temporary:
        directory = Path(temporary)
        flashmoe = str(Path(sys.executable).parent / "flashmoe")
        copy = long_demo(directory)
        environ = os.environ | {"FLASHMOE_API_KEY": "for-agents", "FLASHMOE_CACHE": temporary}
        command = [flashmoe, "serve", str(copy), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().split()[-1].removesuffix("/v1")
                # The proxy's agents ask for "demo".
                results = [try_agent(name, url, "for-agents", directory) for name in names]
            finally:
                process.terminate()
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
