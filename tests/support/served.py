"""A registry to serve, and requests to a server over HTTP."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from models import bundle, registry
from tests.support import bundles
from train.gpt.export import export_gpt

CONTEXT = 1024  # long enough to interrupt a text while it is generated
PROMPT = "Now is the winter"
UNTIL_S = 120.0  # for a busy machine


def publish(folder: Path) -> str:
    """Make a registry below `folder` and return its root.

    It holds gpt/1 with a context of `CONTEXT` tokens (production), gpt/2 with other weights and a
    short context, and dcgan/1 with three classes.
    """
    root = str(folder / "kiln" / "models")
    registry.publish(root, "gpt", _long_gpt_bundle(folder / "long"))
    registry.publish(root, "gpt", bundles.tiny_gpt_bundle(folder / "short"))
    registry.publish(root, "dcgan", bundles.tiny_gan_bundle(folder / "gan", num_classes=3))
    registry.alias(root, "gpt", registry.PRODUCTION, 1)
    return root


def _long_gpt_bundle(folder: Path) -> Path:
    folder.mkdir()
    tokenizer = bundles.tiny_tokenizer(folder.parent / "tokenizer.json")
    ids = np.array(tokenizer.encode(bundles.TEXT).ids)
    model = bundles.tiny_gpt(context=CONTEXT)
    bundles.learn(model, ids, steps=10)
    manifest = export_gpt(model, folder.parent / "tokenizer.json", ids, folder)
    bundle.write(folder, bundles.LINEAGE | manifest)
    return folder


def golden(root: str, version: int) -> dict[str, Any]:
    """Return golden.json of a version of gpt."""
    return json.loads((Path(root) / "gpt" / str(version) / "golden.json").read_text())


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition; fail after `UNTIL_S`."""
    deadline = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """Return the response to a request for text."""
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def serves(client: httpx.Client, reference: str) -> bool:
    """Return whether the server generates text with this version, such as gpt/2."""
    return complete(client, max_tokens=1)["system_fingerprint"] == reference


def stream(client: httpx.Client, **body: Any) -> list[Any]:
    """Return the messages of a streamed text."""
    with client.stream("POST", "/v1/completions", json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def events(response: httpx.Response) -> list[Any]:
    """Return the messages of a stream of server-sent events; [DONE] as a string."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [message if message == "[DONE]" else json.loads(message) for message in data]


def generate(client: httpx.Client, path: str = "generations", **body: Any) -> dict[str, Any]:
    """Return the response to a request for images."""
    response = client.post(f"/v1/images/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()
