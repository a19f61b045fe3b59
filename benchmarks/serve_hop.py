"""What the hop from gateway to engine costs a stream, and what saves it: sending tokens together, or the ingress on the engine.

    python benchmarks/serve_hop.py [--fast] [--storage kiln/demo] [--rounds 4] [--requests 96] [--clients 1 4 16]

Four applications of one Ray Serve instance serve the same model, and are asked in turn as in serve_text.py: HTTP in a process of its own
(the gateway, as shipped) or in the engine's process, and a stream's tokens sent together at most every 20 ms (as shipped) or with every
step. --fast: with HAProxy, in Serve's throughput-optimised mode. The last column is tokens a second over those of the first, as shipped.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import completions  # noqa: E402  # needs the path above
from benchmarks.runs import free_port, spread  # noqa: E402
from models import cli  # noqa: E402
from serve import fast  # noqa: E402

TOGETHER_S = 0.02  # as the engine by itself
WAYS = {  # of each application: the ingress on the engine, and the time between chunks
    "gateway, together": (False, TOGETHER_S),
    "gateway, every step": (False, 0.0),
    "on the engine, together": (True, TOGETHER_S),
    "on the engine, every step": (True, 0.0),
}
SLOTS = 8


def deploy(uri: str, stack: contextlib.ExitStack) -> dict[str, str]:
    """Each way's URL, on a private cluster that goes with `stack`."""
    from ray import serve  # reads the environment that --fast sets

    from benchmarks.hop_apps import build
    from serve.launch import Address, connected

    port = free_port()
    stack.enter_context(connected(len(WAYS), Address("127.0.0.1", port)))
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    urls = {}
    for number, (name, (near, interval_s)) in enumerate(WAYS.items()):
        serve.run(build(uri, near, SLOTS, interval_s), name=f"way-{number}", route_prefix=f"/way-{number}")
        urls[name] = f"http://127.0.0.1:{port}/way-{number}"
    stack.callback(serve.shutdown)
    return urls


def compare(urls: dict[str, str], rounds: list[list[str]], num_clients: int) -> list[str]:
    """The table's rows for so many clients."""
    loads: dict[str, list[completions.Load]] = {name: [] for name in urls}
    for number, asked in enumerate(rounds):
        for name, url in urls.items():
            loads[name].append(asyncio.run(completions.load(url, completions.ask_us, asked, num_clients)))
            print(f"round {number}, clients: {num_clients}, {name}: {loads[name][-1].tokens_per_s:,.0f} tokens/s", flush=True)
    shipped = loads[next(iter(WAYS))]
    rows = []
    for name in urls:
        ratios = [one.tokens_per_s / base.tokens_per_s for one, base in zip(loads[name], shipped, strict=True)]
        rows.append(f"| {num_clients} | {name} | {completions.told(loads[name])} | {spread(ratios, 2)} |")
    return rows


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    completions.add_options(options)
    options.add_argument("--fast", action="store_true", help="Serve's HAProxy and throughput-optimised modes")
    given = options.parse_args(argv)
    os.environ["RAY_ADDRESS"] = ""  # a cluster of its own
    with contextlib.ExitStack() as stack:
        if given.fast:
            os.environ.update(fast.environment(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raykiln-")))))
        _, _, folder = completions.find_model(given.storage, stack)
        urls = deploy(folder, stack)
        warm_up, *rounds = completions.rounds_of_prompts(folder, 1 + given.rounds, given.requests)
        for url in urls.values():
            asyncio.run(completions.load(url, completions.ask_us, warm_up, max(given.clients)))
        rows = [row for num_clients in given.clients for row in compare(urls, rounds, num_clients)]
    print(f"| clients | ingress, tokens | {completions.COLUMNS} | over {next(iter(WAYS))} |\n|{' --- |' * 7}")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
