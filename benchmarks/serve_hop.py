"""What the hop from gateway to engine costs a stream, and what saves it: sending tokens together, or the ingress on the engine.

    python -m benchmarks.serve_hop [--fast] [--storage kiln/demo] [--rounds 4] [--requests 96] [--clients 1 4 16]

Five applications of one Ray Serve instance serve the same model, and are asked in turn as in serve_text.py: HTTP in a process of its own
(the gateway, as shipped) or in the engine's process, and a stream's tokens sent together (as shipped: at most every 20 ms, and at most 100
times a second from all streams together, 400 with --fast), every 20 ms however many there are, or with every step. --fast: with HAProxy, in Serve's throughput-optimised mode.
The last column is tokens a second over those of the first, as shipped.
"""

import argparse
import contextlib
import math
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import completions
from cluster import cli, machine
from serve import fast

AS_SHIPPED = 0.0
WAYS = {  # of each application: whether the ingress is on the engine, and its chunks a second (None: with every step)
    "gateway, together": (False, AS_SHIPPED),
    "gateway, every 20 ms": (False, math.inf),
    "gateway, every step": (False, None),
    "on the engine, together": (True, AS_SHIPPED),
    "on the engine, every step": (True, None),
}


def deploy(uri: str, is_fast: bool, stack: contextlib.ExitStack) -> list[completions.Server]:
    """Each way, on a private cluster that goes with `stack`."""
    from ray import serve  # reads the environment that --fast sets

    from benchmarks.hop_apps import build
    from serve.deployments import Options
    from serve.launch import Address, connected

    port = machine.free_port(8000)
    stack.enter_context(connected(len(WAYS), Address("127.0.0.1", port)))
    serve.start(
        http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"}
    )
    servers = []
    shipped = fast.CHUNKS_PER_S if is_fast else Options().chunks_per_s
    for number, (name, (near, chunks_per_s)) in enumerate(WAYS.items()):
        application = build(
            uri, near, Options().slots, shipped if chunks_per_s == AS_SHIPPED else chunks_per_s
        )
        serve.run(application, name=f"way-{number}", route_prefix=f"/way-{number}")
        servers.append(
            completions.Server(name, f"http://127.0.0.1:{port}/way-{number}", completions.ask_us)
        )
    stack.callback(serve.shutdown)
    return servers


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    completions.add_options(options)
    options.add_argument(
        "--fast", action="store_true", help="Serve's HAProxy and throughput-optimised modes"
    )
    given = options.parse_args(argv)
    os.environ["RAY_ADDRESS"] = ""  # a cluster of its own
    with contextlib.ExitStack() as stack:
        if given.fast:
            os.environ.update(
                fast.environment(
                    Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raykiln-")))
                )
            )
        _, _, folder = completions.find_model(given, stack)
        servers = deploy(folder, given.fast, stack)
        rounds = completions.rounds_of_requests(folder, given)
        print(completions.compare(servers, rounds, given.clients, servers[0].name))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
