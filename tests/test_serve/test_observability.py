"""What operators see of the served application: /status, access log, Prometheus metrics."""

import asyncio
import functools
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serve import launch, selection
from serve.deployments import Options
from tests.support.served import CONTEXT, PROMPT, generate, serves, until


def test_status_shows_replicas_and_load(client: httpx.Client) -> None:
    idle = {"replicas": 1, "starting": 0, "target": 1, "status": "HEALTHY"}

    async def busy() -> dict[str, Any]:
        """Return what /status says while more texts are requested than there are slots."""
        body = {"prompt": PROMPT, "max_tokens": CONTEXT - 40, "temperature": 0}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as many:
            texts = [
                asyncio.create_task(many.post("/v1/completions", json=body)) for _ in range(40)
            ]
            while not all(text.done() for text in texts):
                deployments = (await many.get("/status")).json()["deployments"]
                if deployments["TextReplica"]["waiting"]:
                    break
            for text in texts:
                text.cancel()
            return deployments

    deployments = asyncio.run(busy())
    assert deployments["Gateway"] == {**idle, "slots": None, "running": None, "waiting": None}
    assert deployments["ImageReplica"] == {**idle, "slots": 1, "running": 0, "waiting": 0}
    assert deployments["TextReplica"]["waiting"] in range(1, 33)
    assert deployments["TextReplica"] == {
        **idle,
        "slots": 8,
        "running": 8,
        "waiting": deployments["TextReplica"]["waiting"],
    }
    until(
        lambda: (
            client.get("/status").json()["deployments"]["TextReplica"]
            == {**idle, "slots": 8, "running": 0, "waiting": 0}
        )
    )
    assert client.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "stream": True}
    ).is_success
    latency = client.get("/status").json()["latency_ms"]
    first_token = latency["text_time_to_first_token"]
    assert 0 < first_token["p50"] <= first_token["p99"]


def test_access_log_has_the_clients_request_id(
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


def test_prometheus_exports_what_was_counted(
    client: httpx.Client, registry_root: str, address: launch.Address
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

    text = {"deployment": "TextReplica"}
    expected: dict[str, dict[str, str]] = {
        "text_requests_total": {**text, "model": "gpt/1", "outcome": "cancelled"},
        "prompt_tokens_total": {**text, "model": "gpt/1"},
        "generation_tokens_total": {**text, "model": "gpt/2"},
        "time_to_first_token_seconds_count": {**text, "model": "gpt/1"},
        "inter_token_latency_seconds_count": {**text, "model": "gpt/1"},
        "rollouts_total": {**text, "model": "gpt/2"},
        "slots": text,
        "images_total": {"deployment": "ImageReplica", "model": "dcgan/1"},
        "image_request_seconds_count": {"deployment": "ImageReplica", "model": "dcgan/1"},
    }

    def counted() -> bool:
        """Return whether everything has been exported, which Ray does every few seconds."""
        found = scrape()
        return all(
            any(labels.items() <= one.items() for one in found.get(name, []))
            for name, labels in expected.items()
        )

    generate(client)
    with client.stream(
        "POST", "/v1/completions", json={"max_tokens": CONTEXT - 40, "stream": True}
    ) as response:
        lines = response.iter_lines()
        for _ in range(3):  # several messages, for the inter-token latency
            next(lines), next(lines)
    for version in (2, 1):
        selected = selection.select(registry_root, text=f"gpt/{version}")
        launch.deploy(selected, address, Options(max_replicas=1))
        until(functools.partial(serves, client, f"gpt/{version}"))
    until(counted)
