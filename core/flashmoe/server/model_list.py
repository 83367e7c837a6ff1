"""The list of models in the shapes that clients read."""

from __future__ import annotations

from .served_model import ServedModel, ServedModels


def model_object(model: ServedModel) -> dict:
    """Return the entry of a model in OpenAI's list of models."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "flashmoe",
        "aliases": list(model.names[1:]),
        "context_length": model.context,
    }


def model_list(models: ServedModels) -> dict:
    """Return the list of models."""
    return {"object": "list", "data": [model_object(model) for model in models]}
