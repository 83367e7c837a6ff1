"""The errors of `flashmoe`, as LangChain names them: each is caught by either name."""

from __future__ import annotations

from langchain_core import exceptions
from langchain_core.messages import AIMessage

from flashmoe import errors


class InvalidRequest(exceptions.ModelInvalidRequestError, errors.SettingError):
    """An argument, a message or a tool that cannot be used. Also a ValueError."""


class ContextOverflow(exceptions.ContextOverflowError, errors.ContextError):
    """The prompt is longer than the model's context."""


class ModelNotFound(exceptions.ModelNotFoundError, errors.CheckpointError):
    """There is no such model, or it is not on this disk; the text says how to get it."""


class RequestTimeout(exceptions.ModelTimeoutError, errors.TimedOut):
    """The answer was not whole within `timeout`."""


class ModelFailed(exceptions.ModelError, errors.FlashMoEError):
    """The model cannot be loaded or read: a corrupt checkpoint, too little memory."""


class IncompleteOutput(exceptions.OutputParserException, exceptions.ModelError, errors.OutputError):
    """A structured answer that is cut short or does not fit its schema.

    Attributes:
        raw_message: the answer as far as it came, with its usage; `llm_output` is its text.
    """

    def __init__(self, text: str, raw_message: AIMessage):
        super().__init__(text, llm_output=raw_message.text)
        self.raw_message = raw_message


def translated(error: errors.FlashMoEError) -> Exception:
    """The error that LangChain's users expect for one of the engine, but for an OutputError."""
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
