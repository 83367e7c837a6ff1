"""The LangChain chat model: `ChatFlashMoE(model="flashmoe-demo").invoke("Hello!")`.

A thin layer over `flashmoe.engine`. Importing it, or making a model, loads no weights.
"""

from .chat_models import ChatFlashMoE
from .errors import (
    ContextOverflow,
    IncompleteOutput,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    RequestTimeout,
)

__all__ = [
    "ChatFlashMoE",
    "ContextOverflow",
    "IncompleteOutput",
    "InvalidRequest",
    "ModelFailed",
    "ModelNotFound",
    "RequestTimeout",
]
