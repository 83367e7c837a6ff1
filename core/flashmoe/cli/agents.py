"""The coding agents that `flashmoe launch` starts, and how each is told of a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Milliseconds that an agent waits for an answer: a long prompt is read for minutes.
_PATIENCE = 3_600_000


@dataclass(frozen=True)
class Endpoint:
    """A server for an agent.

    Attributes:
        url: base URL of OpenAI's API, which ends with /v1.
        key: the API key.
        model: name of the model.
        context: tokens of prompt and answer together.
        directory: a new directory, for files of configuration.
    """

    url: str
    key: str
    model: str
    context: int
    directory: Path

    @property
    def output(self) -> int:
        """The tokens that one answer should have at most."""
        return max(1024, min(32_000, self.context // 4))


@dataclass(frozen=True)
class Agent:
    """A coding agent.

    Attributes:
        program: its command.
        install: the command that installs it.
        configure: returns the first arguments and the environment for a server.
    """

    program: str
    install: str
    configure: Callable[[Endpoint], tuple[list[str], dict[str, str]]]


def _codex(endpoint: Endpoint) -> tuple[list[str], dict[str, str]]:
    provider = {
        "name": "flashmoe",
        "base_url": endpoint.url,
        "env_key": "FLASHMOE_API_KEY",
        "wire_api": "responses",
    }
    settings: dict[str, str | int] = {
        "model_provider": "flashmoe",
        "model": endpoint.model,
        "model_context_window": endpoint.context,
        "web_search": "disabled",
        "model_providers.flashmoe.stream_idle_timeout_ms": _PATIENCE,
    }
    settings |= {f"model_providers.flashmoe.{name}": value for name, value in provider.items()}
    # Values are TOML, in which a text is quoted as in JSON.
    arguments = [part for n, v in settings.items() for part in ("-c", f"{n}={json.dumps(v)}")]
    return arguments, {"FLASHMOE_API_KEY": endpoint.key}


def _claude(endpoint: Endpoint) -> tuple[list[str], dict[str, str]]:
    model = endpoint.model
    return [], {
        "ANTHROPIC_BASE_URL": endpoint.url.removesuffix("/v1"),
        "ANTHROPIC_AUTH_TOKEN": endpoint.key,
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_SMALL_FAST_MODEL": model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_SUBAGENT_MODEL": model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(endpoint.output),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        # It would change the beginning of each prompt, so that all of it is read again.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "API_TIMEOUT_MS": str(_PATIENCE),
    }


def _opencode(endpoint: Endpoint) -> tuple[list[str], dict[str, str]]:
    limit = {"context": endpoint.context, "output": endpoint.output}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "flashmoe",
        "options": {"baseURL": endpoint.url, "apiKey": endpoint.key, "timeout": _PATIENCE},
        "models": {endpoint.model: {"name": endpoint.model, "limit": limit, "tool_call": True}},
    }
    name = f"flashmoe/{endpoint.model}"
    config: dict[str, Any] = {
        "provider": {"flashmoe": provider},
        "model": name,
        "small_model": name,
    }
    config |= {"autoupdate": False, "share": "disabled"}
    return [], {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}


def _aider(endpoint: Endpoint) -> tuple[list[str], dict[str, str]]:
    name = f"openai/{endpoint.model}"
    limits = {"max_input_tokens": endpoint.context, "max_output_tokens": endpoint.output}
    costs = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    metadata = {name: limits | costs | {"litellm_provider": "openai", "mode": "chat"}}
    file = endpoint.directory / "aider-models.json"
    file.write_text(json.dumps(metadata))
    arguments = ["--model", name, "--weak-model", name, "--model-metadata-file", str(file)]
    arguments += ["--timeout", str(_PATIENCE // 1000), "--no-check-update", "--analytics-disable"]
    return arguments, {"OPENAI_API_BASE": endpoint.url, "OPENAI_API_KEY": endpoint.key}


AGENTS = {
    "codex": Agent("codex", "npm install -g @openai/codex", _codex),
    "claude": Agent("claude", "npm install -g @anthropic-ai/claude-code", _claude),
    "opencode": Agent("opencode", "npm install -g opencode-ai", _opencode),
    "aider": Agent("aider", "python -m pip install aider-install && aider-install", _aider),
}
