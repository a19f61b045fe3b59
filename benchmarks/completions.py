"""Shared by the serving benchmarks: model, requests, load over HTTP, and the table of results."""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import numpy as np
from tokenizers import Tokenizer

from benchmarks.runs import ROOT, median_and_range
from cluster import machine
from models import bundle, registry
from train.gpt.config import GptConfig

NAME = "gpt"  # the name under which `train export` registers a GPT
MIN_PROMPT, MAX_PROMPT = 16, 48  # tokens
GENERATED = (16, 112)  # tokens: the smallest and the largest request
START_TIMEOUT_S, RESPONSE_TIMEOUT_S = 180, 300


# ---- the model and the requests


def export_untrained(storage: str) -> None:
    """Register the demo's GPT with initial weights: as fast as a trained one, without a run."""
    import torch

    from models.nets import gpt
    from train.config import loader as configs
    from train.data.text_sources import find_parts
    from train.data.tokenizer import build_tokenizer, end_of_text
    from train.gpt.export import export_gpt

    config = configs.load("gpt", "gpt-demo")
    assert isinstance(config, GptConfig)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_file, folder = Path(scratch, "tokenizer.json"), Path(scratch, "bundle")
        folder.mkdir()
        tokenizer = build_tokenizer(config.data, find_parts(config.data))
        tokenizer.save(str(tokenizer_file))
        sizes = config.model
        model = gpt.build(
            tokenizer.get_vocab_size(),
            sizes.context,
            sizes.width,
            sizes.layers,
            sizes.heads,
            eos_token_id=end_of_text(tokenizer),
        )
        manifest = export_gpt(model, tokenizer_file, heldout_ids(tokenizer), folder)
        libraries = ("torch", "onnxruntime", "transformers")
        lineage = {
            "created": "2000-01-01T00:00:00+00:00",
            "run": {"name": "untrained", "step": 0, "storage": storage},
            "commit": None,
            "dataset": {"name": "shakespeare", "fingerprint": "none"},
            "metrics": {},
            "libraries": {library: metadata.version(library) for library in libraries},
        }
        bundle.write(folder, lineage | manifest)
        registry.publish(f"{storage}/models", NAME, folder)


def heldout_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Return the shipped Shakespeare's held-out documents, concatenated, as (N,) token ids."""
    from train.config.data import TextData
    from train.data.text_sources import find_parts, read_documents

    data = TextData()
    documents = [
        text for part in find_parts(data) for text, heldout in read_documents(part, data) if heldout
    ]
    return np.array(tokenizer.encode("".join(documents)).ids)


@dataclass(frozen=True)
class Request:
    prompt: str
    max_tokens: int


def rounds_of_requests(folder: str, options: argparse.Namespace) -> list[list[Request]]:
    """Return the requests of each round, the same in every run of a benchmark.

    Each round has its own prompts from the held-out text, and its own lengths.

    Args:
        folder: the bundle's, whose tokenizer counts the tokens.
        options: of `add_options`.
    """
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = heldout_ids(tokenizer)
    low, high = options.texts
    rounds: list[list[Request]] = []
    for seed in range(options.rounds):
        draw = np.random.default_rng(seed)
        sizes = draw.integers(MIN_PROMPT, MAX_PROMPT + 1, size=options.requests)
        starts = draw.integers(len(ids) - MAX_PROMPT, size=options.requests)
        generated = draw.integers(low, high + 1, size=options.requests).tolist()
        prompts = [
            tokenizer.decode(ids[start : start + size].tolist())
            for start, size in zip(starts, sizes, strict=True)
        ]
        rounds.append([Request(*pair) for pair in zip(prompts, generated, strict=True)])
    return rounds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        type=Path,
        help="a folder with a GPT in its registry (default: an untrained one is made)",
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--requests", type=int, default=96, help="per round, for any number of clients"
    )
    parser.add_argument(
        "--texts",
        type=int,
        nargs=2,
        default=GENERATED,
        metavar=("SHORTEST", "LONGEST"),
        help="tokens to generate",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])


def find_model(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[str, str, str]:
    """Return a storage with a GPT, the GPT's reference and its bundle's folder.

    Args:
        options: of `add_options`; without a storage, one with an untrained model is made.
        stack: deletes that storage when it closes.

    Raises:
        ValueError: there is no GPT, or its context is too short for the requests.
    """
    root = str(options.storage or stack.enter_context(tempfile.TemporaryDirectory()))
    if options.storage is None:
        export_untrained(root)
    name, version, folder = registry.resolve(f"{root}/models", NAME)
    context = bundle.verify(folder)["model"]["context"]
    needed = MAX_PROMPT + options.texts[1]
    if context < needed:
        raise ValueError(
            f"{folder} has a context of {context} tokens, and the requests need {needed}: use "
            "another model, or smaller --texts"
        )
    return root, f"{name}/{version}", folder


# ---- servers


@contextlib.contextmanager
def serving(arguments: list[str], ready: str) -> Iterator[str]:
    """Start a server and stop it at the end.

    Args:
        arguments: of the Python interpreter; a port is appended.
        ready: a path that responds with success once the server is ready.

    Yields:
        The server's URL.

    Raises:
        RuntimeError: the server ended or did not get ready in time; has the end of its log.
    """
    port = machine.free_port(8000)
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "RAY_ADDRESS": ""}  # so that it starts a private cluster
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, *arguments, "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(url + ready):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    command = f"python {' '.join(arguments)}"
                    raise RuntimeError(f"`{command}` does not serve: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


# ---- load


@dataclass(frozen=True)
class Response:
    """A completion and its latencies, in seconds from sending the request.

    Attributes:
        text: of the completion.
        num_tokens: generated.
        first_s: until the first chunk of text.
        total_s: until the end of the response.
        gaps_s: between the chunks of a stream.
    """

    text: str
    num_tokens: int
    first_s: float
    total_s: float
    gaps_s: list[float]


Send = Callable[[httpx.AsyncClient, Request], Awaitable[Response]]


async def stream_completion(client: httpx.AsyncClient, request: Request) -> Response:
    """Request a completion from raykiln as server-sent events."""
    text, num_tokens = "", 0
    arrivals = []  # of each chunk that has text
    body = {
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
    }
    begin = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            message = json.loads(line.removeprefix("data: "))
            if chunk := message["choices"][0]["text"]:
                text += chunk
                arrivals.append(time.perf_counter())
            if message["usage"]:
                num_tokens = message["usage"]["completion_tokens"]
    end = time.perf_counter()
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    first = arrivals[0] if arrivals else end
    return Response(text, num_tokens, first - begin, end - begin, gaps_s)


@dataclass(frozen=True)
class Load:
    """A server's responses to a round, in the order of the requests."""

    responses: list[Response]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(response.num_tokens for response in self.responses) / self.seconds


async def run_load(url: str, send: Send, requests: list[Request], num_clients: int) -> Load:
    """Send all requests; each client sends its next one as soon as it has a response."""
    responses: dict[int, Response] = {}
    waiting = iter(enumerate(requests))
    async with httpx.AsyncClient(
        base_url=url, timeout=RESPONSE_TIMEOUT_S, trust_env=False
    ) as client:

        async def send_next() -> None:
            for index, request in waiting:
                responses[index] = await send(client, request)

        begin = time.perf_counter()
        await asyncio.gather(*(send_next() for _ in range(num_clients)))
        seconds = time.perf_counter() - begin
    return Load([responses[index] for index in range(len(requests))], seconds)


# ---- the comparison


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    send: Send


COLUMNS = "tokens/s | time to first token, ms | between chunks, ms | whole response, ms"


def compare(
    servers: list[Server], rounds: list[list[Request]], clients: list[int], baseline: str
) -> str:
    """Return BENCHMARKS.md's table: each server under each number of clients.

    Args:
        servers: that are sent each round, one after the other.
        rounds: the requests.
        clients: the numbers of clients.
        baseline: the server whose tokens per second the last column divides by.
    """
    for server in servers:  # a first round that is not measured
        asyncio.run(run_load(server.url, server.send, rounds[-1], max(clients)))
    rows = [f"| clients | server | {COLUMNS} | ratio to {baseline} |", f"|{' --- |' * 7}"]
    for num_clients in clients:
        loads: dict[str, list[Load]] = {server.name: [] for server in servers}
        for number, requests in enumerate(rounds):
            for server in servers:
                load = asyncio.run(run_load(server.url, server.send, requests, num_clients))
                loads[server.name].append(load)
                same = _num_same_texts(load, loads[servers[0].name][-1])
                print(
                    f"round {number}, clients: {num_clients}, {server.name}: "
                    f"{load.tokens_per_s:,.0f} tokens/s, "
                    f"{same} of {len(requests)} texts equal the first server's",
                    flush=True,
                )
        for name, of_server in loads.items():
            ratios = [
                load.tokens_per_s / base.tokens_per_s
                for load, base in zip(of_server, loads[baseline], strict=True)
            ]
            cells = f"{_measurements(of_server)} | {median_and_range(ratios, 2)}"
            rows.append(f"| {num_clients} | {name} | {cells} |")
    return "\n".join(rows)


def _num_same_texts(load: Load, other: Load) -> int:
    return sum(
        (one.text, one.num_tokens) == (two.text, two.num_tokens)
        for one, two in zip(load.responses, other.responses, strict=True)
    )


def _measurements(loads: list[Load]) -> str:
    """Return the cells of `COLUMNS`.

    Tokens per second are the median over the rounds; latencies the median over all responses,
    with the 99th percentile in brackets.
    """
    responses = [response for load in loads for response in load.responses]
    latencies = [
        [response.first_s for response in responses],
        [gap_s for response in responses for gap_s in response.gaps_s],
        [response.total_s for response in responses],
    ]
    speed = statistics.median(load.tokens_per_s for load in loads)
    return " | ".join([f"{speed:,.0f}", *map(_percentiles, latencies)])


def _percentiles(seconds: list[float]) -> str:
    if not seconds:
        return ""
    median, high = np.percentile(1000 * np.array(seconds), [50, 99])
    return f"{median:,.0f} ({high:,.0f})"
