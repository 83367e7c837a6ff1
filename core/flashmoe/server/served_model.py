"""The model that the server offers, as clients see it."""

from __future__ import annotations

from dataclasses import dataclass

from .openai_errors import ApiError, short_repr


@dataclass(frozen=True)
class ServedModel:
    """Names and properties of the model that is served.

    Attributes:
        names: names that clients may ask for. Responses carry the first one.
        context: maximum number of tokens of prompt and answer together.
        thinks: whether the model can reason before its answer.
        created: when the model was loaded, in seconds since 1970.
    """

    names: tuple[str, ...]
    context: int
    thinks: bool
    created: int

    def check_name(self, name: str) -> None:
        """Refuse a name that the model does not have.

        Raises:
            ApiError: 404; the text gives the name to ask for.
        """
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {short_repr(name)} is not served here: ask for {self.names[0]!r}",
                param="model",
                code="model_not_found",
            )

    def model_object(self) -> dict:
        """Return the entry of the model in OpenAI's list of models."""
        return {
            "id": self.names[0],
            "object": "model",
            "created": self.created,
            "owned_by": "flashmoe",
            "aliases": list(self.names[1:]),
            "context_length": self.context,
        }
