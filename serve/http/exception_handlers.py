"""Error responses in OpenAI's shape, without tracebacks.

{"error": {"message", "type", "param", "code"}}
"""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from cluster import cli
from serve.errors import RequestError

ErrorBody = dict[str, dict[str, str | None]]

# Pydantic's types of errors that say that the body is not an object.
NOT_AN_OBJECT = ("missing", "dict_type", "model_type", "model_attributes_type")

logger = logging.getLogger(__name__)


def add_to(app: FastAPI) -> None:
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crashed)


def error_body(error: RequestError) -> ErrorBody:
    """Return the body of an error response."""
    return _body(error.status, str(error), error.param, error.code)


def _body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> ErrorBody:
    if status == 429:
        kind = "rate_limit_error"
    elif status < 500:
        kind = "invalid_request_error"
    else:
        kind = "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


CRASH = _body(500, "the server failed at this request, and its log says why")


async def _request_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse(error_body(error), error.status, headers)


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{http.method} {http.url.path} does not exist: see /docs"
    return JSONResponse(_body(error.status_code, message), error.status_code, error.headers)


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
    """Turn the first of pydantic's errors into a sentence: the field, its value, what is valid."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason, character = first["ctx"]["error"], first["loc"][-1]
        message = f"the body is not valid JSON: {reason} at character {character}"
        return JSONResponse(_body(400, message), 400)
    source, *loc = first["loc"]
    field: str | None
    if source == "path":
        field, siblings = str(loc[0]), list[str]()
    else:
        field, siblings = _field(loc, http.scope["endpoint"].__annotations__["body"])
    reason = first["msg"].removeprefix("Value error, ")
    if field is None and first["type"] in NOT_AN_OBJECT:
        message = (
            "the body must be a JSON object, sent with the header Content-Type: application/json"
        )
    elif field is None:
        message = reason
    elif first["type"] == "missing":
        message = f"the field {field} is missing: see /docs"
    elif first["type"] == "extra_forbidden":
        hint = cli.nearest(str(loc[-1]), siblings) or f": known are {', '.join(siblings)}"
        message = f"the field {_shown(field)} is unknown{hint}"
    else:
        message = f"{field} is {_shown(first['input'])}: {reason[0].lower()}{reason[1:]}"
    param = None if field is None else field.encode("ascii", "backslashreplace").decode()
    return JSONResponse(_body(422, message, param), 422)


def _shown(value: object) -> str:
    """Return a value that a client sent as short ASCII text, which can always be encoded."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _field(loc: list[int | str], body: type[BaseModel]) -> tuple[str | None, list[str]]:
    """Return the dotted name of an error's field, and the known fields beside it.

    The name is None if the error is about the body as a whole. After a field, pydantic's `loc`
    names a field of a nested model, a member of a union, or an index.
    """
    names: list[str] = []
    model = body
    for name in loc:
        names.append(str(name))
        nested = None
        if isinstance(name, str) and name in model.model_fields:
            nested = model.model_fields[name].annotation
        if not isinstance(nested, type) or not issubclass(nested, BaseModel):
            break
        model = nested
    return ".".join(names) or None, list(model.model_fields)
