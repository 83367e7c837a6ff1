"""OpenAI's Responses API as an API of the server."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from .api import Api, Call, new_id
from .json_body import parse_object
from .openai_errors import ApiError, invalid_field, short_repr
from .openai_request import checked_call
from .responses_answer import ResponsesAnswer
from .responses_request import RENAMED, chat_fields, input_messages, parsed
from .responses_tools import ResponsesTools
from .served_model import ServedModels
from .wire import SSE_WITH_NAMES

#: Bytes of text that stored conversations may have together.
_STORED_NBYTES = 64 * 10**6


@dataclass
class _Stored:
    messages: list[dict]
    response: dict
    nbytes: int


class ResponseStore:
    """Keeps the last responses in memory, so that clients continue them by id.

    Args:
        count: how many are kept; 0: none.
    """

    def __init__(self, count: int = 0):
        self.count = count
        self._stored: OrderedDict[str, _Stored] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def put(self, messages: list[dict], response: dict) -> None:
        """Keep a response, and the conversation up to its end."""
        stored = _Stored(messages, response, len(repr(messages)) + len(repr(response)))
        with self._lock:
            self._stored[response["id"]] = stored
            self._nbytes += stored.nbytes
            while len(self._stored) > self.count or self._nbytes > _STORED_NBYTES:
                _, oldest = self._stored.popitem(last=False)
                self._nbytes -= oldest.nbytes

    def messages(self, id: str) -> list[dict]:
        """Return the conversation up to the end of a response.

        Raises:
            ApiError: 400; the response is not kept.
        """
        with self._lock:
            if (stored := self._stored.get(id)) is not None:
                return stored.messages
        why = "start the server with --store" if not self.count else "it is too old, or unknown"
        raise invalid_field(
            "previous_response_id",
            f"the response {short_repr(id)} is not stored here: send the whole conversation as "
            f"input ({why})",
            "previous_response_not_found",
        )

    def response(self, id: str) -> dict:
        """Return a response.

        Raises:
            ApiError: 404; the response is not kept.
        """
        with self._lock:
            if (stored := self._stored.get(id)) is not None:
                return stored.response
        raise ApiError(404, f"the response {short_repr(id)} is not stored here", code="not_found")

    def delete(self, id: str) -> dict:
        """Forget a response.

        Raises:
            ApiError: 404; the response is not kept.
        """
        self.response(id)
        with self._lock:
            stored = self._stored.pop(id, None)
            self._nbytes -= stored.nbytes if stored else 0
        return {"id": id, "object": "response", "deleted": True}


class _StoredAnswer(ResponsesAnswer):
    """A response that is kept when it is complete."""

    def keep_in(self, store: ResponseStore, messages: list[dict], tools: ResponsesTools) -> None:
        """Say where it is kept, and the conversation before it."""
        self._keep = store, messages, tools

    def to_dict(self) -> dict:
        response = super().to_dict()
        store, messages, tools = self._keep
        store.put([*messages, *input_messages(self.output, tools)], response)
        return response


def responses_api(store: ResponseStore) -> Api:
    """Return the API, with its store."""

    def read(body: bytes, models: ServedModels) -> Call:
        fields = parsed(parse_object(body))
        previous = fields.get("previous_response_id")
        history = store.messages(previous) if previous else []
        tools = ResponsesTools(fields.get("tools"), fields.get("tool_choice"))
        chat = chat_fields(fields, history, tools)
        call = checked_call(chat, models)
        stored = bool(store.count) and fields.get("store") is not False
        kind = _StoredAnswer if stored else ResponsesAnswer
        reasoning = fields.get("reasoning") or {}
        answer = kind(
            _head(fields, call.model.name, stored),
            tools,
            summary=bool(reasoning.get("summary") or reasoning.get("generate_summary")),
            include_encrypted="reasoning.encrypted_content" in (fields.get("include") or ()),
        )
        if isinstance(answer, _StoredAnswer):
            said = chat["messages"][1 if fields.get("instructions") else 0 :]
            answer.keep_in(store, said, tools)
        return Call((call.request,), answer, call.stream)

    return Api("/v1/responses", read, SSE_WITH_NAMES, RENAMED)


def _head(fields: dict, model: str, stored: bool) -> dict[str, Any]:
    """Return what a response repeats from its request; clients' types want all of these fields."""
    text = {"format": {"type": "text"}} | (fields.get("text") or {})
    reasoning = {"effort": None, "summary": None} | (fields.get("reasoning") or {})
    choice = fields.get("tool_choice")
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "background": False,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "metadata": fields.get("metadata") or {},
        "parallel_tool_calls": fields.get("parallel_tool_calls") is not False,
        "previous_response_id": fields.get("previous_response_id"),
        "reasoning": reasoning,
        "store": stored,
        "temperature": fields.get("temperature"),
        "text": text,
        "tool_choice": "auto" if choice is None else choice,
        "tools": fields.get("tools") or [],
        "top_p": fields.get("top_p"),
        "truncation": "disabled",
        "user": fields.get("user"),
    }
