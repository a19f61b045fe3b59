"""The API against its OpenAPI description and OpenAI's client, over HTTP without Ray."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2  # used by OpenAI's client
import openai
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import settings
from PIL import Image
from schemathesis.config import SchemathesisConfig

from cluster.machine import free_port
from models import registry
from serve.errors import Overloaded, Unavailable
from serve.http.app import build_app
from serve.http.catalog import Catalog
from serve.replicas import ImageReplica, TextReplica
from tests.support import bundles, local_server
from tests.support.fakes import FailingModel, LocalModel


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
    """The URL of a server with the two models."""

    async def build() -> FastAPI:
        text, images = TextReplica(slots=4, threads=1, timeout_s=60), ImageReplica(threads=1)
        await text.reconfigure({"uri": registry.resolve(root, "gpt")[2]})
        await images.reconfigure({"uri": registry.resolve(root, "dcgan")[2]})
        return build_app(LocalModel(text), LocalModel(images), catalog=Catalog())

    with local_server.running(build, free_port()) as url:
        yield url


# ---- the OpenAPI description


# A request that the description allows never gets 422. 400 and 413 depend on the model (its
# classes, its context), 504 on `timeout_s`.
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
def test_every_response_is_as_described(case: schemathesis.Case, server: str) -> None:
    case.call_and_validate(base_url=server)


# ---- OpenAI's client


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="there are no keys yet", max_retries=0)


def test_openai_client_completes_text(client: openai.OpenAI, golden: dict[str, Any]) -> None:
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


def test_openai_client_streams_text_with_usage(
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


def test_openai_client_generates_images(client: openai.OpenAI) -> None:
    generated = client.images.generate(model="dcgan", prompt="class 2", n=2, extra_body={"seed": 7})
    assert generated.data is not None
    pngs = [base64.b64decode(image.b64_json or "") for image in generated.data]
    assert [
        (Image.open(io.BytesIO(png)).format, Image.open(io.BytesIO(png)).size) for png in pngs
    ] == [("PNG", (28, 28))] * 2
    alone = client.images.generate(prompt="Class 2", extra_body={"seed": 7})
    assert alone.data is not None
    assert alone.data[0].b64_json == generated.data[0].b64_json


def test_openai_client_lists_models(client: openai.OpenAI) -> None:
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
def test_openai_client_raises_its_exceptions(
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


def test_openai_client_raises_its_exceptions_for_images(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="this model generates 28x28") as raised:
        client.images.generate(prompt="", size="1024x1024")
    assert raised.value.param == "size"


def in_memory(error: Exception) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(
        transport=httpx2.ASGITransport(
            build_app(FailingModel(error), None), raise_app_exceptions=False
        )
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
def test_openai_client_sees_when_to_retry(
    failure: Exception, error: type[openai.APIStatusError]
) -> None:
    async def go() -> None:
        with pytest.raises(error) as raised:
            await in_memory(failure).completions.create(model="gpt", prompt="")
        assert ("retry-after" in raised.value.response.headers) == (
            not isinstance(failure, RuntimeError)
        )

    asyncio.run(go())


def test_openai_client_raises_if_a_stream_fails() -> None:
    async def go() -> None:
        messages = await in_memory(Unavailable("away: try again")).completions.create(
            model="gpt", prompt="", stream=True
        )
        assert (await anext(messages)).choices[0].text == "To be"
        with pytest.raises(openai.APIError, match="away: try again"):
            await anext(messages)

    asyncio.run(go())


# ---- status


def test_status_shows_latency(server: str) -> None:
    httpx.post(f"{server}/generate", json={})
    status = httpx.get(f"{server}/status").json()
    assert status["deployments"] == {}, "without Ray there are no replicas"
    image = status["latency_ms"]["image"]
    assert 0 < image["p50"] <= image["p99"] < 60_000
