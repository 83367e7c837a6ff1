"""Builds one answer of a chat completion, `choices[i]`, from the engine's events."""

from __future__ import annotations

from typing import Any

from ..events import (
    End,
    Event,
    Logprobs,
    Reasoning,
    Text,
    TokenLogprob,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)


class ChatChoice:
    """One answer in OpenAI's format. Events must be given in the order of the engine.

    Args:
        index: its number in the completion.

    Attributes:
        end: the last event; None before it was given.
    """

    def __init__(self, index: int):
        self.end: End | None = None
        self._index = index
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict] = {}
        self._invalid: list[dict] = []
        self._logprobs: list[dict] = []
        self._unsent: list[dict] = []
        self._started = False

    def add(self, event: Event) -> list[dict]:
        """Add an event to the answer, and return what a stream has for it as `choices[0]`."""
        if isinstance(event, Logprobs):
            self._unsent.append(
                {**_logprob(event.token), "top_logprobs": [_logprob(t) for t in event.top]}
            )
            self._logprobs.append(self._unsent[-1])
            return []
        if isinstance(event, Text):
            self._texts.append(event.text)
            return [self._delta({"content": event.text})]
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
            return [self._delta({"reasoning_content": event.text})]
        if isinstance(event, ToolCallStart):
            return [self._start_call(event.index, event.id, event.name)]
        if isinstance(event, ToolCallArguments):
            return [self._add_arguments(event.index, event.text)]
        if isinstance(event, ToolCall):
            return self._finish_call(event)
        if isinstance(event, End):
            self.end = event
            return [self._delta({}, event.finish_reason)]
        return []

    def to_dict(self) -> dict:
        """Return the whole answer. Its end must have been given before."""
        assert self.end is not None, "the answer has not ended"
        message: dict[str, Any] = {"role": "assistant"}
        message["content"] = "".join(self._texts) if self._texts or not self._calls else None
        message["refusal"] = None
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        return {
            "index": self._index,
            "message": message,
            "logprobs": _logprobs(self._logprobs),
            "finish_reason": self.end.finish_reason,
        }

    def figures(self) -> dict:
        """Return the statistics of the answer. Its end must have been given before."""
        assert self.end is not None, "the answer has not ended"
        figures = self.end.figures()
        return figures | ({"invalid_tool_calls": self._invalid} if self._invalid else {})

    def _start_call(self, index: int, id: str, name: str) -> dict:
        self._calls[index] = {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        call = {"index": index, "id": id, "type": "function"}
        return self._delta({"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]})

    def _add_arguments(self, index: int, text: str) -> dict:
        self._calls[index]["function"]["arguments"] += text
        return self._delta({"tool_calls": [{"index": index, "function": {"arguments": text}}]})

    def _finish_call(self, call: ToolCall) -> list[dict]:
        if call.error is None:
            return []
        self._invalid.append(
            {
                "index": call.index,
                "id": call.id,
                "name": call.name,
                "error": call.error,
                "text": call.text,
            }
        )
        known = self._calls.get(call.index)
        if not call.name or (known and known["function"]["arguments"]):
            return []
        # Clients would take a call without arguments for one that needs none.
        first = [] if known else [self._start_call(call.index, call.id, call.name)]
        return [*first, self._add_arguments(call.index, "{")]

    def _delta(self, delta: dict, finish_reason: str | None = None) -> dict:
        if not self._started:
            self._started = True
            delta = {"role": "assistant", "content": ""} | delta
        logprobs = None
        if "content" in delta or finish_reason is not None:
            logprobs, self._unsent = _logprobs(self._unsent), []
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


def _logprob(token: TokenLogprob) -> dict:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def _logprobs(content: list[dict]) -> dict | None:
    return {"content": content, "refusal": None} if content else None
