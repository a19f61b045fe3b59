"""The cost of the hop from gateway to engine, and what combining tokens into chunks saves.

    python -m benchmarks.serve_hop [--fast] [--storage kiln/demo] [--rounds 4] [--requests 96]
                                   [--clients 1 4 16]

Five applications of one Ray Serve instance serve the same model and get the load of serve_text.py
one after the other. The ingress runs in a process of its own (the gateway, as shipped) or in the
engine's process. A stream's tokens are sent in chunks: by default at most every 20 ms, and at most
100 chunks per second for all streams together (400 with --fast); else every 20 ms for any number
of streams, or at every step. --fast uses HAProxy and Serve's throughput-optimized mode. The last
column is the ratio of tokens per second to those of the first application.
"""

import contextlib
import math
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import completions
from benchmarks.runs import parser
from cluster import cli, machine
from serve import fast_mode

DEFAULT = 0.0
# Per application: whether the ingress runs in the engine, and its chunks per second (None: a chunk
# at every step).
APPLICATIONS = {
    "gateway, default": (False, DEFAULT),
    "gateway, every 20 ms": (False, math.inf),
    "gateway, every step": (False, None),
    "in the engine, default": (True, DEFAULT),
    "in the engine, every step": (True, None),
}


def deploy(uri: str, is_fast: bool, stack: contextlib.ExitStack) -> list[completions.Server]:
    """Deploy the applications on a private cluster that ends when `stack` closes."""
    from ray import serve  # imported late: it reads the environment that --fast sets

    from benchmarks.hop_apps import build
    from serve.deployments import Options
    from serve.launch import Address, connected

    port = machine.free_port(8000)
    stack.enter_context(connected(len(APPLICATIONS), Address("127.0.0.1", port)))
    serve.start(
        http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"}
    )
    servers = []
    default_chunks_per_s = fast_mode.CHUNKS_PER_S if is_fast else Options().chunks_per_s
    for number, (name, (in_engine, chunks_per_s)) in enumerate(APPLICATIONS.items()):
        if chunks_per_s == DEFAULT:
            chunks_per_s = default_chunks_per_s
        application = build(uri, in_engine, Options().slots, chunks_per_s)
        route = f"/application-{number}"
        serve.run(application, name=route.removeprefix("/"), route_prefix=route)
        url = f"http://127.0.0.1:{port}{route}"
        servers.append(completions.Server(name, url, completions.stream_completion))
    stack.callback(serve.shutdown)
    return servers


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    completions.add_options(options)
    options.add_argument(
        "--fast", action="store_true", help="use HAProxy and Serve's throughput-optimized mode"
    )
    arguments = options.parse_args(argv)
    os.environ["RAY_ADDRESS"] = ""  # so that it starts a private cluster
    with contextlib.ExitStack() as stack:
        if arguments.fast:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="raykiln-"))
            os.environ.update(fast_mode.environment(Path(scratch)))
        _, _, folder = completions.find_model(arguments, stack)
        servers = deploy(folder, arguments.fast, stack)
        rounds = completions.rounds_of_requests(folder, arguments)
        print(completions.compare(servers, rounds, arguments.clients, servers[0].name))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
