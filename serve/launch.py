"""Deploy the application to a Ray cluster, and remove it.

The application is deployed as a Serve config, never by `serve.run`: if only the URI of a bundle
changes, Ray Serve changes the deployment's `user_config`, and its replicas load the other version
in place (`serve.replicas`).
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

# The only way to deploy a config without the dashboard's REST API.
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster.connect import connect
from serve.deployments import Options
from serve.remote import DESCRIBE_TIMEOUT_S, UNREACHABLE
from serve.selection import SelectedBundle

APPLICATION = "raykiln"
DEPLOYMENTS = {"text": "TextReplica", "image": "ImageReplica"}  # by modality
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        host = "localhost" if self.host in ("127.0.0.1", "0.0.0.0") else self.host
        return f"http://{host}:{self.port}"


# ---- up


def deploy(selected: dict[str, SelectedBundle], address: Address, options: Options) -> None:
    """Serve bundles on the cluster that this process is connected to; return once they answer.

    If the application is running, its replicas load other bundles in place. If they fail to, the
    previous bundles are deployed again.

    Args:
        selected: the bundles, by modality.

    Raises:
        ValueError: Ray Serve listens at another address, the port is in use, or the application did
            not start.
    """
    running = running_address()
    if running is None:
        check_port(address)
        serve.start(
            http_options={"host": address.host, "port": address.port},
            logging_config={"log_level": "WARNING"},
        )
    elif running != address:
        raise ValueError(
            f"Ray Serve already runs on this cluster at {running.url}: use its --host and --port, "
            "or stop it with `python -m serve down`"
        )
    before = _deployed()
    try:
        _apply(config(selected, options))
    except ValueError:
        # A replica that fails to load a bundle is stopped, and its successor fails as well.
        if before is not None and is_served():
            _apply(before)
        raise


def current_options() -> Options | None:
    """Return the options of the running application; None if it is not running."""
    before = _deployed()
    return None if before is None else Options.model_validate(before["applications"][0]["args"])


def providers_in_use(selected: dict[str, SelectedBundle]) -> dict[str, list[str] | None]:
    """Ask a replica of each bundle for its execution providers; None if none answers."""

    async def ask() -> dict[str, list[str] | None]:
        found: dict[str, list[str] | None] = {}
        for modality, bundle in selected.items():
            found[bundle.reference] = None
            with contextlib.suppress(*UNREACHABLE):
                async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                    handle = serve.get_deployment_handle(DEPLOYMENTS[modality], APPLICATION)
                    model = await handle.describe.remote()
                found[bundle.reference] = model.providers
        return found

    # Fast mode can create handles on an event loop only.
    return asyncio.run(ask())


def _apply(serve_config: dict[str, Any]) -> None:
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(serve_config))
    _wait_until_running()


def _deployed() -> dict[str, Any] | None:
    """Return the Serve config of the running application; None if it is not running."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    application = client.get_serve_details()["applications"].get(APPLICATION)
    if application is None or application["status"] != ApplicationStatus.RUNNING:
        return None
    return {"applications": [application["deployed_app_config"]]}


def config(selected: dict[str, SelectedBundle], options: Options) -> dict[str, Any]:
    """Return the Serve config of the application; Ray's `serve deploy` accepts it as well."""
    args = options.model_copy(update={modality: modality in selected for modality in DEPLOYMENTS})
    deployments = [
        {"name": DEPLOYMENTS[modality], "user_config": {"uri": bundle.uri}}
        for modality, bundle in selected.items()
    ]
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serve.deployments:build",
        "args": args.model_dump(),
        # The gateway writes its own access log (`serve.http.access_log`).
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "deployments": deployments,
    }
    return {"applications": [application]}


def check_port(address: Address) -> None:
    """Raise ValueError if the port is in use."""
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        # As uvicorn does: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise ValueError(
                f"{address.host}:{address.port} cannot be used ({error.strerror}): "
                "choose another with --port or --host"
            ) from error


def running_address() -> Address | None:
    """Return where Ray Serve listens on this cluster; None if it is not running."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else Address(client.http_config.host, client.http_config.port)


def metrics_url() -> str:
    """Return the URL of the Prometheus metrics of this process's node."""
    node_id = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()
    (node,) = (node for node in nodes if node["NodeID"] == node_id)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _wait_until_running() -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is None:
            raise ValueError(
                "the application was removed from the cluster while it started: "
                "another process ran `python -m serve down`"
            )
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            raise ValueError(f"the models could not be served: {application.message}")
        if time.monotonic() > deadline:
            status = application.message or application.status.value
            raise ValueError(
                f"the models were not ready after {START_TIMEOUT_S:g} s ({status}): "
                "check with `ray status` that the cluster has a free CPU for each of them"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def connected(num_replicas_cpus: int, address: Address) -> Iterator[bool]:
    """Connect this process to the cluster of RAY_ADDRESS, or to a private one.

    Yields whether the cluster is private. A private cluster ends with the block.

    Args:
        num_replicas_cpus: the minimum number of logical CPUs of a private cluster.
        address: checked before a private cluster is started.
    """
    if not os.environ.get("RAY_ADDRESS"):
        check_port(address)
    private = connect(num_cpus=max(os.cpu_count() or 1, num_replicas_cpus))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield private
    finally:
        ray.shutdown()


def wait_for_interrupt() -> None:
    """Return on Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()


# ---- down


def is_served() -> bool:
    """Return whether the application is on the cluster that this process is connected to."""
    return running_address() is not None and APPLICATION in serve.status().applications


def remove(keep_serve: bool = False) -> bool:
    """Remove the application from the cluster once its requests have ended.

    Args:
        keep_serve: do not stop Ray Serve itself. By default it is stopped if it serves no other
            application.

    Returns:
        False if the application was not there.
    """
    if not is_served():
        return False
    serve.delete(APPLICATION)
    if not keep_serve and not serve.status().applications:
        serve.shutdown()
    return True
