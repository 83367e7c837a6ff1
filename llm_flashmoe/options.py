"""Define the options of the models: `llm -m flashmoe-demo -o NAME VALUE`."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field, field_validator

import llm


class Options(llm.Model.Options):
    """The options of a model.

    All are None unless the user sets them, because llm logs the options that are set. The engine
    checks their ranges, and its errors say what is allowed.
    """

    max_tokens: int | None = Field(
        default=None,
        description="Generate at most this many tokens, reasoning included. "
        "Default: 4096, or fewer if less of the context is left",
    )
    temperature: float | None = Field(
        default=None,
        description="Randomness, 0 to 100; 0 always picks the likeliest token. "
        "Default: the value in the model's generation_config.json",
    )
    top_p: float | None = Field(
        default=None,
        description="Sample from the likeliest tokens with this total probability, 0 to 1",
    )
    top_k: int | None = Field(
        default=None,
        description="Sample from this many of the likeliest tokens; 0 means all tokens",
    )
    min_p: float | None = Field(
        default=None,
        description="Leave out tokens less likely than the likeliest one times this value, 0 to 1",
    )
    repetition_penalty: float | None = Field(
        default=None,
        description="A value above 1 makes the last 20 tokens less likely to repeat; 0.01 to 100",
    )
    presence_penalty: float | None = Field(
        default=None,
        description="Subtract this from the logit of each token that the answer has already, "
        "-2 to 2; 1.5 is what Qwen's makers recommend against repetition",
    )
    frequency_penalty: float | None = Field(
        default=None,
        description="Subtract this from the logit of a token for each time that the answer has it, "
        "-2 to 2",
    )
    logit_bias: dict | None = Field(
        default=None,
        description='Add numbers to the logits of tokens, by token id, as in {"1234": -100}',
    )
    seed: int | None = Field(default=None, description="The same seed gives the same text")
    stop: list[str] | None = Field(
        default=None,
        description="End the answer before this text; use a JSON list for several texts",
    )
    think: bool | None = Field(
        default=None, description="Reason before the answer. Default: as the model's template does"
    )
    thinking_budget: int | None = Field(
        default=None, description="End the reasoning after this many tokens, and answer"
    )
    chat_template_kwargs: dict | None = Field(
        default=None,
        description="More variables for the model's chat template, as in "
        '{"preserve_thinking": true}',
    )
    experts: int | None = Field(
        default=None,
        description="Use only the top K experts of the router: fewer bytes are read, but the "
        "answer is not exact. Default: the K of training, or the K of the model's name",
    )
    memory: str | None = Field(
        default=None,
        description='Peak memory of the process, such as "8GB". '
        "Default: what the machine can spare",
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of prompt and answer that memory is kept for; on a GPU longer ones are "
        "refused if they do not fit. Default: what is usual, or what fits",
    )
    io: str | None = Field(
        default=None,
        description='How experts are read: "buffered" also keeps them in the page cache, '
        '"uncached" and "direct" do not. Default: the fastest in `flashmoe bench disk`, or direct',
    )
    activations: str | None = Field(
        default=None,
        description='"int8" rounds activations to 8 bits during decode: faster on a CPU, but not '
        "exact. Default: float32",
    )
    cache: bool | None = Field(
        default=None,
        description="Keep the conversation in the prompt cache, so that its next turn, also with "
        "llm -c, processes only new tokens. Default: true",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _text_or_list(cls, value: Any) -> Any:
        # The command line passes a string.
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except ValueError:
            return [value]
        return parsed if isinstance(parsed, list) else [value]

    @field_validator("logit_bias", "chat_template_kwargs", mode="before")
    @classmethod
    def _text_or_dict(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


#: The options that `flashmoe.requests.Request` has under the same names.
REQUEST_OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias"),
    *("seed", "think", "thinking_budget", "chat_template_kwargs"),
)
#: The options that an engine is created with.
ENGINE_OPTIONS = ("memory", "context", "io", "activations", "experts")
