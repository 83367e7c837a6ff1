"""Anthropic's Messages API as an API of the server, and the count of its tokens."""

from __future__ import annotations

from .api import Api, Call
from .json_body import parse_object
from .messages_answer import MessagesAnswer
from .messages_request import RENAMED, chat_fields, parsed
from .openai_request import checked_call
from .served_model import ServedModels
from .token_counts import count_prompt
from .wire import SSE_WITH_NAMES


def read_messages(body: bytes, models: ServedModels) -> Call:
    """Return the call of a body.

    Raises:
        ApiError: 400, or 404 for a model that is not served.
    """
    call = checked_call(chat_fields(parsed(parse_object(body))), models)
    return Call((call.request,), MessagesAnswer(call.model.name), call.stream)


def count_tokens(body: bytes, models: ServedModels) -> dict:
    """Return the number of tokens of a prompt.

    Raises:
        ApiError: 400, or 404 for a model that is not served.
    """
    call = checked_call(chat_fields(parsed(parse_object(body), count=True)), models)
    return {"input_tokens": count_prompt(call.model, call.request)}


MESSAGES = Api("/v1/messages", read_messages, SSE_WITH_NAMES, RENAMED)
