"""Errors of the server, in the form of each API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An error response: the HTTP status, and the JSON that OpenAI's API has for errors.

    Args:
        status: HTTP status code.
        message: text for the user, with the values that are wrong and the way out.
        param: name of the request field that is wrong; None if no single field is.
        code: error code for programs; one of OpenAI's where OpenAI has one.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """Return the JSON of the response, which is also the last event of a failed stream."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind.get(self.status, default)}
        return {"error": error | {"param": self.param, "code": self.code}}


#: Anthropic's names of errors by status.
_ANTHROPIC = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
_ANTHROPIC |= {504: "timeout_error"}


def anthropic_body(error: ApiError) -> dict:
    """Return an error as Anthropic's API has it."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(error.status, default)
    text = str(error) if error.param is None else f"{error.param}: {error}"
    return {"type": "error", "error": {"type": kind, "message": text}}


def body_for(path: str, error: ApiError) -> dict:
    """Return the JSON of an error in the form of the API to which a path belongs."""
    if path.startswith("/v1/messages"):
        return anthropic_body(error)
    if path.startswith("/api/"):
        return {"error": str(error)}  # Ollama's
    return error.body()


def invalid_field(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error (status 400) for a request field whose value cannot be used."""
    return ApiError(400, message, param=param, code=code)


def short_repr(value: Any) -> str:
    """Return the repr of a client's value for an error message, cut to 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
