"""Text over HTTP through Ray Serve: golden text, streams, stop strings, timeouts, disconnects."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.support.served import CONTEXT, PROMPT, complete, golden, stream, until


def engine(client: httpx.Client) -> dict[str, int]:
    return client.get("/v1/models").json()["data"][0]["engine"]


def test_greedy_text_equals_golden_text(client: httpx.Client, registry_root: str) -> None:
    recorded = golden(registry_root, 1)
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


def test_stream_joins_to_whole_text(client: httpx.Client) -> None:
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


def test_seeded_text_is_same_alone_and_in_batch(client: httpx.Client) -> None:
    async def together(requests: list[dict[str, Any]]) -> list[str]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as concurrent:
            responses = await asyncio.gather(
                *(concurrent.post("/v1/completions", json=request) for request in requests)
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


def test_text_ends_before_stop_string(client: httpx.Client) -> None:
    whole = complete(client, prompt=PROMPT, max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = whole[12:15]
    answer = complete(client, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop])
    (choice,) = answer["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_several_texts_with_logprobs_are_the_same_whole_and_streamed(client: httpx.Client) -> None:
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
        for key, values in choice["logprobs"].items():
            assert [one for piece in pieces for one in piece["logprobs"][key]] == values
    counts = [len(choice["logprobs"]["tokens"]) for choice in whole["choices"]]
    assert messages[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == sum(counts)
    assert (
        whole["usage"]["prompt_tokens"] == complete(client, prompt=PROMPT)["usage"]["prompt_tokens"]
    ), "the prompt counts once"
    assert len({choice["text"] for choice in whole["choices"]}) == 3
    assert complete(client, **{**body, "n": 1})["choices"] == whole["choices"][:1]


def test_request_ends_at_its_timeout(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"max_tokens": CONTEXT - 40, "timeout_s": 0.001})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "longer than 0.001 s" in response.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [True, False])
def test_disconnected_client_frees_its_slots(client: httpx.Client, streamed: bool) -> None:
    before = engine(client)["generated"]
    # Enough that generating them takes far longer than Ray Serve needs to notice a disconnect.
    texts = 16
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
    assert after - before < texts * (CONTEXT - 40), "the texts were generated to their end"
    assert engine(client)["generated"] == after


def test_openai_client_streams_text_and_raises_errors_through_ray_serve(
    client: httpx.Client, registry_root: str
) -> None:
    recorded = golden(registry_root, 1)
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
