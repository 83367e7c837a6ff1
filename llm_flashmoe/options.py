"""The options of a model: `llm -m flashmoe-demo -o NAME VALUE`."""

from __future__ import annotations

import json

from pydantic import Field, field_validator

import llm


class Options(llm.Options):
    """All are None unless the user sets them: llm logs what is set. Ranges are checked by the
    engine, whose errors name the way out."""

    max_tokens: int | None = Field(
        default=None,
        description="End the answer after so many tokens, thoughts included. "
        "Default: 4096, or what is left of the context",
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
    repetition_penalty: float | None = Field(
        default=None, description="Above 1: makes tokens of the last 20 less likely"
    )
    seed: int | None = Field(default=None, description="Same seed, same text")
    stop: list[str] | None = Field(
        default=None, description="End the answer before this text; a JSON list for several"
    )
    think: bool | None = Field(
        default=None, description="Think before the answer. Default: as the model does by itself"
    )
    thinking_budget: int | None = Field(
        default=None, description="Close the thought after so many tokens, and answer"
    )
    experts: int | None = Field(
        default=None,
        description="Prune the router to its top K experts: fewer bytes from the disk, "
        "not exact. Default: the K of training, or of the model's name",
    )
    memory: str | None = Field(
        default=None,
        description='Peak memory of the process, such as "8GB". '
        "Default: what the machine can spare",
    )
    io: str | None = Field(
        default=None,
        description='How experts are read: "buffered" leaves them in the page cache too, '
        '"uncached" and "direct" do not. Default: what `flashmoe bench disk` found, or direct',
    )
    activations: str | None = Field(
        default=None,
        description='"int8" rounds activations to 8 bits in the products of decode: faster on a '
        "CPU, not exact. Default: float32",
    )
    cache: bool | None = Field(
        default=None,
        description="Keep the state of the conversation, so that its next turn, also with "
        "llm -c, reads only what is new. Default: true",
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


#: Options that `flashmoe.requests.Request` has under the same name.
OF_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OF_REQUEST += ("seed", "think", "thinking_budget")
#: Options that an engine is made with.
OF_ENGINE = ("memory", "io", "activations", "experts")
