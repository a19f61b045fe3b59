"""What went wrong, as an answer in OpenAI's shape: {"error": {"message", "type", "param", "code"}}. Never a traceback."""

import difflib
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.errors import Rejected

logger = logging.getLogger(__name__)


def add_to(app: FastAPI) -> None:
    app.add_exception_handler(Rejected, _rejected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crashed)


def refusal(error: Rejected) -> dict[str, Any]:
    return _error(error.status, str(error), error.param, error.code)


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = (
        "rate_limit_error"
        if status == 429
        else "invalid_request_error"
        if status < 500
        else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


CRASH = _error(500, "the server failed at this request, and its log says why")


async def _rejected(http: Request, error: Exception) -> Response:
    assert isinstance(error, Rejected)
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse(refusal(error), error.status, headers)


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{http.method} {http.url.path} does not exist: see /docs"
        if error.status_code in (404, 405)
        else str(error.detail)
    )
    return JSONResponse(_error(error.status_code, message), error.status_code, error.headers)


async def _crashed(http: Request, error: Exception) -> Response:
    logger.error(
        "%s %s crashed (request %s)",
        http.method,
        http.url.path,
        http.state.request_id,
        exc_info=error,
    )
    return JSONResponse(CRASH, 500)


async def _invalid(http: Request, error: Exception) -> Response:
    """Pydantic's list of errors as one sentence: the field (of the body or the path), its value, the way out."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(
            _error(
                400,
                f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}",
            ),
            400,
        )
    place, *loc = first["loc"]
    field, siblings = (
        (str(loc[0]), [])
        if place == "path"
        else _field(loc, http.scope["endpoint"].__annotations__["body"])
    )
    reason = first["msg"].removeprefix("Value error, ")
    if field is None:
        is_object = first["type"] not in (
            "missing",
            "dict_type",
            "model_type",
            "model_attributes_type",
        )
        message = (
            reason
            if is_object
            else "the body must be a JSON object, sent with the header Content-Type: application/json"
        )
    elif first["type"] == "missing":
        message = f"the field {field} is missing: see /docs"
    elif first["type"] == "extra_forbidden":
        message = f"the field {_shown(field)} is unknown{_nearest(str(first['loc'][-1]), siblings)}"
    else:
        message = f"{field} is {_shown(first['input'])}: {reason[0].lower()}{reason[1:]}"
    return JSONResponse(
        _error(422, message, field and field.encode("ascii", "backslashreplace").decode()), 422
    )


def _shown(value: Any) -> str:
    text = ascii(value)  # in ASCII, whatever the client sent: an error must be sendable
    return text if len(text) <= 80 else f"{text[:77]}..."


def _field(loc: list[int | str], body: type[BaseModel]) -> tuple[str | None, list[str]]:
    """The dotted name of the field that an error lies in (None: the body itself), and the fields that are known beside it.

    What follows a field in pydantic's `loc` names one of its nested model's, or else a member of a union, or an index.
    """
    names: list[str] = []
    model: Any = body
    for name in loc:
        names.append(str(name))
        nested = model.model_fields[name].annotation if name in model.model_fields else None
        if not isinstance(nested, type) or not issubclass(nested, BaseModel):
            break
        model = nested
    return ".".join(names) or None, list(model.model_fields)


def _nearest(field: str, known: list[str]) -> str:
    close = difflib.get_close_matches(field, known, n=1)
    return f": did you mean {close[0]}?" if close else f": known are {', '.join(known)}"
