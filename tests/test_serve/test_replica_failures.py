"""Replicas of the served application that hang or are killed."""

import json

import httpx
import psutil
import pytest

from serve import launch, selection
from tests.support.served import CONTEXT, PROMPT, until


def text_replica() -> psutil.Process:
    """Return the process of the text replica in the cluster of this test session."""
    (replica,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica:raykiln:TextReplica" in "".join(process.cmdline()[:1])
    )
    return replica


def slots(client: httpx.Client) -> int | None:
    """Return the text model's slots in /status, which must answer whatever the replica does."""
    response = client.get("/status")
    assert response.status_code == 200, response.text
    return response.json()["deployments"]["TextReplica"]["slots"]


def test_status_and_up_do_not_wait_for_a_hanging_replica(
    client: httpx.Client, registry_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DESCRIBE_TIMEOUT_S", 0.5)
    selected = {"text": selection.select(registry_root)["text"]}
    replica = text_replica()
    replica.suspend()
    try:
        assert launch.providers_in_use(selected) == {"gpt/1": None}
        until(lambda: slots(client) is None)
    finally:
        replica.resume()
    until(lambda: slots(client) == 8)


def test_killed_replica_ends_its_streams_with_an_error_and_is_replaced(
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
        == "the text model does not answer at the moment: try again in a moment"
    )
    until(lambda: slots(client) is None)
    until(lambda: slots(client) == 8)
    until(lambda: client.post("/v1/completions", json={"max_tokens": 1}).status_code == 200)
