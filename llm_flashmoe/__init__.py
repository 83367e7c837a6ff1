"""The llm plugin: `llm -m flashmoe-demo "prompt"`.

A thin layer over `flashmoe.engine`. Nothing heavy is imported before a prompt is run: every `llm`
command loads this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
import llm
from llm.parts import Message, ReasoningPart, StreamEvent, TextPart
from pydantic import Field, field_validator

from flashmoe import catalog
from flashmoe.errors import FlashMoEError


@llm.hookimpl
def register_models(register):
    for name in catalog.names():
        register(FlashMoE(name))


@llm.hookimpl
def register_commands(cli):
    from flashmoe.cli import cli as commands

    cli.add_command(commands, "flashmoe")


class UserError(llm.ModelError, click.ClickException):
    """Shown as `Error: ...` by `llm prompt` and by `llm chat`, which handles no other kind."""


class FlashMoE(llm.Model):
    """A checkpoint whose experts are read from disk as the router picks them."""

    can_stream = True

    class Options(llm.Options):
        max_tokens: int | None = Field(
            default=None, description="End the answer after so many tokens"
        )
        temperature: float | None = Field(
            default=None,
            description="Randomness, 0 or more; 0 picks the likeliest token each time. "
            "Default: as the model's makers set it",
        )
        top_p: float | None = Field(
            default=None, description="Sample from the likeliest tokens of this total probability"
        )
        top_k: int | None = Field(
            default=None, description="Sample from this many of the likeliest tokens; 0 is all"
        )
        min_p: float | None = Field(
            default=None,
            description="Leave out tokens less likely than this share of the likeliest one",
        )
        seed: int | None = Field(default=None, description="Same seed, same text")
        stop: list[str] | None = Field(
            default=None, description="End the answer before this text; a JSON list for several"
        )
        experts: int | None = Field(
            default=None,
            description="Prune the router to its top K experts: fewer bytes from the disk, "
            "less exact. Default: the K of training",
        )
        memory: str | None = Field(
            default=None,
            description='Peak memory of the process, such as "8GB". '
            "Default: what the machine can spare",
        )

        @field_validator("stop", mode="before")
        @classmethod
        def _text_or_list(cls, value):
            # The command line gives a string.
            if not isinstance(value, str):
                return value
            try:
                parsed = json.loads(value)
            except ValueError:
                return [value]
            return parsed if isinstance(parsed, list) else [value]

        @field_validator("memory", mode="before")
        @classmethod
        def _size(cls, value):
            return str(value) if isinstance(value, int) else value

    def __init__(self, name: str):
        self.model_id = name

    def __str__(self) -> str:
        return f"flashmoe: {self.model_id}"

    def execute(self, prompt, stream, response, conversation) -> Iterator[StreamEvent]:
        from flashmoe.engine import shared
        from flashmoe.events import End, Reasoning, Text
        from flashmoe.requests import Request

        options = prompt.options
        request = Request(
            messages=chat_messages(prompt.messages),
            stop=tuple(options.stop or ()),
            **{
                name: getattr(options, name)
                for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
            },
            experts=options.experts,
        )
        try:
            engine = shared(catalog.find(self.model_id), memory=options.memory)
            for event in engine.stream(request):
                if isinstance(event, End):
                    report(response, event, str(engine.path))
                elif isinstance(event, Reasoning):
                    yield StreamEvent(type="reasoning", chunk=event.text)
                elif isinstance(event, Text):
                    yield StreamEvent(type="text", chunk=event.text)
        except FlashMoEError as e:
            raise UserError(str(e)) from e


def chat_messages(messages: list[Message]) -> list[dict]:
    """llm's messages as a chat template takes them.

    Raises:
        UserError: a message holds what this model does not take.
    """
    found = []
    for message in messages:
        turn = {"role": message.role, "content": ""}
        for part in message.parts:
            if isinstance(part, TextPart):
                turn["content"] += part.text
            elif isinstance(part, ReasoningPart):
                turn["reasoning_content"] = turn.get("reasoning_content", "") + part.text
            else:
                raise UserError(
                    f"this conversation holds a {type(part).__name__}, and flashmoe takes text "
                    "only so far: start a new conversation"
                )
        found.append(turn)
    return found


def report(response, end, resolved: str) -> None:
    """Put the figures of an answer where llm logs them."""
    response.set_usage(
        input=end.prompt_tokens,
        output=end.generated_tokens,
        details={"reasoning_tokens": end.reasoning_tokens} if end.reasoning_tokens else None,
    )
    response.set_resolved_model(resolved)
    response.response_json = {
        "finish_reason": end.finish_reason,
        "tokens_per_second": round(end.tokens_per_second, 2),
        "time_to_first_token": round(end.prompt_seconds, 3),
        "experts": end.experts,
        "trained_experts": end.trained_experts,
        "bits": end.bits,
        "hit_rate": round(end.hit_rate, 4),
        "bytes_read": end.bytes_read,
        "io_wait_seconds": round(end.wait_seconds, 3),
        "peak_memory": end.peak_nbytes,
    }
