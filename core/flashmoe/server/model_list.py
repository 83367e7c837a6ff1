"""The list of models in the shapes that clients read.

One list serves OpenAI's clients (`data`), Anthropic's (`data`, with names and dates of theirs) and
Codex (`models`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from .served_model import ServedModel, ServedModels

_EFFORTS = {"none": "Answers at once", "medium": "Reasons before the answer"}


def iso_time(seconds: float) -> str:
    """Return a time in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def model_object(model: ServedModel) -> dict:
    """Return the entry of a model."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "flashmoe",
        "aliases": list(model.names[1:]),
        "context_length": model.context,
        "max_model_len": model.context,
        "type": "model",
        "display_name": model.name,
        "created_at": iso_time(model.created),
    }


def model_list(models: ServedModels) -> dict:
    """Return the list of models."""
    entries = [model_object(model) for model in models]
    return {
        "object": "list",
        "data": entries,
        "has_more": False,
        "first_id": entries[0]["id"],
        "last_id": entries[-1]["id"],
        "models": [_codex(model, place) for place, model in enumerate(models)],
    }


def _codex(model: ServedModel, place: int) -> dict[str, Any]:
    """Return what Codex wants to know of a model."""
    efforts = _EFFORTS if model.thinks else {}
    return {
        "slug": model.name,
        "display_name": model.name,
        "description": f"{model.name}, served by flashmoe",
        "default_reasoning_level": "medium" if model.thinks else None,
        "supported_reasoning_levels": [
            {"effort": effort, "description": text} for effort, text in efforts.items()
        ],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": place,
        "base_instructions": "",
        "supports_reasoning_summaries": model.thinks,
        "support_verbosity": False,
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "supports_parallel_tool_calls": True,
        "context_window": model.context,
        "experimental_supported_tools": [],
    }
