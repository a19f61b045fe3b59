"""The answers that are no: each a sentence for the client, with the HTTP status and code that the ingress gives it.

They travel between processes as values, not as raised exceptions: a refusal is an answer, and Ray would log a traceback.
"""

from typing import TypeVar

Answer = TypeVar("Answer")


class Rejected(Exception):
    """A request that is not served; `str()` is what the client reads."""

    status = 400
    code: str | None = None
    param: str | None = None  # the request's field that is to blame


def kept(answer: Answer | Rejected) -> Answer:
    """The answer; raises it where it is a refusal."""
    if isinstance(answer, Rejected):
        raise answer
    return answer


class UnknownModel(Rejected):
    status, code, param = 404, "model_not_found", "model"


class Blocked(Rejected):
    status, code, param = 400, "content_filter", "prompt"


class TooLong(Rejected):
    status, code = 413, "context_length_exceeded"


class Overloaded(Rejected):
    """Every slot is busy and the queue is full. `retry_after_s` goes into the Retry-After header."""

    status, code = 429, "overloaded"
    retry_after_s = 1


class DeadlineExceeded(Rejected):
    status, code = 504, "deadline_exceeded"


class Unavailable(Rejected):
    """Nothing can serve just now: a replica ended, or none is ready."""

    status, code = 503, "unavailable"
    retry_after_s = 1


class Failed(Rejected):
    """The server's own fault, at this request alone."""

    status, code = 500, "internal_error"


class WrongValue(Rejected):
    """A field that is well-formed, and yet not possible for the model that is served."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])
