"""The commands, as `flashmoe ...` and as `llm flashmoe ...`."""

from .main import cli

__all__ = ["cli"]
