"""Ollama's API, for programs that know no other: chat, tags, show and version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ..errors import OutputError
from ..events import End, Event, Reasoning, Text, ToolCall
from .api import Answer, Api, Call, check_cut_short
from .field_checks import (
    Check,
    check_fields,
    check_flag,
    check_list,
    check_object,
    ignored,
    of_type,
)
from .json_body import parse_object
from .model_list import iso_time
from .openai_errors import invalid_field, short_repr
from .openai_request import checked_call
from .request_fields import FIELDS as CHAT_FIELDS
from .served_model import ServedModel, ServedModels
from .wire import JSON_LINES

FIELDS: dict[str, Check] = {
    "model": CHAT_FIELDS["model"],
    "messages": check_list,
    "tools": check_list,
    "format": of_type((str, dict), "json or a JSON schema"),
    "options": check_object,
    "stream": check_flag,
    "think": of_type((bool, str), "true, false or an effort"),
    "experts": CHAT_FIELDS["experts"],
    "keep_alive": ignored,
    "logprobs": ignored,
    "truncate": ignored,
    "shift": ignored,
}
#: Options -> fields of chat completions. The other options are of llama.cpp's memory and threads.
_OPTIONS = {
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
}
RENAMED = {field: option for option, field in _OPTIONS.items()} | {"response_format": "format"}


class OllamaChat(Answer):
    """One answer of /api/chat.

    Args:
        name: name of the model in the answer.
        now: returns the time in seconds since 1970.
    """

    def __init__(self, name: str, now: Callable[[], float]):
        self._name = name
        self._now = now
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict] = []
        self._end: End | None = None

    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        if isinstance(event, Text):
            self._texts.append(event.text)
            return [self._line({"content": event.text})]
        if isinstance(event, Reasoning):
            self._thoughts.append(event.text)
            return [self._line({"content": "", "thinking": event.text})]
        if isinstance(event, ToolCall):
            if event.error is not None:
                # Clients see what the model wrote.
                return self.chunks(Text(event.text))
            function = {"name": event.name, "arguments": event.arguments}
            call = {"id": event.id, "function": {"index": event.index, **function}}
            self._calls.append(call)
            return [self._line({"content": "", "tool_calls": [call]})]
        if isinstance(event, End):
            self._end = event
        return []

    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        check_cut_short(error)
        assert error.end is not None, "an answer that was cut short has its end"
        return self.chunks(error.end)

    def last_chunks(self) -> list[dict]:
        return [self._line({"content": ""}) | self._last()]

    def failure_chunks(self, error: Any) -> list[dict]:
        return [{"error": str(error)}]

    def to_dict(self) -> dict:
        message: dict[str, Any] = {"content": "".join(self._texts)}
        if self._thoughts:
            message["thinking"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        return self._line(message) | self._last()

    def _line(self, message: dict) -> dict:
        message = {"role": "assistant"} | message
        now = iso_time(self._now())
        return {"model": self._name, "created_at": now, "message": message, "done": False}

    def _last(self) -> dict:
        end = self._end
        assert end is not None, "the answer has not ended"
        return {
            "done": True,
            "done_reason": "length" if end.finish_reason == "length" else "stop",
            "total_duration": round((end.prompt_seconds + end.seconds) * 10**9),
            "load_duration": 0,
            "prompt_eval_count": end.prompt_tokens,
            "prompt_eval_duration": round(end.prompt_seconds * 10**9),
            "eval_count": end.generated_tokens,
            "eval_duration": round(end.seconds * 10**9),
            "flashmoe": end.figures(),
        }


def ollama_api(now: Callable[[], float]) -> Api:
    """Return /api/chat; `now` returns the time in seconds since 1970."""

    def read(body: bytes, models: ServedModels) -> Call:
        fields = parse_object(body)
        check_fields(fields, FIELDS, ("model", "messages"))
        call = checked_call(_chat_fields(fields), models)
        stream = fields.get("stream") is not False
        return Call((call.request,), OllamaChat(fields["model"], now), stream)

    return Api("/api/chat", read, JSON_LINES, RENAMED)


def _chat_fields(fields: dict) -> dict:
    chat = {name: fields[name] for name in ("model", "tools", "experts") if name in fields}
    chat["messages"] = _messages(fields["messages"])
    for name, value in (fields.get("options") or {}).items():
        if name in _OPTIONS:
            chat[_OPTIONS[name]] = value
    if chat.get("max_tokens") in (-1, -2):
        del chat["max_tokens"]  # no limit
    if chat.get("seed") in (-1, 0):
        del chat["seed"]  # another answer each time
    think = fields.get("think")
    chat["reasoning_effort" if isinstance(think, str) else "think"] = think
    wanted = fields.get("format")
    if isinstance(wanted, dict):
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted}}
    elif wanted == "json":
        chat["response_format"] = {"type": "json_object"}
    elif wanted:
        raise invalid_field("format", f"format={short_repr(wanted)} must be json or a schema")
    return chat


def _messages(messages: list) -> list[Any]:
    """Return messages in the form of chat completions, in which calls and results have ids."""
    translated: list[Any] = []
    waiting: list[tuple[Any, str]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid_field("messages", f"message {index} is {short_repr(message)}")
        if message.get("images"):
            raise invalid_field(
                "messages", f"message {index} has images: these models take text only"
            )
        kept = {k: message[k] for k in ("role", "content", "tool_calls") if message.get(k)}
        if message.get("thinking"):
            kept["reasoning_content"] = message["thinking"]
        if isinstance(kept.get("tool_calls"), list):
            calls = [c if isinstance(c, dict) else {"function": c} for c in kept["tool_calls"]]
            calls = [{"id": f"call_{index}_{i}", **call} for i, call in enumerate(calls)]
            functions = [c.get("function") for c in calls]
            names = [f.get("name") if isinstance(f, dict) else None for f in functions]
            waiting = list(zip(names, (call["id"] for call in calls), strict=True))
            kept["tool_calls"] = calls
        if message.get("role") == "tool":
            kept["tool_call_id"] = message.get("tool_call_id") or _answered(message, waiting)
        translated.append(kept)
    return translated


def _answered(result: dict, waiting: list[tuple[Any, str]]) -> str | None:
    """Return the id of the call that a result belongs to: the first of its name, or the first."""
    name = result.get("tool_name") or result.get("name")
    place = next((i for i, (called, _) in enumerate(waiting) if called == name), 0)
    return waiting.pop(place)[1] if waiting else None


def version_object() -> dict:
    """Return the answer of /api/version. Clients compare the number with Ollama's own."""
    return {"version": "0.13.0", "flashmoe": version("llm-flashmoe")}


def tags(models: ServedModels) -> dict:
    """Return the answer of /api/tags."""
    return {"models": [_tag(model) for model in models]}


def show(body: bytes, models: ServedModels) -> dict:
    """Return the answer of /api/show.

    Raises:
        ApiError: 400, or 404 for a model that is not served.
    """
    fields = parse_object(body)
    name = fields.get("model") or fields.get("name")
    if not isinstance(name, str):
        raise invalid_field("model", "model is missing", "missing_required_parameter")
    model = models.find(name)
    can = [
        "completion",
        *(["tools"] if model.tools else []),
        *(["thinking"] if model.thinks else []),
    ]
    info = {"general.architecture": "moe", "moe.context_length": model.context}
    return {
        "modelfile": f"FROM {model.name}",
        "parameters": f"num_ctx {model.context}",
        "template": "",
        "details": _tag(model)["details"],
        "model_info": info,
        "capabilities": can,
        "modified_at": iso_time(model.created),
    }


def _tag(model: ServedModel) -> dict:
    files = model.path.glob("*.safetensors") if model.path is not None else ()
    details = {"parent_model": "", "format": "mlx", "family": "moe", "families": ["moe"]}
    details |= {"parameter_size": "", "quantization_level": ""}
    return {
        "name": f"{model.name}:latest",
        "model": f"{model.name}:latest",
        "modified_at": iso_time(model.created),
        "size": sum(file.stat().st_size for file in files),
        "digest": hashlib.sha256(model.name.encode()).hexdigest(),
        "details": details,
    }
