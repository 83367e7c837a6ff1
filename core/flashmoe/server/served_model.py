"""The models that the server offers, as clients see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .openai_errors import ApiError, short_repr


@dataclass(frozen=True)
class ServedModel:
    """Names and properties of a model that is served.

    Attributes:
        names: names that clients may ask for. Responses carry the first one.
        context: maximum number of tokens of prompt and answer together.
        thinks: whether the model can reason before its answer.
        created: when the model was loaded, in seconds since 1970.
        experts: experts per token (K) of an answer that asks for no other; None: the engine's.
        tools: whether it can call tools.
        path: its checkpoint directory; None: tokens cannot be counted without the engine.
        max_tokens: the most tokens of an answer that has no limit of its own; None: what is left of
            the context.
    """

    names: tuple[str, ...]
    context: int
    thinks: bool
    created: int
    experts: int | None = None
    tools: bool = True
    path: Path | None = None
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """The first name, which responses carry."""
        return self.names[0]


class ServedModels:
    """The models of one server: one checkpoint under several names, with a K of their own.

    Args:
        models: at least one.
    """

    def __init__(self, models: Sequence[ServedModel]):
        self._models = tuple(models)

    def __iter__(self):
        return iter(self._models)

    @property
    def first(self) -> ServedModel:
        """The first of the models."""
        return self._models[0]

    def find(self, name: str) -> ServedModel:
        """Return the model that a client asks for. Ollama's tag "latest" may follow its name.

        Raises:
            ApiError: 404; the text gives the names to ask for.
        """
        for model in self._models:
            if name in model.names or name.removesuffix(":latest") in model.names:
                return model
        names = " or ".join(repr(model.name) for model in self._models)
        raise ApiError(
            404,
            f"the model {short_repr(name)} is not served here: ask for {names}",
            param="model",
            code="model_not_found",
        )
