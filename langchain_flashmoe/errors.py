"""Define errors that are both LangChain's and flashmoe's, so that they are caught as either."""

from __future__ import annotations

from langchain_core import exceptions
from langchain_core.messages import AIMessage

from flashmoe import errors


class InvalidRequest(exceptions.ModelInvalidRequestError, errors.SettingError):
    """Raised when an argument, a message or a tool cannot be used; it is also a ValueError."""


class ContextOverflow(exceptions.ContextOverflowError, errors.ContextError):
    """Raised when the prompt is longer than the model's context."""


class ModelNotFound(exceptions.ModelNotFoundError, errors.CheckpointError):
    """Raised when a model is unknown or not on this disk; the text says how to get it."""


class RequestTimeout(exceptions.ModelTimeoutError, errors.TimedOut):
    """Raised when the answer is not complete within `timeout`."""


class ModelFailed(exceptions.ModelError, errors.FlashMoEError):
    """Raised when the model cannot be loaded or read, as with too little memory."""


class IncompleteOutput(exceptions.OutputParserException, exceptions.ModelError, errors.OutputError):
    """Raised when a structured answer is cut short or does not fit its schema.

    Attributes:
        raw_message: the incomplete answer, with its usage; `llm_output` is its text.
    """

    def __init__(self, text: str, raw_message: AIMessage):
        super().__init__(text, llm_output=raw_message.text)
        self.raw_message = raw_message


def to_langchain_error(error: errors.FlashMoEError) -> Exception:
    """Return the LangChain error for an error of the engine.

    An OutputError has no such error: `IncompleteOutput` also needs the message.
    """
    if isinstance(error, exceptions.LangChainException):
        return error
    for ours, theirs in (
        (errors.ContextError, ContextOverflow),
        (errors.SettingError, InvalidRequest),
        (errors.TimedOut, RequestTimeout),
    ):
        if isinstance(error, ours):
            return theirs(str(error))
    return ModelFailed(str(error))
