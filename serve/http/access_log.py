"""The access log: one JSON line per HTTP request, without prompts or query strings.

{"time": "2000-01-01T00:00:00.000+00:00", "request_id": "4f1c...", "client": "127.0.0.1",
 "method": "POST", "route": "/v1/completions", "status": 200, "seconds": 0.1234, "tokens": 60,
 "key_id": null}
"""

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WELL_FORMED = re.compile(r"[!-~]{1,128}")  # visible ASCII
CLIENT_GONE = 499  # nginx's code: the client disconnected before a status was sent

logger = logging.getLogger("raykiln.access")


class AccessLog:
    """ASGI middleware that logs every request once it has ended.

    A client's X-Request-ID is kept if it is well-formed. Routes read the ID from
    `request.state.request_id`, and store the number of generated tokens in `request.state.tokens`.

    Args:
        app: the whole application, including its error handlers.
        returns_request_id: add X-Request-ID to every response; False behind a proxy that does so.
    """

    def __init__(self, app: ASGIApp, returns_request_id: bool = True) -> None:
        self.app, self.returns_request_id = app, returns_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state.update(request_id=_request_id(scope), tokens=None)
        started, status = time.perf_counter(), CLIENT_GONE

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.returns_request_id:
                    MutableHeaders(scope=message)["X-Request-ID"] = state["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        finally:
            logger.info(json.dumps(_entry(scope, status, time.perf_counter() - started)))


def to_stdout() -> None:
    """Write this process's access log to stdout, which Ray keeps among its logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if WELL_FORMED.fullmatch(given) else uuid.uuid4().hex


def _entry(scope: Scope, status: int, seconds: float) -> dict[str, str | int | float | None]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": scope["state"]["request_id"],
        "client": scope["client"][0] if scope.get("client") else None,
        "method": scope["method"],
        # The route as declared, not the path: a path that matches no route may contain anything.
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "seconds": round(seconds, 4),
        "tokens": scope["state"]["tokens"],
        "key_id": None,  # reserved for API keys
    }
