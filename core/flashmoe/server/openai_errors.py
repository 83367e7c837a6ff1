"""What a client of the server is told when something is wrong."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a client is told, as OpenAI's API tells it.

    Attributes:
        status: of HTTP.
        param: the field that is wrong. code: for programs, one of OpenAI's where it has one.
        headers: more of the answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict:
        """The JSON of the answer, and of the last event of a stream."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind.get(self.status, default)}
        return {"error": error | {"param": self.param, "code": self.code}}


def bad(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """The error of a field that is wrong."""
    return ApiError(400, message, param=param, code=code)


def shown(value: Any) -> str:
    """A value of a client's in a message: at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
