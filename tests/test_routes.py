"""The ASGI application in memory, without Ray: models that fail, and the OpenAPI document."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.errors import GenerationFailed, Overloaded, Unavailable
from serve.http.app import build_app
from serve.http.catalog import Catalog
from serve.replicas import ImageReplica
from tests.support.fakes import FailingModel, LocalModel
from tests.support.served import events


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """Send one request to an application in memory."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def image_model(uri: str) -> LocalModel:
    replica = ImageReplica(threads=1)
    asyncio.run(replica.reconfigure({"uri": uri}))
    return LocalModel(replica)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full: try again"), 429, "rate_limit_error"),
        (Unavailable("away: try again"), 503, "server_error"),
        (GenerationFailed("this request could not be continued"), 500, "server_error"),
        (RuntimeError("secret"), 500, "server_error"),
    ],
)
def test_failure_of_a_model_is_an_error_response(error: Exception, status: int, kind: str) -> None:
    app = build_app(FailingModel(error), None)
    for method, path in (("POST", "/v1/completions"), ("GET", "/health"), ("GET", "/v1/models")):
        response = ask(app, method, path, json={} if method == "POST" else None)
        assert response.status_code == status
        assert response.json()["error"]["type"] == kind
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Unavailable("away: try again"), "away: try again"),
        (RuntimeError("secret"), "the server failed at this request, and its log says why"),
    ],
)
def test_failure_within_stream_is_its_last_message(error: Exception, message: str) -> None:
    response = ask(
        build_app(FailingModel(error), None), "POST", "/v1/completions", json={"stream": True}
    )
    first, last = events(response)
    assert first["choices"][0]["text"] == "To be"
    assert (last["error"]["message"], last["error"]["type"]) == (message, "server_error")


@pytest.mark.parametrize("error", [Unavailable("away: try again"), RuntimeError("secret")])
def test_unavailable_model_does_not_hide_the_other(registry_root: str, error: Exception) -> None:
    images = image_model(f"{registry_root}/dcgan/1")
    app = build_app(FailingModel(error), images)
    assert ask(app, "GET", "/health").json() == {"status": "ok", "models": ["dcgan/1"]}
    (model,) = ask(app, "GET", "/v1/models").json()["data"]
    assert (model["id"], model["providers"], model["quantization"]) == (
        "dcgan",
        ["CPUExecutionProvider"],
        None,
    )
    assert ask(app, "GET", "/v1/models/dcgan").json() == model
    # The unavailable model may be the one named gpt.
    for path in ("gpt", "gpt/sample", "gpt/versions", "gpt/versions/1/sample"):
        app = build_app(FailingModel(error), images, catalog=Catalog())
        refused = ask(app, "GET", f"/v1/models/{path}")
        assert refused.status_code == (503 if isinstance(error, Unavailable) else 500)


def test_bundle_outside_registry_has_no_versions(registry_root: str, tmp_path: Path) -> None:
    folder = shutil.copytree(f"{registry_root}/dcgan/1", tmp_path / "by-hand")
    app = build_app(None, image_model(str(folder)), catalog=Catalog())
    for path in ("versions", "versions/1/sample"):
        refused = ask(app, "GET", f"/v1/models/dcgan/{path}")
        assert refused.status_code == 404
        message = refused.json()["error"]["message"]
        assert "dcgan is served from a folder that is not in a registry" in message


def test_modality_that_is_not_served_is_not_found() -> None:
    for path in ("/v1/images/generations", "/generate"):
        response = ask(build_app(FailingModel(Unavailable("")), None), "POST", path, json={})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_openapi_describes_error_shape() -> None:
    document = ask(build_app(None, None), "GET", "/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            schemas = {
                status: answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                for status, answer in operation["responses"].items()
                if int(status) >= 400
            }
            assert set(schemas.values()) == {"Error"}, path
