"""python -m serve up [--text REF] [--images REF] [--port 8000] | status | down

`up` serves the registry's models on the cluster of RAY_ADDRESS, or on a private one that lives as long as the command.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cluster import cli, storage
from models import bundle
from models.runtime import PROVIDERS
from serve import blocklist, fast


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    actions = {"up": up, "status": status, "down": down}
    return actions[arguments.action](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Serves the registry's models over HTTP."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    address = argparse.ArgumentParser(add_help=False)
    address.add_argument(
        "--host",
        default="127.0.0.1",
        help="where to listen; 0.0.0.0: on all interfaces, without any authentication",
    )
    address.add_argument("--port", type=cli.port, default=8000)
    start = actions.add_parser(
        "up", parents=[address], help="serve, or change what is served", epilog=cli.REFERENCE
    )
    start.add_argument(
        "--storage",
        default=cli.storage_default(),
        metavar="URI",
        help="where models/ lies (KILN_STORAGE; default ./kiln)",
    )
    start.add_argument(
        "--text",
        metavar="REF",
        help="the text model; by default the registry's in production, or its newest",
    )
    start.add_argument("--images", metavar="REF", help="the picture model, likewise")
    start.add_argument(
        "--slots", type=int, default=8, help="texts that a replica writes at once (8)"
    )
    start.add_argument(
        "--threads", type=int, default=1, help="CPUs of a replica (1: best for tiny models)"
    )
    start.add_argument(
        "--providers",
        nargs="+",
        choices=list(PROVIDERS),
        help="what to run on, best first (default: the best that works)",
    )
    start.add_argument(
        "--max-replicas", type=int, default=4, help="replicas of a model under load (4)"
    )
    blocked = start.add_mutually_exclusive_group()
    blocked.add_argument(
        "--blocklist",
        metavar="FILE",
        help="words and phrases, a line each, that no prompt and no text may have",
    )
    blocked.add_argument(
        "--no-blocklist",
        action="store_true",
        help="take off the blocklist of what is served already",
    )
    start.add_argument(
        "--fast",
        action="store_true",
        help="HAProxy and Serve's throughput-optimised mode; opens two more ports: docs/guides/serving.md",
    )
    start.add_argument(
        "--detach", action="store_true", help="leave it running on the cluster of RAY_ADDRESS"
    )
    actions.add_parser(
        "status", parents=[address], help="what is served: models, replicas, load, latency"
    )
    actions.add_parser("down", help="take it off the cluster of RAY_ADDRESS")
    return parser


def up(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C, or leaves it running with --detach."""
    if arguments.detach and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "--detach needs a cluster to stay on, and RAY_ADDRESS is not set: start one with `python -m cluster up`"
        )
    if arguments.fast and os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "--fast is for a private cluster, and RAY_ADDRESS names one that runs already: unset it, or leave --fast out"
        )
    for option in ("slots", "threads", "max_replicas"):
        if getattr(arguments, option) < 1:
            raise ValueError(
                f"--{option.replace('_', '-')} is {getattr(arguments, option)}: use 1 or more"
            )
    with _fast_mode() if arguments.fast else contextlib.nullcontext():
        return _serve(arguments)


@contextlib.contextmanager
def _fast_mode() -> Iterator[None]:
    with tempfile.TemporaryDirectory(
        prefix="raykiln-"
    ) as folder:  # short, as a socket's path must be
        os.environ.update(fast.environment(Path(folder)))
        ports = [os.environ[f"RAY_SERVE_HAPROXY_{page}_PORT"] for page in ("STATS", "METRICS")]
        print(
            f"HAProxy shows its statistics on all interfaces, at the ports {' and '.join(ports)}: keep strangers from them",
            flush=True,
        )
        yield


def _serve(arguments: argparse.Namespace) -> int:
    from serve import (
        launch,
    )  # Ray takes seconds to import: not before what was asked for is known to make sense
    from serve.deployments import Options

    blocked = [] if arguments.blocklist is None else blocklist.read(arguments.blocklist)
    # On a cluster it is the replicas' machines that need a GPU, not this one.
    here = None if os.environ.get("RAY_ADDRESS") else arguments.providers
    chosen = launch.choose(
        storage.join(arguments.storage, "models"), arguments.text, arguments.images, here
    )
    address = launch.Address(arguments.host, arguments.port)
    options = Options(
        slots=arguments.slots,
        threads=arguments.threads,
        providers=arguments.providers,
        max_replicas=arguments.max_replicas,
        blocklist=blocked,
    )
    if arguments.fast:
        options.chunks_per_s = fast.CHUNKS_PER_S
    for served in chosen.values():
        print(
            f"serving {served.reference} ({served.manifest['kind']}, from run {served.manifest['run']['name']})",
            flush=True,
        )
    with launch.connected(options.threads * len(chosen), address) as private:
        was_served = launch.is_served()
        if was_served and not arguments.detach:
            raise ValueError(
                "this cluster serves already: change what it serves with --detach, or end it first with `python -m serve down`"
            )
        before = launch.options_in_force()
        if before is not None and before.blocklist and not (blocked or arguments.no_blocklist):
            raise ValueError(
                f"what is served has a blocklist of {len(before.blocklist)} phrases: give --blocklist again, or --no-blocklist to serve without one"
            )
        stays = was_served
        try:
            launch.deploy(chosen, address, options)
            stays = arguments.detach
            for reference, providers in launch.running_on(chosen).items():
                print(
                    f"{reference} runs on {', '.join(providers)}"
                    if providers
                    else f"{reference} does not say yet what it runs on",
                    flush=True,
                )
            print(
                f"\n  studio  {address.url}/\n  API     {address.url}/v1   (OpenAPI: {address.url}/docs)",
                flush=True,
            )
            print(
                f"  metrics {launch.metrics_url()}   (for Prometheus; each node of a cluster has its own)\n",
                flush=True,
            )
            print("`python -m serve down` ends it" if stays else "Ctrl-C ends it", flush=True)
            if not stays:
                launch.wait_for_interrupt()
        finally:
            if not stays:
                launch.remove(keep_serve=private)  # which a private cluster takes along
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Asks the running server; exit code 1 where none answers."""
    url = f"http://{arguments.host}:{arguments.port}"
    with httpx.Client(
        base_url=url, timeout=15, trust_env=False
    ) as client:  # past any proxy: it may be this machine
        try:
            models = client.get("/v1/models").raise_for_status()
        except httpx.HTTPError as error:
            print(f"nothing serves at {url}: {error}")
            return 1
        try:
            tables = [_models(url, models.json()["data"])]
        except (ValueError, LookupError, TypeError, AttributeError):
            print(f"what serves at {url} is no raykiln: its /v1/models lists no bundles")
            return 1
        with contextlib.suppress(
            httpx.HTTPError
        ):  # where Serve's controller is away, the models are told all the same
            seen = client.get("/status").raise_for_status().json()
            tables += [_deployments(seen["deployments"]), _latency(seen["latency_ms"])]
    for table in tables:
        Console().print(table)
    return 0


def _models(url: str, models: list[dict[str, Any]]) -> Table:
    table = Table("model", "kind", "runs on", "from run", "metrics", title=url)
    for model in models:
        metrics = ", ".join(
            f"{name} {value:.4g}"
            for name, value in model["metrics"].items()
            if name in bundle.HEADLINES
        )
        runs_on = model["providers"][0].removesuffix("ExecutionProvider")
        table.add_row(
            f"{model['id']}/{model['version']}",
            model["kind"],
            runs_on,
            str(model["run"]["name"]),
            metrics,
        )
    return table


def _deployments(deployments: dict[str, dict[str, Any]]) -> Table:
    load = ("slots", "running", "waiting")
    table = Table("deployment", "status", "replicas", *load)
    for name, facts in deployments.items():
        replicas = f"{facts['replicas']} of {facts['target']}" + (
            f", {facts['starting']} starting" if facts["starting"] else ""
        )
        table.add_row(
            name,
            facts["status"],
            replicas,
            *("" if facts[figure] is None else str(facts[figure]) for figure in load),
        )
    return table


def _latency(latency_ms: dict[str, dict[str, float | None]]) -> Table:
    table = Table("latency", "p50 ms", "p99 ms")
    for kind, percentiles in latency_ms.items():
        table.add_row(
            kind, *("" if value is None else f"{value:.1f}" for value in percentiles.values())
        )
    return table


def down(arguments: argparse.Namespace) -> int:
    """Removes the application from the cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "RAY_ADDRESS is not set, so there is no cluster to look at: a `serve up` in the foreground ends with Ctrl-C"
        )
    from cluster.connect import connect
    from serve import launch

    connect()
    print(
        "taken off the cluster" if launch.remove() else "nothing of ours is served on this cluster"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
