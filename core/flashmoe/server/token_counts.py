"""Counts and shows tokens without the engine: `/v1/messages/count_tokens` and `/tokenize`."""

from __future__ import annotations

from ..chat.token_counter import TokenCounter, token_counter
from ..requests import Request
from .json_body import parse_object
from .openai_errors import ApiError, invalid_field
from .openai_request import checked_call
from .served_model import ServedModel, ServedModels


def counter(model: ServedModel) -> TokenCounter:
    """Return the token counter of a model.

    Raises:
        ApiError: 501; the server was made without the path of the checkpoint.
    """
    if model.path is None:
        raise ApiError(501, "this server does not know the checkpoint's tokenizer")
    return token_counter(model.path)


def count_prompt(model: ServedModel, request: Request) -> int:
    """Return the number of tokens of a request's prompt.

    Raises:
        SettingError: the messages or tools cannot be used.
    """
    return counter(model).count(request.messages, request.tools, request.think)


def tokenize(body: bytes, models: ServedModels) -> dict:
    """Return the tokens of a text (`content`, or `prompt`), or the number of those of messages.

    Raises:
        ApiError: 400, or 404 for a model that is not served.
    """
    fields = parse_object(body)
    fields.setdefault("model", models.first.name)
    if fields.get("messages") is not None:
        known = {name: fields[name] for name in ("model", "messages", "tools") if name in fields}
        call = checked_call(known, models)
        count = count_prompt(call.model, call.request)
        return {"count": count, "max_model_len": call.model.context}
    name = "prompt" if fields.get("content") is None else "content"
    text = fields.get(name)
    if not isinstance(text, str):
        raise invalid_field("content", "content is missing: give a text, or messages")
    if not isinstance(fields["model"], str):
        raise invalid_field("model", "model must be text")
    model = models.find(fields["model"])
    tokens = counter(model).encode(text)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": model.context}
