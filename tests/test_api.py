"""The API against its own description and against OpenAI's own client: real models behind a real server, no Ray."""

import asyncio
import base64
import io
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import httpx2  # what OpenAI's client is made of
import openai
import pytest
import schemathesis
import uvicorn
from hypothesis import settings
from PIL import Image
from schemathesis.config import SchemathesisConfig

from cluster.machine import free_port
from models import registry
from serve import access
from serve.catalog import Catalog
from serve.errors import Overloaded, Unavailable
from serve.ingress import build_app
from serve.latency import Latency
from serve.replicas import Pictures, Text
from serve.schemas import Percentiles
from tests.support import bundles
from tests.support.fakes import Failing, Here


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry: gpt/1 (context 64) and dcgan/1 (three classes)."""
    folder = tmp_path_factory.mktemp("api")
    root = str(folder / "models")
    registry.publish(root, "gpt", bundles.tiny_gpt_bundle(folder / "gpt"))
    registry.publish(root, "dcgan", bundles.tiny_gan_bundle(folder / "gan", num_classes=3))
    return root


@pytest.fixture(scope="module")
def golden(root: str) -> dict[str, Any]:
    return json.loads((Path(root) / "gpt/1/golden.json").read_text())


@pytest.fixture(scope="module")
def server(root: str) -> Iterator[str]:
    """The URL of the ingress over the two models."""
    started: list[uvicorn.Server] = []
    port = free_port()

    async def serve() -> None:
        text, pictures = Text(slots=4, threads=1, timeout_s=60), Pictures(threads=1)
        await text.reconfigure({"uri": registry.resolve(root, "gpt")[2]})
        await pictures.reconfigure({"uri": registry.resolve(root, "dcgan")[2]})
        app = build_app(Here(text), Here(pictures), catalog=Catalog())
        started.append(uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning")))
        await started[0].serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while not started or not started[0].started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    started[0].should_exit = True
    thread.join(20)


# ---- its own description


# What the description allows is never a 422. 400 and 413 are for what depends on the model: its classes, its context; 504 for `timeout_s`.
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "413", "429", "504"]},
    "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "504"]},
}
CONFIG = {"seed": 7, "checks": CHECKS}
schema = schemathesis.openapi.from_dict(
    build_app(None, None).openapi(), config=SchemathesisConfig.from_dict(CONFIG)
)


@schema.parametrize()
@settings(max_examples=20, derandomize=True, deadline=None)
def test_every_answer_is_as_described(case: schemathesis.Case, server: str) -> None:
    case.call_and_validate(base_url=server)


# ---- OpenAI's own client


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="there are no keys yet", max_retries=0)


def test_openais_client_completes_a_text(client: openai.OpenAI, golden: dict[str, Any]) -> None:
    answer = client.completions.create(
        model="gpt", prompt=golden["prompt"], max_tokens=golden["max_tokens"], temperature=0
    )
    assert (answer.model, answer.system_fingerprint) == ("gpt", "gpt/1")
    assert answer.choices[0].text == golden["text"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(golden["ids"]),
        golden["max_tokens"],
    )


def test_openais_client_streams_it_with_its_usage(
    client: openai.OpenAI, golden: dict[str, Any]
) -> None:
    *messages, usage = client.completions.create(
        model="gpt",
        prompt=golden["prompt"],
        max_tokens=golden["max_tokens"],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5},
    )
    assert "".join(message.choices[0].text for message in messages) == golden["text"]
    assert [message.choices[0].finish_reason for message in messages][-1] == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == golden["max_tokens"]


def test_openais_client_draws_pictures(client: openai.OpenAI) -> None:
    drawn = client.images.generate(model="dcgan", prompt="class 2", n=2, extra_body={"seed": 7})
    assert drawn.data is not None
    pngs = [base64.b64decode(picture.b64_json or "") for picture in drawn.data]
    assert [
        (Image.open(io.BytesIO(png)).format, Image.open(io.BytesIO(png)).size) for png in pngs
    ] == [("PNG", (28, 28))] * 2
    alone = client.images.generate(prompt="Class 2", extra_body={"seed": 7})
    assert alone.data is not None
    assert alone.data[0].b64_json == drawn.data[0].b64_json


def test_openais_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["gpt", "dcgan"]
    assert client.models.retrieve("dcgan").object == "model"
    with pytest.raises(
        openai.NotFoundError, match="model 'gtp' is not served here: use gpt or dcgan"
    ) as raised:
        client.models.retrieve("gtp")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("request_", "error", "param", "code"),
    [
        ({"model": "gtp"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature", None),
        ({"max_tokens": 65}, openai.APIStatusError, None, "context_length_exceeded"),
        ({"extra_body": {"best_of": 2}}, openai.UnprocessableEntityError, "best_of", None),
    ],
)
def test_openais_client_raises_its_own_exceptions(
    client: openai.OpenAI,
    request_: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    with pytest.raises(error) as raised:
        client.completions.create(
            **{"model": "gpt", "prompt": "To be", "stream": stream, **request_}
        )
    assert (raised.value.param, raised.value.code, raised.value.type) == (
        param,
        code,
        "invalid_request_error",
    )


def test_openais_client_raises_them_for_pictures(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="this model draws 28x28") as raised:
        client.images.generate(prompt="", size="1024x1024")
    assert raised.value.param == "size"


def in_memory(error: Exception) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(
        transport=httpx2.ASGITransport(build_app(Failing(error), None), raise_app_exceptions=False)
    )
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
    )


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Overloaded("full: try again"), openai.RateLimitError),
        (Unavailable("away: try again"), openai.InternalServerError),
        (RuntimeError("secret"), openai.InternalServerError),
    ],
)
def test_openais_client_knows_when_to_try_again(
    failure: Exception, error: type[openai.APIStatusError]
) -> None:
    async def go() -> None:
        with pytest.raises(error) as raised:
            await in_memory(failure).completions.create(model="gpt", prompt="")
        assert ("retry-after" in raised.value.response.headers) == (
            not isinstance(failure, RuntimeError)
        )

    asyncio.run(go())


def test_openais_client_raises_where_a_stream_breaks_off() -> None:
    async def go() -> None:
        messages = await in_memory(Unavailable("away: try again")).completions.create(
            model="gpt", prompt="", stream=True
        )
        assert (await anext(messages)).choices[0].text == "To be"
        with pytest.raises(openai.APIError, match="away: try again"):
            await anext(messages)

    asyncio.run(go())


# ---- what is seen of a request


def logged(records: list[logging.LogRecord]) -> list[dict[str, Any]]:
    return [
        json.loads(record.getMessage()) for record in records if record.name == access.logger.name
    ]


def ask(
    server: str, caplog: pytest.LogCaptureFixture, method: str, path: str, **options: Any
) -> tuple[httpx.Response, dict[str, Any]]:
    """The response, and the one line that the access log has about it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, access.logger.name):
        response = httpx.request(method, f"{server}{path}", **options)
        until = time.monotonic() + 10
        while (
            not logged(caplog.records) and time.monotonic() < until
        ):  # it is written once the response has gone
            time.sleep(0.01)
        (line,) = logged(caplog.records)
    return response, line


@pytest.mark.parametrize("stream", [False, True])
def test_the_access_log_has_a_line_a_request_without_its_prompt(
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
def test_a_request_id_that_is_not_well_formed_is_replaced(
    server: str, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    response, line = ask(
        server, caplog, "GET", "/health", headers={"X-Request-ID": given.encode("latin-1")}
    )
    assert response.headers["x-request-id"] == line["request_id"]
    assert re.fullmatch("[0-9a-f]{32}", line["request_id"])


def test_a_request_that_fails_is_logged_too(server: str, caplog: pytest.LogCaptureFixture) -> None:
    response, line = ask(server, caplog, "GET", "/SECRET")
    assert (response.status_code, line["status"], line["route"]) == (404, 404, None)
    _, line = ask(server, caplog, "POST", "/v1/completions", content=b"{")
    assert (line["status"], line["route"], line["tokens"]) == (422, "/v1/completions", None)


def test_a_crash_is_logged_and_has_its_id(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(
            build_app(Failing(RuntimeError("secret")), None), raise_app_exceptions=False
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/health", headers={"X-Request-ID": "mine"})

    with caplog.at_level(logging.INFO):
        response = asyncio.run(go())
    (line,) = logged(caplog.records)
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert (line["status"], line["request_id"]) == (500, "mine")
    assert "GET /health crashed (request mine)" in caplog.text


def test_a_client_that_goes_before_its_answer_is_logged_as_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def forever(*_: Any) -> None:
        await asyncio.sleep(600)

    async def go() -> None:
        scope = {"type": "http", "method": "POST", "headers": []}
        request = asyncio.create_task(access.AccessLog(forever)(scope, forever, forever))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        request.cancel()  # as Serve does
        with pytest.raises(asyncio.CancelledError):
            await request

    with caplog.at_level(logging.INFO, access.logger.name):
        asyncio.run(go())
    (line,) = logged(caplog.records)
    assert (line["status"], line["client"], line["route"]) == (access.CLIENT_GONE, None, None)


def test_percentiles_are_those_of_the_last_requests() -> None:
    latency = Latency()
    assert latency.percentiles_ms() == Percentiles(p50=None, p99=None)
    for milliseconds in range(2001):
        latency.add(milliseconds / 1000)
    assert latency.percentiles_ms() == Percentiles(p50=1500.5, p99=1990.01)  # of 1001 to 2000


def test_status_tells_how_long_requests_took(server: str) -> None:
    httpx.post(f"{server}/generate", json={})
    status = httpx.get(f"{server}/status").json()
    assert status["deployments"] == {}, "no Ray, no replicas"
    picture = status["latency_ms"]["picture"]
    assert 0 < picture["p50"] <= picture["p99"] < 60_000
