"""The served endpoint over real HTTP: what the bundles recorded, streams, cancels, swaps under load, and bad requests."""

import asyncio
import base64
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cluster import storage
from cluster.machine import free_port
from models import bundle, registry
from serve import launch, replicas
from serve.__main__ import main
from serve.catalog import Catalog
from serve.deployments import Options
from serve.detokenize import spelled
from serve.errors import Failed, Overloaded, Unavailable
from serve.ingress import build_app
from serve.replicas import Pictures, Text
from serve.schemas import CompletionRequest, ImagesRequest
from serve.session import ImageSession, TextSession
from tests.support import bundles
from tests.support.fakes import Failing
from tests.support.paths import ROOT

CONTEXT = 1024  # long enough that a text can be cut off while it is written
PROMPT = "Now is the winter"


def long_gpt_bundle(folder: Path) -> Path:
    from train.gpt.export import export_gpt

    folder.mkdir()
    tokenizer = bundles.tiny_tokenizer(folder.parent / "tokenizer.json")
    ids = np.array(tokenizer.encode(bundles.TEXT).ids)
    model = bundles.tiny_gpt(context=CONTEXT)
    bundles.learn(model, ids, steps=10)
    bundle.write(
        folder, bundles.LINEAGE | export_gpt(model, folder.parent / "tokenizer.json", ids, folder)
    )
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry: gpt/1 with a long context, gpt/2 another model with a short one, dcgan/1 with three classes."""
    folder = tmp_path_factory.mktemp("bundles")
    root = str(folder / "kiln" / "models")
    registry.publish(root, "gpt", long_gpt_bundle(folder / "long"))
    registry.publish(root, "gpt", bundles.tiny_gpt_bundle(folder / "short"))
    registry.publish(root, "dcgan", bundles.tiny_gan_bundle(folder / "gan", num_classes=3))
    registry.alias(root, "gpt", registry.PRODUCTION, 1)
    return root


@pytest.fixture(scope="module")
def address() -> launch.Address:
    return launch.Address("127.0.0.1", free_port())


@pytest.fixture(scope="module")
def client(
    ray_address: str, root: str, address: launch.Address, command: Callable[..., Any]
) -> Iterator[httpx.Client]:
    """An HTTP client of the served registry."""
    launch.deploy(launch.choose(root), address, Options(max_replicas=1))
    with httpx.Client(base_url=f"http://127.0.0.1:{address.port}", timeout=60) as client:
        yield client
        down = command("serve", "down")
        assert (down.returncode, down.stdout) == (0, "taken off the cluster\n"), down.stderr
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def golden(root: str, version: int) -> dict[str, Any]:
    return json.loads((Path(root) / "gpt" / str(version) / "golden.json").read_text())


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[Any]:
    """The messages of an SSE stream; [DONE] as it is."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [message if message == "[DONE]" else json.loads(message) for message in data]


def serves(client: httpx.Client, reference: str) -> bool:
    return complete(client, max_tokens=1)["system_fingerprint"] == reference


def stream(client: httpx.Client, **body: Any) -> list[Any]:
    with client.stream("POST", "/v1/completions", json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def until(condition: Callable[[], Any]) -> None:
    deadline = (
        time.monotonic() + 120
    )  # for a machine that is busy with other things: it fails instead of hanging
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def engine(client: httpx.Client) -> dict[str, int]:
    return client.get("/v1/models").json()["data"][0]["engine"]


def draw(client: httpx.Client, path: str = "generations", **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/images/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def drawn(answer: dict[str, Any]) -> np.ndarray:
    """The pictures of an answer, (N, H, W)."""
    return np.stack([pixels(base64.b64decode(picture["b64_json"])) for picture in answer["data"]])


# ---- text


def test_greedy_text_is_the_bundles_golden_text(client: httpx.Client, root: str) -> None:
    recorded = golden(root, 1)
    answer = complete(
        client, prompt=recorded["prompt"], max_tokens=recorded["max_tokens"], temperature=0
    )
    assert answer["choices"][0]["text"] == recorded["text"]
    assert (answer["model"], answer["system_fingerprint"]) == ("gpt", "gpt/1")
    assert answer["usage"] == {
        "prompt_tokens": len(recorded["ids"]),
        "completion_tokens": recorded["max_tokens"],
        "total_tokens": len(recorded["ids"]) + recorded["max_tokens"],
    }


def test_a_stream_is_the_whole_in_pieces(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 400, "seed": 5, "temperature": 1.0}
    whole = complete(client, **body)
    *messages, usage, done = stream(client, **body, stream_options={"include_usage": True})
    assert (
        "".join(message["choices"][0]["text"] for message in messages)
        == whole["choices"][0]["text"]
    )
    assert len(messages) > 1
    assert [message["choices"][0]["finish_reason"] for message in messages] == [None] * (
        len(messages) - 1
    ) + ["length"]
    assert messages[0]["usage"] is None
    assert messages[-1]["usage"] == usage["usage"] == whole["usage"]
    assert usage["choices"] == []
    assert done == "[DONE]"


def test_a_seeds_text_is_the_same_alone_and_in_company(client: httpx.Client) -> None:
    async def together(requests: list[dict[str, Any]]) -> list[str]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
            responses = await asyncio.gather(
                *(many.post("/v1/completions", json=request) for request in requests)
            )
            return [response.json()["choices"][0]["text"] for response in responses]

    requests = [
        {
            "prompt": PROMPT[: seed % 5 * 4],
            "max_tokens": 30 + seed,
            "seed": seed,
            "temperature": 1.0,
        }
        for seed in range(12)
    ]
    alone = [complete(client, **request)["choices"][0]["text"] for request in requests]
    assert asyncio.run(together(requests)) == alone
    assert len(set(alone)) == len(alone)


def test_a_stop_string_ends_the_text_before_it(client: httpx.Client) -> None:
    whole = complete(client, prompt=PROMPT, max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = whole[12:15]
    answer = complete(client, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop])["choices"][
        0
    ]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_many_texts_with_probabilities_whole_and_streamed(client: httpx.Client) -> None:
    body = {
        "prompt": PROMPT,
        "max_tokens": 60,
        "seed": 5,
        "temperature": 1.0,
        "n": 3,
        "logprobs": 2,
        "repetition_penalty": 1.2,
    }
    whole = complete(client, **body)
    *messages, done = stream(client, **body)
    assert done == "[DONE]"
    for index, choice in enumerate(whole["choices"]):
        pieces = [
            message["choices"][0] for message in messages if message["choices"][0]["index"] == index
        ]
        assert choice["index"] == index
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [
            choice["finish_reason"]
        ]
        for what, told in choice["logprobs"].items():
            assert [one for piece in pieces for one in piece["logprobs"][what]] == told
    told = [len(choice["logprobs"]["tokens"]) for choice in whole["choices"]]
    assert messages[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == sum(told)
    assert (
        whole["usage"]["prompt_tokens"] == complete(client, prompt=PROMPT)["usage"]["prompt_tokens"]
    ), "the prompt counts once"
    assert len({choice["text"] for choice in whole["choices"]}) == 3
    assert complete(client, **{**body, "n": 1})["choices"] == whole["choices"][:1]


def test_a_request_that_takes_longer_than_it_may_is_ended(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"max_tokens": CONTEXT - 40, "timeout_s": 0.001})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "longer than 0.001 s" in response.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_frees_its_slot(client: httpx.Client, streamed: bool) -> None:
    before = engine(client)["generated"]
    texts = 16  # so that writing them takes far longer than Serve needs to tell the replica of a client that has gone
    body = {
        "prompt": PROMPT,
        "max_tokens": CONTEXT - 40,
        "temperature": 0,
        "stream": streamed,
        "n": texts,
    }
    if streamed:
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.1))
    until(lambda: engine(client)["running"] == 0)
    after = engine(client)["generated"]
    assert after - before < texts * (CONTEXT - 40), (
        "the texts were written to their end, for nobody"
    )
    assert engine(client)["generated"] == after


# ---- pictures


def test_a_seeds_picture_is_the_same_alone_and_among_many(client: httpx.Client) -> None:
    many, one = draw(client, n=5, seed=7), draw(client, n=1, seed=7)
    assert many["data"][0] == one["data"][0]
    assert len({picture["b64_json"] for picture in many["data"]}) == 5
    assert (many["seed"], many["model"]) == (7, "dcgan/1")
    generated = client.post("/generate", json={"seed": 7}).json()
    assert generated["image_base64"] == one["data"][0]["b64_json"]
    assert generated["seed"] == 7
    image = Image.open(io.BytesIO(base64.b64decode(generated["image_base64"])))
    assert (image.format, image.size, image.mode) == ("PNG", (28, 28), "L")


def test_pictures_are_those_of_the_bundle(client: httpx.Client, root: str) -> None:
    recorded = json.loads((Path(root) / "dcgan/1/golden.json").read_text())
    for label, expected in zip(recorded["labels"], recorded["images"], strict=True):
        index = recorded["labels"].index(label)
        picture = drawn(draw(client, n=index + 1, seed=recorded["seed"], label=label))[index]
        assert np.abs(picture - (np.array(expected)[0] + 1) * 127.5).max() <= 1


def test_a_class_by_prompt_by_name_and_by_index(client: httpx.Client) -> None:
    answers = [
        draw(client, seed=3, **how)["data"]
        for how in ({"prompt": "Class 2"}, {"label": "class 2"}, {"label": 2})
    ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]["label"] == "class 2"


def test_without_a_seed_each_request_is_another(client: httpx.Client) -> None:
    first, second = draw(client), draw(client)
    assert first["seed"] != second["seed"]
    assert draw(client, seed=first["seed"])["data"] == first["data"]


def test_an_interpolation_is_the_way_between_two_seeds_pictures(client: httpx.Client) -> None:
    way = draw(client, "interpolations", seed=7, to_seed=8, steps=5, truncation=1.5)
    ends = [draw(client, seed=seed, label=7 % 3, truncation=1.5)["data"][0] for seed in (7, 8)]
    assert [way["data"][0], way["data"][-1]] == ends
    assert [picture["label"] for picture in way["data"]] == ["class 1"] * 5
    assert len({picture["b64_json"] for picture in way["data"]}) == 5
    assert (
        draw(client, "interpolations", seed=7, to_seed=8, steps=5, label="Class 1", truncation=1.5)[
            "data"
        ]
        == way["data"]
    )


def test_truncation_is_part_of_what_a_picture_is(client: httpx.Client) -> None:
    many, one = (draw(client, n=n, seed=7, truncation=0.5)["data"] for n in (4, 1))
    assert many[0] == one[0]
    assert one != draw(client, seed=7)["data"]


def test_pictures_as_one_png(client: httpx.Client) -> None:
    response = client.post(
        "/v1/images/generations", json={"n": 5, "seed": 7, "response_format": "png"}
    )
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert (response.headers["raykiln-seed"], response.headers["raykiln-model"]) == ("7", "dcgan/1")
    first, second, third, fourth, fifth = drawn(draw(client, n=5, seed=7))
    left_over = np.full((28, 28), 255)
    np.testing.assert_array_equal(
        pixels(response.content), np.block([[first, second, third], [fourth, fifth, left_over]])
    )

    walk = {"seed": 7, "to_seed": 8, "steps": 4}
    strip = client.post("/v1/images/interpolations", json={**walk, "response_format": "png"})
    np.testing.assert_array_equal(
        pixels(strip.content), np.hstack([*drawn(draw(client, "interpolations", **walk))])
    )


def test_a_models_sample_is_its_bundles(client: httpx.Client, root: str) -> None:
    for name, media_type, file in (
        ("gpt", "text/plain; charset=utf-8", "gpt/1/sample.txt"),
        ("dcgan", "image/png", "dcgan/1/sample.png"),
    ):
        response = client.get(f"/v1/models/{name}/sample")
        assert (response.status_code, response.headers["content-type"]) == (200, media_type)
        assert response.content == (Path(root) / file).read_bytes()
    assert [model["sample"] for model in client.get("/v1/models").json()["data"]] == [True, True]
    unknown = client.get("/v1/models/other/sample")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_all_versions_in_the_registry_are_told(client: httpx.Client, root: str) -> None:
    told = client.get("/v1/models/gpt/versions").json()["data"]
    assert (
        [one["version"] for one in told]
        == sorted(registry.versions(root, "gpt"), reverse=True)
        != [1]
    )
    sample = client.get(f"/v1/models/gpt/versions/{told[0]['version']}/sample")
    assert (sample.headers["content-type"], sample.content) == (
        "text/plain; charset=utf-8",
        (Path(root) / "gpt/2/sample.txt").read_bytes(),
    )
    for path, status, message in (
        ("gpt/versions/99/sample", 404, "no sample of gpt/99"),
        ("gpt/versions/one/sample", 422, "version is 'one': input should be a valid integer"),
        ("other/versions", 404, "model 'other' is not served here"),
    ):
        refused = client.get(f"/v1/models/{path}")
        assert refused.status_code == status
        assert message in refused.json()["error"]["message"]


# ---- requests that cannot be served


BAD_TEXT: list[tuple[Any, int, str | None, str]] = [
    ({"prompt": 3}, 422, "prompt", "prompt is 3: input should be a valid string"),
    ({"prompt": "\ud800"}, 422, "prompt", "half a surrogate pair"),
    (
        {"max_tokens": 0},
        422,
        "max_tokens",
        "max_tokens is 0: input should be greater than or equal to 1",
    ),
    ({"max_tokens": True}, 422, "max_tokens", "max_tokens is True"),
    ({"temperature": -0.1}, 422, "temperature", "temperature is -0.1"),
    ({"top_p": 0}, 422, "top_p", "top_p is 0"),
    ({"seed": 2**64}, 422, "seed", "seed is 18446744073709551616"),
    ({"\u00e9\u00e8": 3}, 422, None, "'\\xe9\\xe8' is unknown: known are model, prompt"),
    ({"stop": ["a"] * 5}, 422, None, "stop takes up to 4 strings"),
    ({"stop": [""]}, 422, None, "stop takes up to 4 strings of 1 to 200 characters"),
    ({"max_token": 3}, 422, "max_token", "did you mean max_tokens?"),
    ({"\ud800": 3}, 422, None, "unable to parse raw data as a unicode string"),
    ({"best_of": 3}, 422, "best_of", "is not supported by this server: leave it out"),
    ({"n": 17}, 422, "n", "n is 17: input should be less than or equal to 16"),
    ({"logprobs": 6}, 422, "logprobs", "logprobs is 6: input should be less than or equal to 5"),
    ({"logprobs": True}, 422, "logprobs", "logprobs is True"),
    (
        {"repetition_penalty": 0},
        422,
        "repetition_penalty",
        "repetition_penalty is 0: input should be greater than or equal to 0.01",
    ),
    ({"presence_penalty": 2.1}, 422, "presence_penalty", "presence_penalty is 2.1"),
    ({"frequency_penalty": -2.1}, 422, "frequency_penalty", "frequency_penalty is -2.1"),
    ({"timeout_s": 0}, 422, "timeout_s", "timeout_s is 0: input should be greater than 0"),
    (
        {"timeout_s": 300.5},
        400,
        "timeout_s",
        "timeout_s is 300.5, and a request may take 300 s here: ask for no more",
    ),
    ({"model": "gtp"}, 404, "model", "model 'gtp' is not served here: leave it out, or use gpt"),
    ({"model": "dcgan"}, 404, "model", "model 'dcgan' is not served here"),
    (
        {"prompt": PROMPT, "max_tokens": CONTEXT},
        413,
        None,
        f"exceed the model's context of {CONTEXT} tokens",
    ),
    ({"prompt": "x" * 900_000}, 413, None, f"exceed the model's context of {CONTEXT} tokens"),
    ({"prompt": "x" * 1_100_000}, 413, None, "the body is larger than 1048576 bytes"),
    ([], 422, None, "the body must be a JSON object"),
    ({"stream_options": 3}, 422, "stream_options", "stream_options is 3: input should be"),
    (
        {"stream_options": {"foo": 1}},
        422,
        "stream_options.foo",
        "'stream_options.foo' is unknown: known are include_usage",
    ),
    (
        {"stream_options": {"include_usag": True}},
        422,
        "stream_options.include_usag",
        "did you mean include_usage?",
    ),
    (
        {"stream_options": {"include_usage": 3}},
        422,
        "stream_options.include_usage",
        "stream_options.include_usage is 3: input should be",
    ),
    ({"stop": 3}, 422, "stop", "stop is 3: input should be a valid string"),
]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"), BAD_TEXT, ids=[message[:40] for *_, message in BAD_TEXT]
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_a_bad_request_gets_its_status_and_a_sentence(
    client: httpx.Client, body: Any, status: int, param: str | None, message: str, streamed: bool
) -> None:
    if isinstance(body, dict):
        body = {**body, "stream": streamed}
    response = client.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            {"prompt": "a cat"},
            400,
            "prompt is 'a cat', which is no class of this model: use one of class 0, class 1",
        ),
        ({"label": 3}, 400, "label is 3, which is no class of this model"),
        ({"label": -1}, 400, "label is -1"),
        ({"size": "1024x1024"}, 400, "size is '1024x1024', and this model draws 28x28"),
        ({"n": 65}, 422, "n is 65"),
        ({"response_format": "url"}, 422, "response_format is 'url'"),
        ({"model": "gpt"}, 404, "use dcgan"),
        ({"truncation": 0}, 422, "truncation is 0: input should be greater than or equal to 0.05"),
        ({"truncation": 5.1}, 422, "truncation is 5.1"),
    ],
)
def test_a_bad_picture_request_too(
    client: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    response = client.post("/v1/images/generations", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"to_seed": None}, 422, "to_seed", "the field to_seed is missing"),
        ({"to_seed": -1}, 422, "to_seed", "to_seed is -1"),
        ({"steps": 1}, 422, "steps", "steps is 1: input should be greater than or equal to 2"),
        ({"steps": 65}, 422, "steps", "steps is 65"),
        ({"n": 3}, 422, "n", "the field 'n' is unknown"),
        ({"label": "a cat"}, 400, "label", "label is 'a cat', which is no class of this model"),
        ({"model": "gpt"}, 404, "model", "use dcgan"),
    ],
)
def test_a_bad_interpolation_too(
    client: httpx.Client, change: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = client.post("/v1/images/interpolations", json={"seed": 7, "to_seed": 8, **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", 400, "the body is not valid JSON"),
        ("POST", "/v1/completions", b"", 422, "the body must be a JSON object"),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400, ""),
        ("POST", "/v1/completions", b"[" * 100_000, 400, ""),
        ("POST", "/v1/completions", b'{"seed": ' + b"9" * 5000 + b"}", 400, ""),
        ("GET", "/v1/completions", b"", 405, "GET /v1/completions does not exist"),
        ("GET", "/v1/nothing", b"", 404, "GET /v1/nothing does not exist"),
    ],
)
def test_what_is_no_request_at_all(
    client: httpx.Client, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    response = client.request(
        method, path, content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


# ---- what is seen of it


def test_openais_client_through_serve(client: httpx.Client, root: str) -> None:
    recorded = golden(root, 1)
    openai_client = openai.OpenAI(
        base_url=f"{client.base_url}/v1", api_key="there are no keys yet", max_retries=0
    )
    request = {
        "model": "gpt",
        "prompt": recorded["prompt"],
        "max_tokens": recorded["max_tokens"],
        "temperature": 0,
    }
    messages = openai_client.completions.create(**request, stream=True)
    assert "".join(message.choices[0].text for message in messages) == recorded["text"]
    with pytest.raises(openai.NotFoundError, match="model 'gtp' is not served here"):
        openai_client.completions.create(**request | {"model": "gtp"})


def test_status_tells_the_replicas_and_their_load(client: httpx.Client) -> None:
    idle = {"replicas": 1, "starting": 0, "target": 1, "status": "HEALTHY"}

    async def busy() -> dict[str, Any]:
        """What /status says while more texts are asked for than there are slots."""
        body = {"prompt": PROMPT, "max_tokens": CONTEXT - 40, "temperature": 0}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as many:
            texts = [
                asyncio.create_task(many.post("/v1/completions", json=body)) for _ in range(40)
            ]
            while not all(text.done() for text in texts):
                deployments = (await many.get("/status")).json()["deployments"]
                if deployments["Text"]["waiting"]:
                    break
            for text in texts:
                text.cancel()
            return deployments

    deployments = asyncio.run(busy())
    assert deployments["Gateway"] == {**idle, "slots": None, "running": None, "waiting": None}
    assert deployments["Pictures"] == {**idle, "slots": 1, "running": 0, "waiting": 0}
    assert deployments["Text"]["waiting"] in range(1, 33)
    assert deployments["Text"] == {
        **idle,
        "slots": 8,
        "running": 8,
        "waiting": deployments["Text"]["waiting"],
    }
    until(
        lambda: (
            client.get("/status").json()["deployments"]["Text"]
            == {**idle, "slots": 8, "running": 0, "waiting": 0}
        )
    )
    assert client.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "stream": True}
    ).is_success
    latency = client.get("/status").json()["latency_ms"]
    assert 0 < latency["text_first_token"]["p50"] <= latency["text_first_token"]["p99"]


def test_a_request_is_logged_on_its_machine_with_the_id_that_it_came_with(
    client: httpx.Client,
) -> None:
    request_id = uuid.uuid4().hex
    response = client.post(
        "/v1/completions",
        json={"prompt": "SECRET", "max_tokens": 3},
        headers={"X-Request-ID": request_id},
    )
    assert response.headers.get_list("x-request-id") == [request_id]
    logs = Path("/tmp").glob("kiln-*/session_latest/logs/worker-*.out")  # of the session's cluster
    (line,) = (line for log in logs for line in log.read_text().splitlines() if request_id in line)
    logged = json.loads(line)
    assert (logged["route"], logged["status"], logged["tokens"], logged["client"]) == (
        "/v1/completions",
        200,
        3,
        "127.0.0.1",
    )
    assert "SECRET" not in line


# ---- the ingress alone, over models that fail


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full: try again"), 429, "rate_limit_error"),
        (Unavailable("away: try again"), 503, "server_error"),
        (Failed("this request could not be continued"), 500, "server_error"),
        (RuntimeError("secret"), 500, "server_error"),
    ],
)
def test_failures_are_answers(error: Exception, status: int, kind: str) -> None:
    app = build_app(Failing(error), None)
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
def test_a_failure_in_mid_stream_is_the_streams_last_message(
    error: Exception, message: str
) -> None:
    response = ask(
        build_app(Failing(error), None), "POST", "/v1/completions", json={"stream": True}
    )
    first, last = events(response)
    assert first["choices"][0]["text"] == "To be"
    assert (last["error"]["message"], last["error"]["type"]) == (message, "server_error")


@pytest.mark.parametrize("error", [Unavailable("away: try again"), RuntimeError("secret")])
def test_a_model_that_is_away_does_not_hide_the_other(root: str, error: Exception) -> None:
    pictures = Pictures(threads=1)
    asyncio.run(pictures.reconfigure({"uri": f"{root}/dcgan/1"}))
    app = build_app(Failing(error), pictures)  # type: ignore[arg-type]  # which returns its refusals: none are asked for
    assert ask(app, "GET", "/health").json() == {"status": "ok", "models": ["dcgan/1"]}
    (model,) = ask(app, "GET", "/v1/models").json()["data"]
    assert (model["id"], model["providers"], model["quantization"]) == (
        "dcgan",
        ["CPUExecutionProvider"],
        None,
    )
    assert ask(app, "GET", "/v1/models/dcgan").json() == model
    for path in (
        "gpt",
        "gpt/sample",
        "gpt/versions",
        "gpt/versions/1/sample",
    ):  # which it may be that is away
        app = build_app(Failing(error), pictures, catalog=Catalog())  # type: ignore[arg-type]
        refused = ask(app, "GET", f"/v1/models/{path}")
        assert refused.status_code == (503 if isinstance(error, Unavailable) else 500)


def test_a_bundle_outside_of_a_registry_has_no_versions(root: str, tmp_path: Path) -> None:
    pictures = Pictures(threads=1)
    asyncio.run(
        pictures.reconfigure({"uri": str(shutil.copytree(f"{root}/dcgan/1", tmp_path / "by-hand"))})
    )
    app = build_app(None, pictures, catalog=Catalog())  # type: ignore[arg-type]
    for path in ("versions", "versions/1/sample"):
        refused = ask(app, "GET", f"/v1/models/dcgan/{path}")
        assert refused.status_code == 404
        assert (
            "dcgan is served from a folder that is in no registry"
            in refused.json()["error"]["message"]
        )


def test_a_replica_whose_engine_died_is_not_healthy(root: str) -> None:
    async def scenario() -> None:
        replica = Text(slots=1, threads=1, timeout_s=60)
        await replica.reconfigure({"uri": f"{root}/gpt/2"})
        await replica.check_health()
        replica.session.decode = None  # type: ignore[assignment,method-assign]
        assert isinstance(await replica.complete(CompletionRequest(max_tokens=9), ""), Unavailable)
        with pytest.raises(RuntimeError, match="the engine's thread has ended"):
            await replica.check_health()

    asyncio.run(scenario())


class Swaps:
    """`open_bundle` over sessions that are open: the first is given once `go` is set."""

    def __init__(self, sessions: list[Any]) -> None:
        self.sessions, self.opened, self.go = sessions, 0, threading.Event()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.opened += 1
        session = self.sessions[self.opened - 1]
        if self.opened == 1:
            self.go.wait(60)
        return session


@pytest.mark.parametrize(
    ("make", "session_type", "uri"),
    [
        (lambda: Text(slots=1, threads=1, timeout_s=60), TextSession, "gpt/2"),
        (lambda: Pictures(threads=1), ImageSession, "dcgan/1"),
    ],
    ids=["text", "pictures"],
)
def test_of_swaps_that_overlap_the_last_wins_and_one_to_the_same_is_none(
    root: str, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], session_type: Any, uri: str
) -> None:
    sessions = [session_type(f"{root}/{uri}") for _ in range(2)]
    swaps = Swaps(sessions)
    monkeypatch.setattr(replicas, "open_bundle", swaps)

    async def scenario() -> None:
        replica, rollouts = make(), []
        replica.metrics.rollouts.inc = lambda value, tags: rollouts.append(tags["model"])
        first = asyncio.create_task(replica.reconfigure({"uri": "first"}))
        second = asyncio.create_task(replica.reconfigure({"uri": "second"}))
        await asyncio.wait({second}, timeout=0.5)  # for one that overtakes
        swaps.go.set()
        await asyncio.gather(first, second)
        assert replica.session is sessions[1]
        assert rollouts == [f"{uri.rpartition('/')[0]}/{sessions[1].manifest['version']}"]
        served = dict(vars(replica))
        await replica.reconfigure({"uri": "second"})
        assert (swaps.opened, len(rollouts)) == (2, 1)
        assert vars(replica) == served, "the same engine, with what is under way in it"
        if isinstance(replica, Text):
            assert replica.engine is not None
            replica.engine.close()
            await asyncio.to_thread(replica.engine.join)
            sessions.append(session_type(f"{root}/{uri}"))
            await replica.reconfigure({"uri": "second"})
            assert replica.engine.alive, "a dead engine is no reason to leave things as they are"

    asyncio.run(scenario())


def test_probabilities_are_those_of_transformers(root: str) -> None:
    async def scenario() -> dict[str, Any]:
        replica = Text(slots=1, threads=1, timeout_s=60)
        await replica.reconfigure({"uri": f"{root}/gpt/2"})
        transport = httpx.ASGITransport(build_app(replica, None))  # type: ignore[arg-type]  # which returns its refusals: there are none
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            how = {
                "prompt": PROMPT,
                "max_tokens": 24,
                "temperature": 1.0,
                "seed": 2,
                "top_k": 0,
                "logprobs": 3,
            }
            return (await http.post("/v1/completions", json=how)).json()["choices"][0]

    choice = asyncio.run(scenario())
    told, text = choice["logprobs"], choice["text"]
    tokenizer = Tokenizer.from_file(f"{root}/gpt/2/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(f"{root}/gpt/2/transformers")
    ids = {spelled(tokenizer, token): token for token in range(tokenizer.get_vocab_size())}
    prompt, tokens = tokenizer.encode(PROMPT).ids, [ids[token] for token in told["tokens"]]
    with torch.no_grad():
        expected = (
            model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
    np.testing.assert_allclose(told["token_logprobs"], expected[range(24), tokens], atol=1e-4)
    for row, top, token in zip(expected, told["top_logprobs"], told["tokens"], strict=True):
        np.testing.assert_allclose([*top.values()][:3], row.topk(3).values, atol=1e-4)
        assert token in top
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_for_a_client_that_has_gone_no_token_is_begun(root: str) -> None:
    """The one that was under way is made: over ASGI, the model's steps held by the test."""
    allowed = threading.Semaphore(5)

    async def scenario() -> None:
        replica = Text(slots=1, threads=1, timeout_s=60)
        await replica.reconfigure({"uri": f"{root}/gpt/1"})
        engine, decode = replica.engine, replica.session.decode
        assert engine is not None

        def held(*step: Any) -> np.ndarray:
            allowed.acquire()
            return decode(*step)

        replica.session.decode = held  # type: ignore[assignment,method-assign]
        gone, body = (
            asyncio.Event(),
            {
                "prompt": PROMPT,
                "max_tokens": CONTEXT - 40,
                "temperature": 0,
                "n": 1,
                "stream": True,
            },
        )
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": headers,
        }
        app = build_app(replica, None)  # type: ignore[arg-type]
        asked = asyncio.create_task(app(scope, receive, send))
        while engine.generated < 6:  # the prompt's, and five steps'
            await asyncio.sleep(0.001)
        gone.set()
        await asked
        allowed.release(CONTEXT)
        while engine.status()["running"]:
            await asyncio.sleep(0.001)
        assert engine.generated <= 6 + 1
        engine.close()
        await asyncio.to_thread(engine.join)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_class_is_taken_by_its_very_name_first(tmp_path: Path, root: str) -> None:
    folder = Path(shutil.copytree(Path(root) / "dcgan/1", tmp_path / "gan"))
    manifest = bundle.read(folder)
    manifest["model"]["class_names"] = ["bag", "Bag", "shoe"]
    bundle.write(folder, manifest)

    async def labels() -> list[str | None]:
        pictures = Pictures(threads=1)
        await pictures.reconfigure({"uri": str(folder)})
        answers = [
            await pictures.draw(ImagesRequest(label=label)) for label in ("Bag", "bag", "SHOE")
        ]
        return [answer[1].labels[0] for answer in answers if isinstance(answer, tuple)]

    assert asyncio.run(labels()) == ["Bag", "bag", "shoe"]


def test_a_kind_that_is_not_served_is_not_found() -> None:
    for path in ("/v1/images/generations", "/generate"):
        response = ask(build_app(Failing(Unavailable("")), None), "POST", path, json={})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_the_openapi_document_tells_the_errors_that_come() -> None:
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


# ---- which bundles, and their life on the cluster


class Load:
    """Requests that follow one another in threads of their own until `with` ends; what went wrong in them is raised there."""

    def __init__(self, client: httpx.Client, *requests: Callable[[httpx.Client], None]) -> None:
        self.base_url, self.requests = client.base_url, requests
        self.ended = threading.Event()

    def __enter__(self) -> None:
        self.pool = ThreadPoolExecutor(len(self.requests))
        self.futures = [self.pool.submit(self._repeat, request) for request in self.requests]

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.pool.shutdown()
        for future in self.futures:
            future.result()

    def _repeat(self, request: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=self.base_url, timeout=60) as client:
            while not self.ended.is_set():
                request(client)


def test_a_version_swaps_in_place_and_no_request_is_lost(
    client: httpx.Client, root: str, address: launch.Address
) -> None:
    texts = {version: golden(root, version)["text"] for version in (1, 2)}
    short = {
        "prompt": golden(root, 1)["prompt"],
        "max_tokens": golden(root, 1)["max_tokens"],
        "temperature": 0,
    }
    assert golden(root, 2)["prompt"] == short["prompt"]
    long = {"prompt": PROMPT, "max_tokens": CONTEXT - 40, "temperature": 0}
    whole = complete(client, **long)["choices"][0]["text"]
    answers: list[tuple[int, str, str]] = []
    streamed: list[tuple[int, str]] = []

    def ask_short(client: httpx.Client) -> None:
        response = client.post("/v1/completions", json=short)
        if response.status_code != 200:
            answers.append((response.status_code, "", response.text))
            return
        body = response.json()
        answers.append((200, body["system_fingerprint"], body["choices"][0]["text"]))

    def ask_long(client: httpx.Client) -> None:
        """One stream after the other, so that one is under way when the version with the short context takes over."""
        with client.stream("POST", "/v1/completions", json={**long, "stream": True}) as response:
            if response.status_code != 200:
                streamed.append((response.status_code, ""))
                return
            *messages, done = events(response)
        assert done == "[DONE]", done
        assert {message["system_fingerprint"] for message in messages} == {"gpt/1"}
        streamed.append((200, "".join(message["choices"][0]["text"] for message in messages)))

    def swap(version: int) -> None:
        launch.deploy(launch.choose(root, text=f"gpt/{version}"), address, Options(max_replicas=1))
        until(lambda: serves(client, f"gpt/{version}"))

    with Load(client, ask_short, ask_short, ask_short, ask_long):
        swap(2)
        until(lambda: (413, "") in streamed)
        swap(1)
    assert set(answers) == {(200, f"gpt/{version}", text) for version, text in texts.items()}
    assert set(streamed) == {(200, whole), (413, "")}


def test_a_bundle_that_answers_wrongly_does_not_take_down_what_is_served(
    client: httpx.Client, root: str, address: launch.Address, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(Path(root) / "gpt/2", tmp_path / "wrong"))
    (folder / "golden.json").write_text(json.dumps(golden(root, 2) | {"text": "something else"}))
    bundle.write(folder, bundle.read(folder))
    bad = str(tmp_path / "models")
    registry.publish(bad, "gpt", folder)
    with pytest.raises(
        ValueError, match=r"gpt/1 cannot be served: .* gives other text than golden\.json"
    ):
        launch.choose(bad)

    (_, _, uri), good = registry.resolve(bad, "gpt"), launch.choose(root)
    chosen = good | {
        "gpt": launch.Chosen("gpt", 1, uri, bundle.read(uri))
    }  # as where replicas' machines are not like this one
    with pytest.raises(ValueError, match=r"the models could not be served"):
        launch.deploy(chosen, address, Options(max_replicas=1))
    recorded = golden(root, 1)
    answer = complete(
        client, prompt=recorded["prompt"], max_tokens=recorded["max_tokens"], temperature=0
    )
    assert (answer["system_fingerprint"], answer["choices"][0]["text"]) == (
        "gpt/1",
        recorded["text"],
    )


def test_prometheus_finds_what_was_counted(
    client: httpx.Client, root: str, address: launch.Address
) -> None:
    def scrape() -> dict[str, list[dict[str, str]]]:
        samples: dict[str, list[dict[str, str]]] = {}
        text = httpx.get(launch.metrics_url(), timeout=60, trust_env=False).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_raykiln_") and sample.value > 0:
                    samples.setdefault(sample.name.removeprefix("ray_raykiln_"), []).append(
                        sample.labels
                    )
        return samples

    wanted = {
        "text_requests_total": {"deployment": "Text", "model": "gpt/1", "outcome": "cancelled"},
        "prompt_tokens_total": {"deployment": "Text", "model": "gpt/1"},
        "generation_tokens_total": {"deployment": "Text", "model": "gpt/2"},
        "time_to_first_token_seconds_count": {"deployment": "Text", "model": "gpt/1"},
        "inter_token_latency_seconds_count": {"deployment": "Text", "model": "gpt/1"},
        "rollouts_total": {"deployment": "Text", "model": "gpt/2"},
        "slots": {"deployment": "Text"},
        "pictures_total": {"deployment": "Pictures", "model": "dcgan/1"},
        "picture_request_seconds_count": {"deployment": "Pictures", "model": "dcgan/1"},
    }

    def counted() -> bool:
        """Ray exports every few seconds."""
        found = scrape()
        return all(
            any(labels.items() <= one.items() for one in found.get(name, []))
            for name, labels in wanted.items()
        )

    draw(client)
    with client.stream(
        "POST", "/v1/completions", json={"max_tokens": CONTEXT - 40, "stream": True}
    ) as response:
        lines = response.iter_lines()
        for _ in range(3):  # messages: time between tokens
            next(lines), next(lines)
    for version in (2, 1):
        launch.deploy(launch.choose(root, text=f"gpt/{version}"), address, Options(max_replicas=1))
        until(functools.partial(serves, client, f"gpt/{version}"))
    until(counted)


def test_commands_change_and_show_what_a_cluster_serves(
    client: httpx.Client, root: str, address: launch.Address, command: Callable[..., Any]
) -> None:
    up = [
        "serve",
        "up",
        "--storage",
        str(Path(root).parent),
        "--max-replicas",
        "1",
        "--port",
        str(address.port),
    ]
    try:
        changed = command(*up, "--text", "gpt/2", "--detach")
        assert (changed.returncode, changed.stderr) == (0, "")
        assert f"studio  http://localhost:{address.port}/" in changed.stdout
        assert "gpt/2 runs on CPUExecutionProvider\n" in changed.stdout
        assert f"metrics {launch.metrics_url()}" in changed.stdout
        status = command("serve", "status", "--port", str(address.port))
        assert status.returncode == 0
        assert "gpt/2" in status.stdout
        assert re.search(r"Text +│ HEALTHY +│ 1 of 1 +│ 8 +│ 0 +│ 0 ", status.stdout), status.stdout
        assert re.search(r"text_first_token +│ [0-9]+\.[0-9] +│ [0-9]+\.[0-9] ", status.stdout), (
            status.stdout
        )
        refused = command(*up)
        assert (
            refused.returncode,
            "this cluster serves already: change what it serves with --detach" in refused.stderr,
        ) == (2, True)
        elsewhere = command(*up[:-1], str(free_port()), "--detach")
        assert (
            elsewhere.returncode,
            f"Serve runs on this cluster at {address.url} already" in elsewhere.stderr,
        ) == (2, True)
        launch.deploy(launch.choose(root), address, Options(max_replicas=1, blocklist=["verboten"]))
        open_again = command(*up, "--detach")
        assert (
            open_again.returncode,
            "has a blocklist of 1 phrases: give --blocklist again" in open_again.stderr,
        ) == (2, True)
        assert client.post("/v1/completions", json={"prompt": "verboten"}).status_code == 400
    finally:
        launch.deploy(launch.choose(root), address, Options(max_replicas=1))
    assert command("serve", "status", "--port", str(free_port())).returncode == 1


def text_replica() -> psutil.Process:
    """Its process, in the session's cluster and no other of this machine."""
    (replica,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica:raykiln:Text" in "".join(process.cmdline()[:1])
    )
    return replica


def slots(client: httpx.Client) -> int | None:
    """Those of the text model as /status tells them, which must answer whatever its replica does."""
    response = client.get("/status")
    assert response.status_code == 200, response.text
    return response.json()["deployments"]["Text"]["slots"]


def test_a_replica_that_hangs_leaves_the_status_and_up_without_its_answer(
    client: httpx.Client, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DESCRIBE_TIMEOUT_S", 0.5)
    chosen = {"gpt": launch.choose(root)["gpt"]}
    replica = text_replica()
    replica.suspend()
    try:
        assert launch.running_on(chosen) == {"gpt/1": None}
        until(lambda: slots(client) is None)
    finally:
        replica.resume()
    until(lambda: slots(client) == 8)


def test_a_killed_replica_ends_its_streams_with_a_sentence_and_is_replaced(
    client: httpx.Client,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": CONTEXT - 40, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        text_replica().kill()
        *_, last = (line for line in lines if line)
    assert (
        json.loads(last.removeprefix("data: "))["error"]["message"]
        == "the text model does not answer just now: try again in a moment"
    )
    until(lambda: slots(client) is None)
    until(lambda: slots(client) == 8)
    until(lambda: client.post("/v1/completions", json={"max_tokens": 1}).status_code == 200)


def test_the_default_is_production_or_else_the_newest(root: str, tmp_path: Path) -> None:
    assert {kind: chosen.reference for kind, chosen in launch.choose(root).items()} == {
        "gpt": "gpt/1",
        "gan": "dcgan/1",
    }
    assert launch.choose(root, text="gpt/2")["gpt"].version == 2
    shutil.copytree(Path(root) / "gpt", tmp_path / "gpt", ignore=shutil.ignore_patterns("aliases"))
    assert {kind: chosen.reference for kind, chosen in launch.choose(str(tmp_path)).items()} == {
        "gpt": "gpt/2"
    }


def test_a_name_that_stands_for_nothing_is_passed_over(
    root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "models"))
    shutil.copytree(copy / "gpt/2", copy / "other/1")
    storage.write_json(str(copy / "other/aliases/production.json"), {"version": 7})
    assert {kind: chosen.reference for kind, chosen in launch.choose(str(copy)).items()} == {
        "gpt": "gpt/1",
        "gan": "dcgan/1",
    }
    assert "other is passed over: model 'other' has no version 7" in caplog.text
    caplog.clear()
    assert launch.choose(str(copy), text="gpt/2", images="dcgan")["gpt"].reference == "gpt/2"
    assert caplog.text == ""


def test_what_cannot_be_served_is_refused_with_a_sentence(root: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model to serve: train one and export it"):
        launch.choose(str(tmp_path / "nothing"))
    with pytest.raises(
        ValueError, match="--text dcgan is a bundle of kind gan: give it one of kind gpt"
    ):
        launch.choose(root, text="dcgan")
    with pytest.raises(ValueError, match="gpt"):
        launch.choose(root, text="gpt/9")
    shutil.copytree(root, tmp_path / "models")
    graph = tmp_path / "models/gpt/1/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"gpt/1/model\.onnx .*damaged"):
        launch.choose(str(tmp_path / "models"))
    with pytest.raises(
        ValueError, match=r"model\.onnx .*damaged"
    ):  # and a replica looks for itself
        asyncio.run(
            Text(slots=1, threads=1, timeout_s=1).reconfigure(
                {"uri": str(tmp_path / "models/gpt/1")}
            )
        )
    for replica, uri in (
        (Text(slots=1, threads=1, timeout_s=1, providers=["cuda"]), "gpt/2"),
        (Pictures(1, ["cuda"]), "dcgan/1"),
    ):
        with pytest.raises(ValueError, match="execution provider 'cuda' is not in this build"):
            asyncio.run(replica.reconfigure({"uri": f"{root}/{uri}"}))


def test_up_says_what_is_wrong_and_ends(
    command: Callable[..., Any], root: str, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        taken = command(
            "serve", "up", "--storage", str(Path(root).parent), "--port", port, RAY_ADDRESS=""
        )
    assert (taken.returncode, "Traceback" in taken.stderr) == (2, False)
    assert f"127.0.0.1:{port} cannot be used" in taken.stderr
    no_port = command("serve", "up", "--port", "70000", RAY_ADDRESS="")
    assert (
        no_port.returncode,
        "'70000' is not a port: use a number from 1 to 65535" in no_port.stderr,
    ) == (2, True)
    no_gpu = command(
        "serve", "up", "--providers", "cuda", "--storage", str(Path(root).parent), RAY_ADDRESS=""
    )
    assert (
        no_gpu.returncode,
        "cannot be served: execution provider 'cuda' is not in this build" in no_gpu.stderr,
    ) == (2, True)
    detached = command("serve", "up", "--detach", "--storage", str(tmp_path), RAY_ADDRESS="")
    assert "--detach needs a cluster to stay on" in detached.stderr
    nothing = command(
        "serve",
        "up",
        "--blocklist",
        str(tmp_path / "none.txt"),
        "--storage",
        str(Path(root).parent),
        RAY_ADDRESS="",
    )
    assert (
        nothing.returncode,
        f"the blocklist {tmp_path}/none.txt cannot be read" in nothing.stderr,
    ) == (2, True)
    fast = command("serve", "up", "--fast", "--storage", str(tmp_path), RAY_ADDRESS="127.0.0.1:1")
    assert (fast.returncode, "--fast is for a private cluster" in fast.stderr) == (2, True)


def test_status_of_another_openai_server_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": [{"id": "gpt-2", "object": "model"}]}')

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nothing listens
    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert main(["status", "--port", str(server.server_port)]) == 1
        thread.join(20)
    assert "is no raykiln: its /v1/models lists no bundles" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [[], ["--fast"]], ids=["default", "fast"])
def test_a_private_server_ends_with_ctrl_c_and_leaves_no_process(
    root: str, tmp_path: Path, mode: list[str]
) -> None:
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    (tmp_path / "blocked.txt").write_text("verboten\n")
    options = [*mode, "--blocklist", str(tmp_path / "blocked.txt")]
    arguments = [
        sys.executable,
        "-m",
        "serve",
        "up",
        "--storage",
        str(Path(root).parent),
        "--port",
        str(port),
        *options,
    ]
    with open(tmp_path / "out", "w") as out:
        server = psutil.Popen(
            arguments, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until(
            lambda: server.poll() is not None or "Ctrl-C ends it" in (tmp_path / "out").read_text()
        )
        assert server.poll() is None, (tmp_path / "out").read_text()
        assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {
            "status": "ok",
            "models": ["gpt/1", "dcgan/1"],
        }
        blocked = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "It is VERBOTEN."}
        )
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (400, "content_filter")
        processes = server.children(recursive=True)
        assert any("Text" in process.name() or "raylet" in process.name() for process in processes)
        scratch = check_fast_mode(processes, port, golden(root, 1)) if mode else None
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive
        assert scratch is None or not scratch.exists()
    finally:
        for process in [*server.children(recursive=True), server] if server.is_running() else []:
            process.kill()


def check_fast_mode(processes: list[psutil.Process], port: int, recorded: dict[str, Any]) -> Path:
    """HAProxy answers in the Python proxy's place, with the same text, and only its statistics are for other machines: its folder."""
    haproxy = [process for process in processes if process.name() == "haproxy"]
    replicas = [process for process in processes if "ServeReplica" in "".join(process.cmdline())]
    listening = {
        (process.name(), socket.laddr)
        for process in haproxy + replicas
        for socket in process.net_connections()
        if socket.status == "LISTEN"
    }
    assert ("haproxy", ("127.0.0.1", port)) in listening
    direct = [
        address.ip for _, address in listening if 30_000 <= address.port <= 31_000
    ]  # the gateway's own port
    assert direct == ["127.0.0.1"]
    scratch = Path(haproxy[0].cmdline()[haproxy[0].cmdline().index("-f") + 1]).parents[1]
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert list(scratch.glob("*/admin.sock"))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        body = {
            "prompt": recorded["prompt"],
            "max_tokens": recorded["max_tokens"],
            "temperature": 0,
        }
        *messages, _ = stream(client, **body)
        assert "".join(message["choices"][0]["text"] for message in messages) == recorded["text"]
        response = client.get("/status", headers={"X-Request-ID": "mine"})
        assert response.headers.get_list("x-request-id") == ["mine"]
        assert response.json()["deployments"]["Text"]["slots"] == 8
        assert (
            client.post("/v1/completions", json={"max_tokens": 0}).json()["error"]["param"]
            == "max_tokens"
        )
    return scratch
