"""Builds messages of Anthropic's Messages API, whole or streamed, from the engine's events.

A message is a list of blocks: what the model thought (`thinking`), said (`text`) and called
(`tool_use`). In a stream each block begins and ends with events of its own.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import OutputError
from ..events import End, Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from .api import Answer, check_cut_short, new_id
from .openai_errors import ApiError, anthropic_body

#: Clients send thoughts back with their signature, which is not looked at.
_SIGNATURE = "flashmoe"
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "cancelled": "end_turn"}


class MessagesAnswer(Answer):
    """One message.

    Args:
        model: name of the model in the answer.
    """

    def __init__(self, model: str):
        self._head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self._blocks: list[dict] = []
        self._texts: list[str] = []
        self._open: dict | None = None
        self._call = -1
        self._end: End | None = None
        self._invalid: list[dict] = []

    def first_chunks(self) -> list[dict]:
        # How many tokens the prompt has is not known yet: message_delta says it.
        usage = {"input_tokens": 0, "output_tokens": 0}
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        message = self._message([], None) | {"usage": usage}
        return [{"type": "message_start", "message": message}, *self.pause_chunks()]

    def pause_chunks(self) -> list[dict]:
        return [{"type": "ping"}]

    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        if isinstance(event, Text):
            delta = {"type": "text_delta", "text": event.text}
            return [*self._block({"type": "text", "text": ""}), self._delta(event.text, delta)]
        if isinstance(event, Reasoning):
            delta = {"type": "thinking_delta", "thinking": event.text}
            thought = {"type": "thinking", "thinking": "", "signature": ""}
            return [*self._block(thought), self._delta(event.text, delta)]
        if isinstance(event, ToolCallStart):
            block: dict[str, Any] = {"type": "tool_use", "id": event.id, "name": event.name}
            block["input"] = {}
            events = [*self._close(), *self._block(block)]
            self._call = event.index
            return events
        if isinstance(event, ToolCallArguments):
            delta = {"type": "input_json_delta", "partial_json": event.text}
            return [self._delta(event.text, delta)]
        if isinstance(event, ToolCall):
            return self._finish_call(event)
        if isinstance(event, End):
            self._end = event
            return self._close()
        return []

    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        check_cut_short(error)
        assert error.end is not None, "an answer that was cut short has its end"
        return self.chunks(error.end)

    def last_chunks(self) -> list[dict]:
        message = self.to_dict()
        delta = {name: message[name] for name in ("stop_reason", "stop_sequence")}
        rest = {name: message[name] for name in ("usage", "flashmoe")}
        return [{"type": "message_delta", "delta": delta, **rest}, {"type": "message_stop"}]

    def failure_chunks(self, error: ApiError) -> list[dict]:
        return [anthropic_body(error)]

    def to_dict(self) -> dict:
        end = self._end
        assert end is not None, "the answer has not ended"
        reason = end.finish_reason
        called = any(block["type"] == "tool_use" for block in self._blocks)
        if reason == "tool_calls" and not called:
            reason = "stop"
        usage = {
            # As there, what came from the cache is not part of the input.
            "input_tokens": end.prompt_tokens - end.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": end.cached_tokens,
            "output_tokens": end.generated_tokens,
        }
        figures: dict[str, Any] = dict(end.figures())
        if self._invalid:
            figures["invalid_tool_calls"] = self._invalid
        message = self._message(self._blocks, _REASONS.get(reason, "end_turn"))
        return message | {"usage": usage, "flashmoe": figures}

    def _message(self, content: list[dict], reason: str | None) -> dict:
        return self._head | {"content": content, "stop_reason": reason, "stop_sequence": None}

    def _block(self, block: dict) -> list[dict]:
        """Begin a block, unless one of its type is being written."""
        if self._open is not None and self._open["type"] == block["type"]:
            return []
        events = self._close()
        self._open, self._texts = block, []
        start = {"type": "content_block_start", "index": len(self._blocks)}
        return [*events, start | {"content_block": dict(block)}]

    def _delta(self, text: str, delta: dict) -> dict:
        self._texts.append(text)
        return {"type": "content_block_delta", "index": len(self._blocks), "delta": delta}

    def _finish_call(self, call: ToolCall) -> list[dict]:
        if call.error is None:
            return self._close()
        self._invalid.append({"id": call.id, "name": call.name, "error": call.error})
        if self._open is not None and self._call == call.index:
            events = self._close()
            # Not streamed, clients see what the model wrote, and no call.
            self._blocks[-1] = {"type": "text", "text": call.text}
            return events
        # It never became a call: clients see what the model wrote.
        delta = {"type": "text_delta", "text": call.text}
        return [*self._block({"type": "text", "text": ""}), self._delta(call.text, delta)]

    def _close(self) -> list[dict]:
        """Return the last events of the block that is being written, if there is one."""
        block, self._open, self._call = self._open, None, -1
        if block is None:
            return []
        text, index = "".join(self._texts), len(self._blocks)
        events: list[dict] = []
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(text or "{}")
            except ValueError:
                # Cut short, as stop_reason says. In a stream, clients have seen the same text.
                block["input"] = {}
        else:
            block["thinking" if block["type"] == "thinking" else "text"] = text
        if block["type"] == "thinking":
            block["signature"] = _SIGNATURE
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            events = [{"type": "content_block_delta", "index": index, "delta": delta}]
        self._blocks.append(block)
        return [*events, {"type": "content_block_stop", "index": index}]
