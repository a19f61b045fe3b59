"""`python -m serve` against a cluster that serves."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from cluster.machine import free_port
from serve import launch, selection
from serve.deployments import Options
from tests.support.served import stream


def test_commands_change_and_show_what_a_cluster_serves(
    client: httpx.Client, registry_root: str, address: launch.Address, command: Callable[..., Any]
) -> None:
    up = [
        "serve",
        "up",
        "--storage",
        str(Path(registry_root).parent),
        "--max-replicas",
        "1",
        "--port",
        str(address.port),
    ]
    stream(client, max_tokens=1)  # for the latency in /status
    try:
        changed = command(*up, "--text", "gpt/2", "--detach")
        assert (changed.returncode, changed.stderr) == (0, "")
        assert f"studio  http://localhost:{address.port}/" in changed.stdout
        assert "gpt/2 runs on CPUExecutionProvider\n" in changed.stdout
        assert f"metrics {launch.metrics_url()}" in changed.stdout
        status = command("serve", "status", "--port", str(address.port))
        assert status.returncode == 0
        assert "gpt/2" in status.stdout
        load = r"TextReplica +│ HEALTHY +│ 1 of 1 +│ 8 +│ 0 +│ 0 "
        assert re.search(load, status.stdout), status.stdout
        percentiles = r"text_time_to_first_token +│ [0-9]+\.[0-9] +│ [0-9]+\.[0-9] "
        assert re.search(percentiles, status.stdout), status.stdout
        as_json = command("serve", "status", "--port", str(address.port), "--json")
        result = json.loads(as_json.stdout)
        assert [(model["id"], model["version"]) for model in result["models"]] == [
            ("gpt", 2),
            ("dcgan", 1),
        ]
        assert result["deployments"]["TextReplica"]["slots"] == 8
        assert set(result["latency_ms"]) == {"text_time_to_first_token", "image"}
        refused = command(*up)
        assert (
            refused.returncode,
            "this cluster already serves: change what it serves with --detach" in refused.stderr,
        ) == (2, True)
        elsewhere = command(*up[:-1], str(free_port()), "--detach")
        assert (
            elsewhere.returncode,
            f"Ray Serve already runs on this cluster at {address.url}" in elsewhere.stderr,
        ) == (2, True)
        with_blocklist = Options(max_replicas=1, blocklist=["verboten"])
        launch.deploy(selection.select(registry_root), address, with_blocklist)
        without_blocklist = command(*up, "--detach")
        assert (
            without_blocklist.returncode,
            "has a blocklist of 1 phrases: give --blocklist again" in without_blocklist.stderr,
        ) == (2, True)
        assert client.post("/v1/completions", json={"prompt": "verboten"}).status_code == 400
    finally:
        launch.deploy(selection.select(registry_root), address, Options(max_replicas=1))
    unused = str(free_port())
    assert command("serve", "status", "--port", unused).returncode == 1
    as_json = command("serve", "status", "--port", unused, "--json")
    assert (as_json.returncode, as_json.stdout) == (1, "")
