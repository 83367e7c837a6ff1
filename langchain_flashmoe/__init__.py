"""The LangChain integration of flashmoe: `ChatFlashMoE(model="flashmoe-demo").invoke("Hello!")`.

It is a thin layer over `flashmoe.engine`. Neither importing it nor creating a model loads weights.
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
