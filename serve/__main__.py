"""python -m serve up [--text REF] [--image REF] [--port 8000] | status | down

`up` serves the registry's models on the cluster of RAY_ADDRESS, or on a private cluster that ends
with the command.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cluster import cli, storage
from models.runtime import PROVIDERS
from serve import fast_mode
from serve import status as server_status
from serve.text import blocklist


def main(argv: list[str]) -> int:
    return program().main(argv)


def program() -> cli.Program:
    serve = cli.Program("serve", "Serve the registry's models over HTTP.")
    _add_up(serve)
    status_parser = serve.command(
        "status",
        status,
        "show what is served: models, replicas, load, latency",
        storage=None,
        prints_json=True,
    )
    status_parser.add_argument(
        "--host", default="127.0.0.1", help="address of the server (default: %(default)s)"
    )
    status_parser.add_argument(
        "--port", type=cli.port, default=8000, help="port of the server (default: %(default)s)"
    )
    serve.command("down", down, "stop serving on the cluster of RAY_ADDRESS", storage=None)
    return serve


def _add_up(program: cli.Program) -> None:
    parser = program.command(
        "up",
        up,
        "serve, or change what is served",
        storage="where models/ is",
        epilog=cli.REFERENCE,
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0: all interfaces, without any authentication "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=cli.port, default=8000, help="port to listen at (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        metavar="REF",
        help="text model (default: the registry's production model, or else its newest)",
    )
    parser.add_argument("--image", metavar="REF", help="image model (default: as for --text)")
    parser.add_argument(
        "--slots",
        type=int,
        default=8,
        help="texts that a replica generates at once (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPUs per replica (default: %(default)s, best for tiny models)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=list(PROVIDERS),
        help="execution providers, best first (default: the best that works)",
    )
    parser.add_argument(
        "--max-replicas",
        type=int,
        default=4,
        help="replicas per model under load (default: %(default)s)",
    )
    blocked = parser.add_mutually_exclusive_group()
    blocked.add_argument(
        "--blocklist",
        metavar="FILE",
        help="words and phrases, one per line, that no prompt and no text may contain",
    )
    blocked.add_argument(
        "--no-blocklist",
        action="store_true",
        help="remove the blocklist from what is already served",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="use HAProxy and Ray Serve's throughput-optimized mode; opens two more ports, see "
        "docs/guides/serving.md",
    )
    parser.add_argument(
        "--detach", action="store_true", help="leave it running on the cluster of RAY_ADDRESS"
    )


def up(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C, or leave it running with --detach."""
    if arguments.detach and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "--detach needs a cluster that keeps running, and RAY_ADDRESS is not set: "
            "start one with `python -m cluster up`"
        )
    if arguments.fast and os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "--fast is for a private cluster, and RAY_ADDRESS names a running one: "
            "unset it, or leave --fast out"
        )
    for option in ("slots", "threads", "max_replicas"):
        value = getattr(arguments, option)
        if value < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}: use 1 or more")
    with _fast_mode() if arguments.fast else contextlib.nullcontext():
        return _serve(arguments)


@contextlib.contextmanager
def _fast_mode() -> Iterator[None]:
    # A short path, because the length of a socket's path is limited.
    with tempfile.TemporaryDirectory(prefix="raykiln-") as folder:
        os.environ.update(fast_mode.environment(Path(folder)))
        ports = [os.environ[f"RAY_SERVE_HAPROXY_{page}_PORT"] for page in ("STATS", "METRICS")]
        print(
            "HAProxy shows its statistics on all interfaces, at the ports "
            f"{' and '.join(ports)}: block access from other machines",
            flush=True,
        )
        yield


def _serve(arguments: argparse.Namespace) -> int:
    # Ray takes seconds to import: only after the arguments were checked, and after --fast has set
    # its environment.
    from serve import launch, selection
    from serve.deployments import Options

    blocked = [] if arguments.blocklist is None else blocklist.read(arguments.blocklist)
    # On a cluster, the replicas' machines need the GPU, not this one.
    providers = None if os.environ.get("RAY_ADDRESS") else arguments.providers
    root = storage.join(cli.storage_of(arguments), "models")
    selected = selection.select(root, arguments.text, arguments.image, providers)
    address = launch.Address(arguments.host, arguments.port)
    options = Options(
        slots=arguments.slots,
        threads=arguments.threads,
        providers=arguments.providers,
        max_replicas=arguments.max_replicas,
        blocklist=blocked,
    )
    if arguments.fast:
        options.chunks_per_s = fast_mode.CHUNKS_PER_S
    for bundle in selected.values():
        kind, run = bundle.manifest["kind"], bundle.manifest["run"]["name"]
        print(f"serving {bundle.reference} ({kind}, from run {run})", flush=True)
    with launch.connected(options.threads * len(selected), address) as private:
        was_served = launch.is_served()
        if was_served and not arguments.detach:
            raise ValueError(
                "this cluster already serves: change what it serves with --detach, "
                "or stop it first with `python -m serve down`"
            )
        current = launch.current_options()
        if current is not None and current.blocklist and not (blocked or arguments.no_blocklist):
            raise ValueError(
                f"what is served has a blocklist of {len(current.blocklist)} phrases: "
                "give --blocklist again, or --no-blocklist to serve without one"
            )
        stays = was_served
        try:
            launch.deploy(selected, address, options)
            stays = arguments.detach
            for reference, used in launch.providers_in_use(selected).items():
                runs_on = ", ".join(used) if used else "unknown providers (no replica answers yet)"
                print(f"{reference} runs on {runs_on}", flush=True)
            url, metrics_url = address.url, launch.metrics_url()
            print(f"\n  studio  {url}/", flush=True)
            print(f"  API     {url}/v1   (OpenAPI: {url}/docs)", flush=True)
            print(f"  metrics {metrics_url}   (for Prometheus, of this node)\n", flush=True)
            print("`python -m serve down` stops it" if stays else "Ctrl-C stops it", flush=True)
            if not stays:
                launch.wait_for_interrupt()
        finally:
            if not stays:
                launch.remove(keep_serve=private)  # a private cluster ends together with Ray Serve
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Ask the running server; return 1 if none answers."""
    try:
        result = server_status.read(f"http://{arguments.host}:{arguments.port}")
    except server_status.NoServer as error:
        print(error, file=sys.stderr if arguments.json else sys.stdout)
        return 1
    if arguments.json:
        cli.print_json(result)
    else:
        for table in server_status.tables(result):
            Console().print(table)
    return 0


def down(arguments: argparse.Namespace) -> int:
    """Remove the application from the cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "RAY_ADDRESS is not set, so there is no cluster to look at: "
            "a `serve up` in the foreground is stopped with Ctrl-C"
        )
    from cluster.connect import connect
    from serve import launch

    connect()
    removed = launch.remove()
    print("removed from the cluster" if removed else "raykiln does not serve on this cluster")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
