"""Puts the registry's bundles on a Ray cluster, and takes them off again: what `python -m serve` does.

The application is deployed as a Serve config, never by `serve.run`: the same config with another bundle's URI then changes a
deployment's `user_config` alone, and its replicas swap versions in place (`serve.replicas`).
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
from ray.serve.context import (
    _get_global_client,
)  # the only way to deploy a config without the dashboard's REST API
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster import storage
from cluster.connect import connect
from models import bundle, registry
from serve.deployments import Options
from serve.gateway import DESCRIBE_TIMEOUT_S, UNREACHABLE
from serve.session import ImageSession, TextSession, open_bundle

APPLICATION = "raykiln"
DEPLOYMENTS = {"gpt": "Text", "gan": "Pictures"}
START_TIMEOUT_S = 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """A verified bundle that is to be served."""

    name: str
    version: int
    uri: str
    manifest: bundle.Manifest

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{'localhost' if self.host in ('127.0.0.1', '0.0.0.0') else self.host}:{self.port}"


# ---- which bundles


def choose(
    root: str,
    text: str | None = None,
    images: str | None = None,
    providers: list[str] | None = None,
) -> dict[str, Chosen]:
    """The bundles to serve, by kind ("gpt", "gan"); a kind that the registry has no model of is left out.

    Args:
        root: the registry, `<storage>/models`.
        text, images: references such as gpt, gpt/3 or gpt@production; by default the kind's model whose alias production is
            set, or else its newest.
        providers: execution providers to open them on (`models.runtime.PROVIDERS`); by default the best that this machine has.

    Raises:
        ValueError: nothing to serve, an unknown reference, one of the wrong kind, a bundle that is damaged or does not
            answer as recorded, or a provider that this machine does not have.
    """
    root = storage.absolute(root)  # replicas run in other folders
    references = {
        kind: reference
        for kind, reference in (("gpt", text), ("gan", images))
        if reference is not None
    }
    if len(references) < len(DEPLOYMENTS):
        references = _defaults(root) | references
    if not references:
        raise ValueError(
            f"{root} holds no model to serve: train one and export it with `python -m train export RUN`"
        )
    return {
        kind: _verified(root, kind, reference, providers) for kind, reference in references.items()
    }


def _defaults(root: str) -> dict[str, str]:
    """By kind, the name that is served where none was asked for; a name that stands for nothing is passed over."""
    found: dict[str, list[tuple[bool, str, str]]] = {}
    for name in registry.names(root):
        try:
            manifest = bundle.read(registry.resolve(root, name)[2])
            in_production = registry.PRODUCTION in registry.aliases(root, name)
        except ValueError as error:
            logger.warning("%s is passed over: %s", name, error)
            continue
        found.setdefault(manifest["kind"], []).append((in_production, manifest["created"], name))
    return {kind: max(candidates)[2] for kind, candidates in found.items()}


def _verified(root: str, kind: str, reference: str, providers: list[str] | None) -> Chosen:
    """Opened here as a replica will: one that could not would take what is served down with it (`deploy`)."""
    name, version, uri = registry.resolve(root, reference)
    manifest = bundle.read(uri)
    if manifest["kind"] != kind:
        option = {"gpt": "--text", "gan": "--images"}[kind]
        raise ValueError(
            f"{option} {reference} is a bundle of kind {manifest['kind']}: give it one of kind {kind}"
        )
    try:
        if kind == "gpt":
            open_bundle(TextSession, uri, slots=1, providers=providers)
        else:
            open_bundle(ImageSession, uri, providers=providers)
    except ValueError as error:
        raise ValueError(f"{name}/{version} cannot be served: {error}") from error
    return Chosen(name, version, uri, manifest)


# ---- up


def deploy(chosen: dict[str, Chosen], address: Address, options: Options) -> None:
    """Serves the bundles on the cluster that this process is connected to, and returns once they answer.

    Where the application runs already, other bundles swap in place; where they fail to, what was served before is again.

    Raises:
        ValueError: Serve runs at another address already, the port is taken, or the application did not start.
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
            f"Serve runs on this cluster at {running.url} already: use its --host and --port, or end it with `python -m serve down`"
        )
    before = _deployed()
    try:
        _apply(config(chosen, options))
    except ValueError:
        # A replica that fails to swap is stopped, and the next one would try the same bundle.
        if before is not None and is_served():
            _apply(before)
        raise


def options_in_force() -> Options | None:
    """Those of the application as it runs now; None where it does not."""
    before = _deployed()
    return None if before is None else Options.model_validate(before["applications"][0]["args"])


def running_on(chosen: dict[str, Chosen]) -> dict[str, list[str] | None]:
    """The execution providers of each bundle that is served, as a replica of it says; None where none answers."""

    async def ask() -> dict[
        str, list[str] | None
    ]:  # on an event loop, without which handles can't be made in the fast mode
        found: dict[str, list[str] | None] = {}
        for kind, served in chosen.items():
            found[served.reference] = None
            with contextlib.suppress(*UNREACHABLE):
                async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                    model = await serve.get_deployment_handle(
                        DEPLOYMENTS[kind], APPLICATION
                    ).describe.remote()
                found[served.reference] = model.providers
        return found

    return asyncio.run(ask())


def _apply(serve_config: dict[str, Any]) -> None:
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(serve_config))
    _wait_until_running()


def _deployed() -> dict[str, Any] | None:
    """The Serve config of the application as it runs now; None where it does not."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    application = client.get_serve_details()["applications"].get(APPLICATION)
    if application is None or application["status"] != ApplicationStatus.RUNNING:
        return None
    return {"applications": [application["deployed_app_config"]]}


def config(chosen: dict[str, Chosen], options: Options) -> dict[str, Any]:
    """The Serve config of the application; `serve deploy` takes it as well."""
    args = options.model_copy(update={"text": "gpt" in chosen, "images": "gan" in chosen})
    deployments = [
        {"name": DEPLOYMENTS[kind], "user_config": {"uri": served.uri}}
        for kind, served in chosen.items()
    ]
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serve.deployments:build",
        "args": args.model_dump(),
        "logging_config": {
            "log_level": "WARNING",
            "enable_access_log": False,
        },  # the gateway has its own (`serve.access_log`)
        "deployments": deployments,
    }
    return {"applications": [application]}


def check_port(address: Address) -> None:
    """Raises ValueError where something else listens at the address."""
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as uvicorn does: a port in TIME_WAIT is free
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise ValueError(
                f"{address.host}:{address.port} cannot be used ({error.strerror}): choose another with --port or --host"
            ) from error


def running_address() -> Address | None:
    """Where Serve listens on this cluster; None where it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else Address(client.http_config.host, client.http_config.port)


def metrics_url() -> str:
    """Where Prometheus finds the metrics of this process' node."""
    node_id = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _wait_until_running() -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is None:
            raise ValueError(
                "the models were taken off the cluster while they started: somebody ran `python -m serve down`"
            )
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            raise ValueError(f"the models could not be served: {application.message}")
        if time.monotonic() > deadline:
            raise ValueError(
                f"the models were not ready after {START_TIMEOUT_S:g} s ({application.message or application.status.value}): "
                "see `ray status` for whether the cluster has a free CPU for each of them"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def connected(num_replicas_cpus: int, address: Address) -> Iterator[bool]:
    """This process on a cluster: the one of RAY_ADDRESS, or a private one (True) that ends with the block.

    Args:
        num_replicas_cpus: logical CPUs that a private cluster must have at least.
    """
    if not os.environ.get("RAY_ADDRESS"):
        check_port(address)  # before a cluster is started for nothing
    private = connect(num_cpus=max(os.cpu_count() or 1, num_replicas_cpus))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield private
    finally:
        ray.shutdown()


def wait_for_interrupt() -> None:
    """Returns at Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()


# ---- down


def is_served() -> bool:
    """Whether the application is on the cluster that this process is connected to."""
    return running_address() is not None and APPLICATION in serve.status().applications


def remove(keep_serve: bool = False) -> bool:
    """Takes the application off the cluster once its requests are answered; False where it was not there.

    Args:
        keep_serve: leave Serve itself, which otherwise goes where nothing else is served by it.
    """
    if not is_served():
        return False
    serve.delete(APPLICATION)
    if not keep_serve and not serve.status().applications:
        serve.shutdown()
    return True
