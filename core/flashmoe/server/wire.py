"""How streams are written: server-sent events of OpenAI and Anthropic, or lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Wire:
    """The form of a stream.

    Attributes:
        media_type: Content-Type of the response.
        chunk: returns the text of a chunk.
        comment: a format of what is sent to keep the connection alive; "": nothing can be.
        end: the last text.
    """

    media_type: str
    chunk: Callable[[dict], str]
    comment: str = ": {}\n\n"
    end: str = ""


def _json(content: dict) -> str:
    # In ASCII: some clients split lines at characters that do not end a line in JSON.
    return json.dumps(content, separators=(",", ":"))


_SSE = "text/event-stream; charset=utf-8"

#: Chat completions: no names of events, and a last one that is not JSON.
SSE_WITH_DONE = Wire(_SSE, lambda chunk: f"data: {_json(chunk)}\n\n", end="data: [DONE]\n\n")
#: Responses and Messages: an event is named by its type.
SSE_WITH_NAMES = Wire(_SSE, lambda chunk: f"event: {chunk['type']}\ndata: {_json(chunk)}\n\n")
#: Ollama.
JSON_LINES = Wire("application/x-ndjson", lambda chunk: _json(chunk) + "\n", comment="")
