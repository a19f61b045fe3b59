"""Requests that are refused, over HTTP through Ray Serve: status, message and field."""

import json
from typing import Any

import httpx
import pytest

from tests.support.served import CONTEXT, PROMPT

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
        "timeout_s is 300.5, and a request may take at most 300 s here: use a lower value",
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
def test_invalid_completion_request_is_refused_with_its_field(
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
            "prompt is 'a cat', which is not a class of this model: use one of class 0, class 1",
        ),
        ({"label": 3}, 400, "label is 3, which is not a class of this model"),
        ({"label": -1}, 400, "label is -1"),
        ({"size": "1024x1024"}, 400, "size is '1024x1024', and this model generates 28x28"),
        ({"n": 65}, 422, "n is 65"),
        ({"response_format": "url"}, 422, "response_format is 'url'"),
        ({"model": "gpt"}, 404, "use dcgan"),
        ({"truncation": 0}, 422, "truncation is 0: input should be greater than or equal to 0.05"),
        ({"truncation": 5.1}, 422, "truncation is 5.1"),
    ],
)
def test_invalid_generations_request_is_refused_with_a_message(
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
        ({"label": "a cat"}, 400, "label", "label is 'a cat', which is not a class of this model"),
        ({"model": "gpt"}, 404, "model", "use dcgan"),
    ],
)
def test_invalid_interpolations_request_is_refused_with_its_field(
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
def test_malformed_request_is_refused_with_a_message(
    client: httpx.Client, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    response = client.request(
        method, path, content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
