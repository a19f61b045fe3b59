"""The access log, over HTTP without Ray."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cluster.machine import free_port
from serve.http import access_log
from serve.http.app import build_app
from serve.replicas import TextReplica
from tests.support import bundles, local_server
from tests.support.fakes import FailingModel, LocalModel


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a text model."""
    folder = bundles.tiny_gpt_bundle(tmp_path_factory.mktemp("access_log") / "gpt")

    async def build() -> FastAPI:
        text = TextReplica(slots=4, threads=1, timeout_s=60)
        await text.reconfigure({"uri": str(folder)})
        return build_app(LocalModel(text), None)

    with local_server.running(build, free_port()) as url:
        yield url


def logged(records: list[logging.LogRecord]) -> list[dict[str, Any]]:
    return [
        json.loads(record.getMessage())
        for record in records
        if record.name == access_log.logger.name
    ]


def ask(
    server: str, caplog: pytest.LogCaptureFixture, method: str, path: str, **options: Any
) -> tuple[httpx.Response, dict[str, Any]]:
    """Return the response to a request, and its line in the access log."""
    caplog.clear()
    with caplog.at_level(logging.INFO, access_log.logger.name):
        response = httpx.request(method, f"{server}{path}", **options)
        deadline = time.monotonic() + 10
        # The line is written after the response has been sent.
        while not logged(caplog.records) and time.monotonic() < deadline:
            time.sleep(0.01)
        (line,) = logged(caplog.records)
    return response, line


@pytest.mark.parametrize("stream", [False, True])
def test_access_log_has_one_line_per_request_without_prompt(
    server: str, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = {"prompt": "SECRET", "max_tokens": 5, "stream": stream}
    response, line = ask(
        server,
        caplog,
        "POST",
        "/v1/completions?also=SECRET",
        json=body,
        headers={"X-Request-ID": "mine/1=2"},
    )
    assert response.headers.get_list("x-request-id") == ["mine/1=2"]
    seconds, when = line.pop("seconds"), datetime.fromisoformat(line.pop("time"))
    assert 0 < seconds < 60
    assert when.utcoffset() == timedelta(0)
    assert line == {
        "request_id": "mine/1=2",
        "client": "127.0.0.1",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "tokens": 5,
        "key_id": None,
    }


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "caf\xe9"])
def test_malformed_request_id_is_replaced(
    server: str, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    response, line = ask(
        server, caplog, "GET", "/health", headers={"X-Request-ID": given.encode("latin-1")}
    )
    assert response.headers["x-request-id"] == line["request_id"]
    assert re.fullmatch("[0-9a-f]{32}", line["request_id"])


def test_failed_requests_are_logged(server: str, caplog: pytest.LogCaptureFixture) -> None:
    response, line = ask(server, caplog, "GET", "/SECRET")
    assert (response.status_code, line["status"], line["route"]) == (404, 404, None)
    _, line = ask(server, caplog, "POST", "/v1/completions", content=b"{")
    assert (line["status"], line["route"], line["tokens"]) == (422, "/v1/completions", None)


def test_crash_is_logged_with_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(
            build_app(FailingModel(RuntimeError("secret")), None), raise_app_exceptions=False
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/health", headers={"X-Request-ID": "mine"})

    with caplog.at_level(logging.INFO):
        response = asyncio.run(go())
    (line,) = logged(caplog.records)
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert (line["status"], line["request_id"]) == (500, "mine")
    assert "GET /health crashed (request mine)" in caplog.text


def test_client_that_disconnects_before_the_response_is_logged_with_499(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def forever(*_: Any) -> Any:
        await asyncio.sleep(600)

    async def go() -> None:
        scope = {"type": "http", "method": "POST", "headers": []}
        app = access_log.AccessLog(forever)
        request = asyncio.create_task(app(scope, forever, forever))
        await asyncio.sleep(0)
        request.cancel()  # as Ray Serve does
        with pytest.raises(asyncio.CancelledError):
            await request

    with caplog.at_level(logging.INFO, access_log.logger.name):
        asyncio.run(go())
    (line,) = logged(caplog.records)
    assert (line["status"], line["client"], line["route"]) == (access_log.CLIENT_GONE, None, None)
