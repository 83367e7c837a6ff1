"""Define the options of a model and of each call. Unknown names are refused."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flashmoe.requests import RANGES

from .errors import InvalidRequest


def _in_range(name: str) -> Any:
    _, low, high = RANGES[name]
    return Field(default=None, ge=low, le=high)


class Options(BaseModel):
    """The options of a model that each call may override: `model.invoke("Hi", temperature=0)`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_tokens: int | None = _in_range("max_tokens")
    """Generate at most this many tokens, reasoning included. `None`: 4096, or fewer if less of the
    context is left."""

    temperature: float | None = _in_range("temperature")
    """Randomness, 0 to 100; 0 always picks the likeliest token. `None`: the value in the model's
    generation_config.json."""

    top_p: float | None = _in_range("top_p")
    """Sample from the likeliest tokens with this total probability, 0 to 1."""

    top_k: int | None = _in_range("top_k")
    """Sample from this many of the likeliest tokens; 0 means all tokens."""

    min_p: float | None = _in_range("min_p")
    """Leave out tokens less likely than the likeliest one times this value, 0 to 1."""

    repetition_penalty: float | None = _in_range("repetition_penalty")
    """A value above 1 makes the last 20 tokens less likely to repeat; 0.01 to 100."""

    presence_penalty: float | None = _in_range("presence_penalty")
    """Is subtracted from the logit of each token that the answer has already, -2 to 2. Qwen's
    makers recommend 1.5 where a model repeats itself."""

    frequency_penalty: float | None = _in_range("frequency_penalty")
    """Is subtracted from the logit of a token for each time that the answer has it, -2 to 2."""

    logit_bias: dict[int, float] | None = None
    """Numbers that are added to the logits of tokens, by token id, -100 to 100."""

    logprobs: bool | None = None
    """Put the log probability of each token of the text into `response_metadata["logprobs"]`, in
    OpenAI's form."""

    top_logprobs: int | None = Field(default=None, ge=0, le=RANGES["logprobs"][2])
    """Also the log probabilities of this many of the likeliest tokens in its place, at most 20."""

    seed: int | None = _in_range("seed")
    """The same seed gives the same text. `None`: another text each time, unless `temperature` is
    0."""

    reasoning: bool | None = None
    """Reason before the answer; the reasoning is in `additional_kwargs["reasoning_content"]`.
    `None`: as the model's template does."""

    thinking_budget: int | None = _in_range("thinking_budget")
    """End the reasoning after this many tokens, and answer."""

    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the model's chat template, such as `{"preserve_thinking": True}`."""

    experts: int | None = Field(default=None, ge=1)
    """Use only the top K experts of the router: fewer bytes are read, but the answer is not exact.
    `None`: the K of training, or the K of the model's name."""

    prompt_cache: bool = True
    """Keep the conversation in the prompt cache, so that its next turn processes only new tokens.
    (`cache` is LangChain's cache of answers.)"""

    timeout: float | None = Field(default=None, gt=0)
    """Seconds for the complete answer, time in the queue included. Then `RequestTimeout` is
    raised."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys()
        for name in values.keys() - known:
            near = get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(sorted(known))}"
            raise ValueError(f"{name!r} is not a known option: {hint}")
        return values


#: The options that `flashmoe.requests.Request` has under the same names.
REQUEST_OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias"),
    *("seed", "thinking_budget", "chat_template_kwargs"),
)


class CallOptions(Options):
    """All options of one call."""

    model: str
    """A name, an alias, or the directory of a checkpoint."""

    stop: list[str] = Field(default_factory=list)
    """Stop strings: the answer ends before the first of them."""

    tools: list[Any] = Field(default_factory=list)
    """Tools, in any of LangChain's forms."""

    tool_choice: Any = None
    """See `ChatFlashMoE.bind_tools`."""

    parallel_tool_calls: bool | None = None
    """`False` allows at most one tool call in an answer."""

    response_format: Any = None
    """A schema, or a dict as in OpenAI's API; see `flashmoe.requests.Request`."""

    on_incomplete: Literal["raise", "return"] = "raise"
    """Whether a structured answer that is cut short, or does not fit its schema, is raised as an
    error or returned as it is."""

    strict: bool | None = None
    """Has no effect, since schemas are always enforced; accepted because other models take it."""

    stream: bool | None = None
    """An option of LangChain: whether to stream inside `invoke`."""

    @field_validator("tools", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return [] if value is None else value

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported with each; None: no probabilities."""
        asked = bool(self.top_logprobs) if self.logprobs is None else self.logprobs
        return self.top_logprobs or 0 if asked else None

    @classmethod
    def merge(
        cls, model: Options, stop: list[str] | str | None, overrides: dict[str, Any]
    ) -> CallOptions:
        """Return the options of a call: those of the model, overridden by those of the call.

        Args:
            stop: stop strings of the call, which are added to those of the model.
            overrides: the other options of the call.

        Raises:
            InvalidRequest: an option is unknown, or its value is not allowed.
        """
        own = {name: getattr(model, name) for name in (*Options.model_fields, "model", "stop")}
        given = {name: value for name, value in overrides.items() if name != "stop"}
        stops = [*(own["stop"] or []), *([stop] if isinstance(stop, str) else stop or [])]
        try:
            return cls(**(own | given | {"stop": list(dict.fromkeys(stops))}))
        except ValidationError as e:
            raise InvalidRequest(_error_text(e)) from e


def _error_text(error: ValidationError) -> str:
    """Return pydantic's errors in one line, with the values."""
    texts = []
    for detail in error.errors(include_url=False):
        where = ".".join(map(str, detail["loc"]))
        message = detail["msg"].removeprefix("Value error, ")
        texts.append(f"{where}={detail['input']!r}: {message}" if where else message)
    return "; ".join(texts)
