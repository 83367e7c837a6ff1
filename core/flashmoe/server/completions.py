"""OpenAI's completions as an API of the server: a text is continued, without a chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import OutputError
from ..events import End, Event, Reasoning, Text
from .api import Answer, Api, Call, check_cut_short, new_id
from .field_checks import Check, check_flag, check_integer, check_text, ignored, of_type, one_of
from .json_body import parse_object
from .openai_errors import invalid_field, short_repr
from .openai_request import checked_call
from .openai_response import usage
from .request_fields import FIELDS as CHAT_FIELDS
from .served_model import ServedModels
from .token_counts import counter

#: Fields that mean what they mean in chat completions.
_SAME: tuple[str, ...] = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "experts"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("stream", "stream_options"),
)
#: The most answers of one call.
MAX_ANSWERS = 16

FIELDS: dict[str, Check] = {
    **{name: CHAT_FIELDS[name] for name in _SAME},
    "prompt": of_type((str, list), "text, tokens, or a list of these"),
    "suffix": check_text,
    "echo": check_flag,
    "n": check_integer,
    "best_of": one_of(1, way_out="leave it out"),
    "logprobs": one_of(0, way_out="leave it out"),
    "user": ignored,
}


class Completions(Answer):
    """The answers to one call, as text_completion objects.

    Args:
        model: name of the model in the answer.
        before: texts that the answers repeat before their own.
        include_usage: whether the stream ends with a chunk that holds only the usage.
    """

    def __init__(self, model: str, before: Sequence[str], *, include_usage: bool = False):
        self._head: dict[str, Any] = {"id": new_id("cmpl-"), "object": "text_completion"}
        self._head |= {"created": int(time.time()), "model": model}
        self._before = before
        self._texts: list[list[str]] = [[text] if text else [] for text in before]
        self._ends: dict[int, End] = {}
        self._include_usage = include_usage

    def first_chunks(self) -> list[dict]:
        return [self._chunk(i, text) for i, text in enumerate(self._before) if text]

    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        # Without a chat template, what looks like reasoning is text.
        if isinstance(event, Text | Reasoning):
            self._texts[index].append(event.text)
            return [self._chunk(index, event.text)]
        if isinstance(event, End):
            self._ends[index] = event
            last = self._chunk(index, "", _reason(event))
            return [last | {"flashmoe": event.figures()}]
        return []

    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        check_cut_short(error)
        assert error.end is not None, "an answer that was cut short has its end"
        return self.chunks(error.end, index)

    def last_chunks(self) -> list[dict]:
        return [self._head | {"choices": [], "usage": self._usage()}] if self._include_usage else []

    def to_dict(self) -> dict:
        choices = [
            _choice(i, "".join(texts), _reason(self._ends[i]))
            for i, texts in enumerate(self._texts)
        ]
        figures = self._ends[0].figures()
        return self._head | {"choices": choices, "usage": self._usage(), "flashmoe": figures}

    def _chunk(self, index: int, text: str, reason: str | None = None) -> dict:
        return self._head | {"choices": [_choice(index, text, reason)]}

    def _usage(self) -> dict:
        total: dict[str, Any] = {}
        for counts in (usage(end) for end in self._ends.values()):
            for name, value in counts.items():
                if isinstance(value, int):
                    total[name] = total.get(name, 0) + value
        return total


def _choice(index: int, text: str, reason: str | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _reason(end: End) -> str:
    return "length" if end.finish_reason == "length" else "stop"


def read_completions(body: bytes, models: ServedModels) -> Call:
    """Return the call of a body.

    Raises:
        ApiError: 400, or 404 for a model that is not served.
        SettingError: a suffix cannot be used with this model.
    """
    fields = parse_object(body)
    for name, value in fields.items():
        if name not in FIELDS:
            raise invalid_field(
                name[:120], f"{short_repr(name)} is not a known field: leave it out"
            )
        if value is not None:
            FIELDS[name](name, value)
    if fields.get("prompt") is None:
        raise invalid_field("prompt", "prompt is missing", "missing_required_parameter")
    chat = {name: fields[name] for name in _SAME if name in fields}
    # The fields are checked as those of a chat completion; its message is not used.
    call = checked_call(chat | {"messages": [{"role": "user", "content": "x"}]}, models)
    prompts = _prompts(fields["prompt"])
    if suffix := fields.get("suffix"):
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise invalid_field("suffix", "suffix needs a prompt that is text, not tokens")
        prompts = [counter(call.model).infill(str(prompt), suffix) for prompt in prompts]
    n = fields.get("n") or 1
    if n < 1 or n * len(prompts) > MAX_ANSWERS:
        raise invalid_field(
            "n",
            f"n={short_repr(n)} for {len(prompts)} prompts: 1 to {MAX_ANSWERS} answers are made",
        )
    base, requests = call.request, []
    for prompt in prompts:
        for copy in range(n):
            seed = base.seed if base.seed is None else (base.seed + copy) % 2**64
            requests.append(replace(base, messages=[], prompt=prompt, seed=seed))
    echo = fields.get("echo") and not suffix
    before = [r.prompt if echo and isinstance(r.prompt, str) else "" for r in requests]
    answer = Completions(call.model.name, before, include_usage=call.include_usage)
    return Call(tuple(requests), answer, call.stream)


def _prompts(prompt: str | list) -> list[str | list[int]]:
    """Return the prompts of a field that may hold one or several, as texts or tokens."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = prompt if several and isinstance(prompt, list) else [prompt]
    for one in prompts:
        whole = isinstance(one, list) and all(type(token) is int for token in one)
        if not one or not (isinstance(one, str) or whole):
            raise invalid_field(
                "prompt", f"prompt has {short_repr(one)}: give a text that is not empty, or tokens"
            )
    return prompts


COMPLETIONS = Api("/v1/completions", read_completions)
