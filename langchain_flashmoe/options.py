"""What a model and each call of it may be told. Unknown names are refused, with the known ones."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import InvalidRequest


class Options(BaseModel):
    """Options of a model that each call may override: `model.invoke("Hi", temperature=0)`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_tokens: int | None = Field(default=None, ge=1)
    """End the answer after so many tokens, thoughts included. `None`: 4096, or what is left of the
    context."""

    temperature: float | None = Field(default=None, ge=0)
    """Randomness; 0 picks the likeliest token each time. `None`: as the model's makers set it."""

    top_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from the likeliest tokens of this total probability."""

    top_k: int | None = Field(default=None, ge=0)
    """Sample from this many of the likeliest tokens; 0 is all."""

    min_p: float | None = Field(default=None, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one."""

    repetition_penalty: float | None = Field(default=None, ge=0)
    """Above 1: makes tokens of the last 20 less likely."""

    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Same seed, same text. `None`: another text each time, unless `temperature` is 0."""

    reasoning: bool | None = None
    """Think before the answer; the thought is `additional_kwargs["reasoning_content"]`. `None`: as
    the model does by itself."""

    thinking_budget: int | None = Field(default=None, ge=0)
    """Close the thought after so many tokens, and answer."""

    experts: int | None = Field(default=None, ge=1)
    """Prune the router to its top K experts: fewer bytes from the disk, not exact. `None`: the K of
    training, or of the model's name."""

    prompt_cache: bool = True
    """Keep the state of the conversation, so that its next turn reads only what is new. (`cache` is
    LangChain's cache of answers.)"""

    timeout: float | None = Field(default=None, gt=0)
    """Seconds for a whole answer, time in the queue included; then `RequestTimeout`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys()
        for name in values.keys() - known:
            near = get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{name!r} is not known: {hint}")
        return values


#: Options that `flashmoe.requests.Request` has under the same name.
OF_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OF_REQUEST += ("seed", "thinking_budget")


class Call(Options):
    """All that a call may be told."""

    model: str
    """A name, an alias, or the directory of a checkpoint."""

    stop: list[str] = Field(default_factory=list)
    """The answer ends before the first of these."""

    tools: list[Any] = Field(default_factory=list)
    """Tools in any of LangChain's forms."""

    tool_choice: Any = None
    """See `ChatFlashMoE.bind_tools`."""

    parallel_tool_calls: bool | None = None
    """False: one call at most."""

    response_format: Any = None
    """A schema, or a dict as OpenAI's API takes it: see `flashmoe.requests.Request`."""

    on_incomplete: Literal["raise", "return"] = "raise"
    """What to do with a structured answer that is cut short or does not fit its schema."""

    strict: bool | None = None
    """Accepted for code that passes it: schemas are always enforced."""

    stream: bool | None = None
    """LangChain's own: whether to stream inside `invoke`."""

    @field_validator("tools", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return [] if value is None else value

    @classmethod
    def of(cls, model: Options, stop: list[str] | str | None, overrides: dict[str, Any]) -> Call:
        """The options of a model with those of a call over them; stop strings of both.

        Raises:
            InvalidRequest
        """
        own = {name: getattr(model, name) for name in (*Options.model_fields, "model", "stop")}
        given = {name: value for name, value in overrides.items() if name != "stop"}
        stops = [*(own["stop"] or []), *([stop] if isinstance(stop, str) else stop or [])]
        try:
            return cls(**(own | given | {"stop": list(dict.fromkeys(stops))}))
        except ValidationError as e:
            raise InvalidRequest(_in_words(e)) from e


def _in_words(error: ValidationError) -> str:
    """Pydantic's faults in one line each, with the values."""
    lines = []
    for fault in error.errors(include_url=False):
        where = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{where}={fault['input']!r}: {message}" if where else message)
    return "; ".join(lines)
