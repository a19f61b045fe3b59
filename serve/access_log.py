"""The access log: one JSON line for each HTTP request, with its id. Plain ASGI and `logging`; no prompt and no query is in it.

{"time": "2000-01-01T00:00:00.000+00:00", "request_id": "4f1c...", "client": "127.0.0.1", "method": "POST",
 "route": "/v1/completions", "status": 200, "seconds": 0.1234, "tokens": 60, "key_id": null}
"""

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WELL_FORMED = re.compile(r"[!-~]{1,128}")  # what is visible in ASCII
CLIENT_GONE = 499  # nginx's code: the client went before there was a status to send

logger = logging.getLogger("raykiln.access")


class AccessLog:
    """Logs every request once it has ended.

    A client's X-Request-ID is taken over where it is well-formed. The routes find it as `request.state.request_id`, and tell
    the tokens that they generate in `request.state.tokens`.

    Args:
        app: the whole application, its error handlers included.
        gives_id_back: with every response; False behind a proxy that does.
    """

    def __init__(self, app: ASGIApp, gives_id_back: bool = True) -> None:
        self.app, self.gives_id_back = app, gives_id_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state.update(request_id=_request_id(scope), tokens=None)
        started, status = time.perf_counter(), CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.gives_id_back:
                    MutableHeaders(scope=message)["X-Request-ID"] = state["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            logger.info(json.dumps(_line(scope, status, time.perf_counter() - started)))


def to_stdout() -> None:
    """Lets this process write its access log to stdout, which Ray keeps among its logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if WELL_FORMED.fullmatch(given) else uuid.uuid4().hex


def _line(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": scope["state"]["request_id"],
        "client": scope["client"][0] if scope.get("client") else None,
        "method": scope["method"],
        "route": getattr(
            scope.get("route"), "path", None
        ),  # as it is declared: an unknown path may hold anything
        "status": status,
        "seconds": round(seconds, 4),
        "tokens": scope["state"]["tokens"],
        "key_id": None,  # there are no keys yet
    }
