"""Builds responses of OpenAI's Responses API, whole or streamed, from the engine's events.

The output is a list of items: what the model thought (`reasoning`), said (`message`) and called
(`function_call`, `custom_tool_call`). In a stream each item begins and ends with events of its own,
between `response.created` and `response.completed`, `.incomplete` or `.failed`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import OutputError
from ..events import End, Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from .api import Answer, check_cut_short, new_id
from .openai_errors import ApiError
from .responses_request import encrypted
from .responses_tools import ResponsesTools


@dataclass
class _Item:
    """An item of the output that is being written: its JSON, and what belongs to its kind."""

    kind: str
    content: dict[str, Any]
    #: Calls: the number of the call in the answer.
    call: int = -1
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ResponsesAnswer(Answer):
    """One response.

    Args:
        head: fields that the response repeats from the request, with `id`, `created_at`, `model`.
        tools: the tools of the request.
        summary: give the reasoning as its summary, where clients that ask for one show it.
        include_encrypted: give the reasoning as `encrypted_content`, too.
    """

    def __init__(
        self,
        head: dict,
        tools: ResponsesTools,
        *,
        summary: bool = False,
        include_encrypted: bool = False,
    ):
        self._head = head
        self._tools = tools
        self._summary = summary
        self._include_encrypted = include_encrypted
        self._output: list[dict] = []
        self._open: _Item | None = None
        self._end: End | None = None
        self._invalid: list[dict] = []
        self._sequence = 0

    @property
    def id(self) -> str:
        """The id of the response."""
        return self._head["id"]

    @property
    def output(self) -> list[dict]:
        """The items that are complete."""
        return self._output

    def first_chunks(self) -> list[dict]:
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def pause_chunks(self) -> list[dict]:
        # Codex gives up after five minutes without an event, and comments are none.
        return [self._event("response.in_progress", response=self._response("in_progress"))]

    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        if isinstance(event, Text):
            return self._add_text("message", event.text)
        if isinstance(event, Reasoning):
            return self._add_text("reasoning", event.text)
        if isinstance(event, ToolCallStart):
            return [*self._close(), *self._begin_call(event)]
        if isinstance(event, ToolCallArguments):
            return self._add_arguments(event)
        if isinstance(event, ToolCall):
            return self._finish_call(event)
        if isinstance(event, End):
            self._end = event
            return self._close("incomplete" if event.finish_reason == "length" else "completed")
        return []

    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        check_cut_short(error)
        assert error.end is not None, "an answer that was cut short has its end"
        return self.chunks(error.end)

    def last_chunks(self) -> list[dict]:
        response = self.to_dict()
        return [self._event(f"response.{response['status']}", response=response)]

    def failure_chunks(self, error: ApiError) -> list[dict]:
        failed = {"code": error.code or "server_error", "message": str(error)}
        response = self._response("failed") | {"error": failed}
        return [self._event("response.failed", response=response)]

    def to_dict(self) -> dict:
        assert self._end is not None, "the answer has not ended"
        cut = self._end.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        end, figures = self._end, self._end.figures()
        response["usage"] = {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": end.cached_tokens},
            "output_tokens": end.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
            "total_tokens": end.prompt_tokens + end.generated_tokens,
        }
        if self._invalid:
            figures |= {"invalid_tool_calls": self._invalid}  # type: ignore[dict-item]
        return response | {"flashmoe": figures}

    def _response(self, status: str) -> dict:
        rest = {"status": status, "output": [*self._output], "usage": None}
        return self._head | rest | {"error": None, "incomplete_details": None}

    def _event(self, type: str, **content: Any) -> dict:
        self._sequence += 1
        return {"type": type, "sequence_number": self._sequence - 1, **content}

    def _item_event(self, type: str, item: _Item, **content: Any) -> dict:
        place = {"item_id": item.content["id"], "output_index": len(self._output)}
        return self._event(f"response.{type}", **place, **content)

    def _begin(self, item: _Item) -> list[dict]:
        self._open = item
        added = self._event(
            "response.output_item.added", output_index=len(self._output), item=dict(item.content)
        )
        if item.kind == "message":
            part = {"content_index": 0, "part": _text_part("")}
            return [added, self._item_event("content_part.added", item, **part)]
        if item.kind == "reasoning":
            name, place = self._reasoning_part()
            part = {**place, "part": self._reasoning_content("")}
            return [added, self._item_event(f"{name}.added", item, **part)]
        return [added]

    def _add_text(self, kind: str, text: str) -> list[dict]:
        events: list[dict] = []
        if self._open is None or self._open.kind != kind:
            events = self._close()
            content: dict[str, Any] = {"id": new_id("msg_"), "type": "message", "content": []}
            content |= {"role": "assistant", "status": "in_progress"}
            if kind == "reasoning":
                content = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
                content |= {"status": "in_progress"}
            events += self._begin(_Item(kind, content))
        item = self._open
        assert item is not None, "it was begun"
        item.texts.append(text)
        if kind == "message":
            place: dict = {"content_index": 0, "logprobs": []}
            return [*events, self._item_event("output_text.delta", item, delta=text, **place)]
        _, place = self._reasoning_part()
        name = "reasoning_summary_text" if self._summary else "reasoning_text"
        return [*events, self._item_event(f"{name}.delta", item, delta=text, **place)]

    def _begin_call(self, start: ToolCallStart) -> list[dict]:
        custom = self._tools.is_custom(start.name)
        kind = "custom_tool_call" if custom else "function_call"
        content = {
            "id": new_id("ctc_" if custom else "fc_"),
            "type": kind,
            "status": "in_progress",
            "call_id": start.id,
            **self._tools.names(start.name),
            "input" if custom else "arguments": "",
        }
        return self._begin(_Item(kind, content, call=start.index))

    def _add_arguments(self, event: ToolCallArguments) -> list[dict]:
        item = self._open
        if item is None or item.call != event.index:
            return []
        item.texts.append(event.text)
        if item.kind == "custom_tool_call":
            return []  # its input is a text inside these arguments
        return [self._item_event("function_call_arguments.delta", item, delta=event.text)]

    def _finish_call(self, call: ToolCall) -> list[dict]:
        item = self._open if self._open is not None and self._open.call == call.index else None
        if call.error is None:
            if item is not None and item.kind == "custom_tool_call":
                item.texts = [str((call.arguments or {}).get("input", ""))]
            return self._close()
        self._invalid.append({"id": call.id, "name": call.name, "error": call.error})
        if item is None:
            # It never became a call: clients see what the model wrote.
            return self._add_text("message", call.text)
        if item.kind == "custom_tool_call":
            item.texts = [_partial_input(item.text)]
        return self._close("incomplete")

    def _close(self, status: str = "completed") -> list[dict]:
        """Return the last events of the item that is being written, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return []
        text, content = item.text, item.content | {"status": status}
        if item.kind == "message":
            place: dict = {"content_index": 0}
            events = [
                self._item_event("output_text.done", item, text=text, logprobs=[], **place),
                self._item_event("content_part.done", item, part=_text_part(text), **place),
            ]
            content["content"] = [_text_part(text)]
        elif item.kind == "reasoning":
            name, place = self._reasoning_part()
            part = self._reasoning_content(text)
            done = "reasoning_summary_text" if self._summary else "reasoning_text"
            events = [
                self._item_event(f"{done}.done", item, text=text, **place),
                self._item_event(f"{name}.done", item, part=part, **place),
            ]
            content["summary" if self._summary else "content"] = [part]
            if self._include_encrypted:
                content["encrypted_content"] = encrypted(text)
        elif item.kind == "function_call":
            content["arguments"] = text
            events = [self._item_event("function_call_arguments.done", item, arguments=text)]
            events[0]["name"] = content["name"]
        else:
            content["input"] = text
            events = [
                self._item_event("custom_tool_call_input.delta", item, delta=text),
                self._item_event("custom_tool_call_input.done", item, input=text),
            ]
        done_event = self._event(
            "response.output_item.done", output_index=len(self._output), item=content
        )
        self._output.append(content)
        return [*events, done_event]

    def _reasoning_part(self) -> tuple[str, dict]:
        """Return the name of the events of a part of the reasoning, and its place in the item."""
        if self._summary:
            return "reasoning_summary_part", {"summary_index": 0}
        return "content_part", {"content_index": 0}

    def _reasoning_content(self, text: str) -> dict:
        return {"type": "summary_text" if self._summary else "reasoning_text", "text": text}


def _text_part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _partial_input(arguments: str) -> str:
    """Return the input of a custom tool as far as it is in cut arguments."""
    start = arguments.partition(":")[2].lstrip()
    for end in range(len(start), max(0, len(start) - 8), -1):
        try:
            return str(json.loads(start[:end] + '"'))
        except ValueError:
            continue
    return ""
