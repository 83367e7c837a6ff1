"""OpenAI's chat completions as an API of the server."""

from __future__ import annotations

import time

from .api import Api, Call, new_id
from .openai_request import read_call
from .openai_response import ChatCompletion
from .served_model import ServedModels


def read_chat(body: bytes, models: ServedModels) -> Call:
    """Return the call of a body.

    Raises:
        ApiError: see `read_call`.
    """
    call = read_call(body, models)
    answer = ChatCompletion(
        new_id("chatcmpl-"),
        int(time.time()),
        call.model.name,
        include_usage=call.include_usage,
        n=call.n,
    )
    return Call(call.requests, answer, call.stream)


CHAT_COMPLETIONS = Api("/v1/chat/completions", read_chat)
