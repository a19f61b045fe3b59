"""What a running server serves, for `python -m serve status`."""

import contextlib
from typing import Any

import httpx
from rich.table import Table

from models import bundle

TIMEOUT_S = 15.0
LOAD = ("slots", "running", "waiting")


class NoServer(Exception):
    """No raykiln server answers at an address; `str()` says why."""


def read(url: str) -> dict[str, Any]:
    """Ask the server at `url` what it serves.

    Returns:
        `url`, `models` (/v1/models), and `deployments` and `latency_ms` (/status), which are None
        if Ray Serve's controller does not answer.

    Raises:
        NoServer: no server answers, or it is not raykiln.
    """
    result: dict[str, Any] = {"url": url, "models": [], "deployments": None, "latency_ms": None}
    # Without proxies from the environment: the server may be on this machine.
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        try:
            response = client.get("/v1/models").raise_for_status()
        except httpx.HTTPError as error:
            raise NoServer(f"no server answers at {url}: {error}") from error
        try:
            result["models"] = response.json()["data"]
            _models(url, result["models"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NoServer(
                f"the server at {url} is not raykiln: its /v1/models lists no bundles"
            ) from error
        with contextlib.suppress(httpx.HTTPError):
            seen = client.get("/status").raise_for_status().json()
            result |= {key: seen[key] for key in ("deployments", "latency_ms")}
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what `read` returned as tables for the terminal."""
    shown = [_models(result["url"], result["models"])]
    if result["deployments"] is not None:
        shown += [_deployments(result["deployments"]), _latency(result["latency_ms"])]
    return shown


def _models(url: str, models: list[dict[str, Any]]) -> Table:
    table = Table("model", "kind", "runs on", "from run", "metrics", title=url)
    for model in models:
        metrics = ", ".join(
            f"{name} {value:.4g}"
            for name, value in model["metrics"].items()
            if name in bundle.HEADLINE_METRICS
        )
        table.add_row(
            f"{model['id']}/{model['version']}",
            model["kind"],
            model["providers"][0].removesuffix("ExecutionProvider"),
            str(model["run"]["name"]),
            metrics,
        )
    return table


def _deployments(deployments: dict[str, dict[str, Any]]) -> Table:
    table = Table("deployment", "status", "replicas", *LOAD)
    for name, facts in deployments.items():
        replicas = f"{facts['replicas']} of {facts['target']}"
        if facts["starting"]:
            replicas += f", {facts['starting']} starting"
        load = ("" if facts[key] is None else str(facts[key]) for key in LOAD)
        table.add_row(name, facts["status"], replicas, *load)
    return table


def _latency(latency_ms: dict[str, dict[str, float | None]]) -> Table:
    table = Table("latency", "p50 ms", "p99 ms")
    for name, percentiles in latency_ms.items():
        values = ("" if value is None else f"{value:.1f}" for value in percentiles.values())
        table.add_row(name, *values)
    return table
