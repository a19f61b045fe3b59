"""Errors that a client sees: each has a message, an HTTP status and a code of OpenAI's.

Between processes they travel as return values, not as raised exceptions: Ray would log a traceback
for an ordinary refusal.
"""

from typing import TypeVar

Result = TypeVar("Result")


class RequestError(Exception):
    """A request that gets no result; `str()` is the message for the client."""

    status = 400
    code: str | None = None
    param: str | None = None  # the field of the request that is at fault


def unwrap(result: Result | RequestError) -> Result:
    """Return a result, or raise it if it is an error."""
    if isinstance(result, RequestError):
        raise result
    return result


class UnknownModel(RequestError):
    status, code, param = 404, "model_not_found", "model"


class PromptBlocked(RequestError):
    status, code, param = 400, "content_filter", "prompt"


class ContextLengthExceeded(RequestError):
    status, code = 413, "context_length_exceeded"


class Overloaded(RequestError):
    """All slots are in use and the queue is full.

    `retry_after_s` becomes the Retry-After header.
    """

    status, code = 429, "overloaded"
    retry_after_s = 1


class DeadlineExceeded(RequestError):
    status, code = 504, "deadline_exceeded"


class Unavailable(RequestError):
    """No replica, or no storage, can answer at the moment."""

    status, code = 503, "unavailable"
    retry_after_s = 1


class GenerationFailed(RequestError):
    """An error of the server that affects this request only."""

    status, code = 500, "internal_error"


class InvalidValue(RequestError):
    """A well-formed value that the served model does not support."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])
