"""Asking servers for completions over HTTP: the model and the prompts, the load, and what came back, for the benchmarks of serving."""

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

from benchmarks.runs import ROOT, spread
from cluster import machine
from models import bundle, registry
from train.gpt.config import GptConfig

NAME = "gpt"  # in the registry: what `train export` calls a GPT
SHORTEST_PROMPT, LONGEST_PROMPT = 16, 48  # tokens
TEXTS = (16, 112)  # tokens of the shortest and the longest
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 180, 300


# ---- the model and what it is asked


def export_untrained(storage: str) -> None:
    """Publishes the demo's GPT with fresh weights: as fast as a trained one, and no run is needed."""
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
        sizes, end = config.model, end_of_text(tokenizer)
        model = gpt.build(
            tokenizer.get_vocab_size(),
            sizes.context,
            sizes.width,
            sizes.layers,
            sizes.heads,
            eos_token_id=end,
        )
        made = export_gpt(model, tokenizer_file, heldout_ids(tokenizer), folder)
        lineage = {
            "created": "2000-01-01T00:00:00+00:00",
            "run": {"name": "untrained", "step": 0, "storage": storage},
            "commit": None,
            "dataset": {"name": "shakespeare", "fingerprint": "none"},
            "metrics": {},
            "libraries": {
                library: metadata.version(library)
                for library in ("torch", "onnxruntime", "transformers")
            },
        }
        bundle.write(folder, lineage | made)
        registry.publish(f"{storage}/models", NAME, folder)


def heldout_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The shipped Shakespeare's held-out documents, one after the other: (N) token ids."""
    from train.config.data import TextData
    from train.data.text_sources import find_parts, read_documents

    data = TextData()
    found = [
        text for part in find_parts(data) for text, heldout in read_documents(part, data) if heldout
    ]
    return np.array(tokenizer.encode("".join(found)).ids)


@dataclass(frozen=True)
class Asked:
    prompt: str
    max_tokens: int


def rounds_of_requests(folder: str, given: argparse.Namespace) -> list[list[Asked]]:
    """For each round, other pieces of held-out text by the tokenizer of the bundle at `folder`, and other lengths; the same at each run."""
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = heldout_ids(tokenizer)
    rounds: list[list[Asked]] = []
    for seed in range(given.rounds):
        draw = np.random.default_rng(seed)
        sizes = draw.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1, size=given.requests)
        starts = draw.integers(len(ids) - LONGEST_PROMPT, size=given.requests)
        texts = draw.integers(given.texts[0], given.texts[1] + 1, size=given.requests).tolist()
        pieces = [
            tokenizer.decode(ids[start : start + size].tolist())
            for start, size in zip(starts, sizes, strict=True)
        ]
        rounds.append(
            [Asked(prompt, max_tokens) for prompt, max_tokens in zip(pieces, texts, strict=True)]
        )
    return rounds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        type=Path,
        help="a folder with a GPT in its registry; by default an untrained one is made",
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--requests", type=int, default=96, help="in a round, whatever the number of clients"
    )
    parser.add_argument(
        "--texts",
        type=int,
        nargs=2,
        default=TEXTS,
        metavar=("SHORTEST", "LONGEST"),
        help="tokens to write",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])


def find_model(given: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[str, str, str]:
    """The storage that is asked for, or one with an untrained model that goes with `stack`; the GPT's reference and folder in it.

    Raises:
        ValueError: there is no GPT, or one whose context is too short for what the benchmarks ask.
    """
    root = str(given.storage or stack.enter_context(tempfile.TemporaryDirectory()))
    if given.storage is None:
        export_untrained(root)
    name, version, folder = registry.resolve(f"{root}/models", NAME)
    context = bundle.verify(folder)["model"]["context"]
    if context < LONGEST_PROMPT + given.texts[1]:
        raise ValueError(
            f"{folder} has a context of {context}, and this asks for up to {LONGEST_PROMPT + given.texts[1]} tokens: serve another"
        )
    return root, f"{name}/{version}", folder


# ---- a server


@contextlib.contextmanager
def serving(words: list[str], ready: str) -> Iterator[str]:
    """A server's URL once its path `ready` answers; `words` is what runs it, without the interpreter and the port."""
    port = machine.free_port(None, 8000)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "RAY_ADDRESS": ""}  # a cluster of its own
        server = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(url + ready):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(
                        f"`python {' '.join(words)}` does not serve; it said: {log.read()[-2000:]}"
                    )
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


# ---- asking


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    first_s: float  # from sending the request to the first piece of text
    whole_s: float  # and to the last
    pauses_s: list[float]  # between the pieces of a stream


Ask = Callable[[httpx.AsyncClient, Asked], Awaitable[Answer]]


async def ask_us(http: httpx.AsyncClient, asked: Asked) -> Answer:
    """One completion over server-sent events."""
    text, num_tokens = "", 0
    begun = time.perf_counter()
    came = []  # when each piece of text did
    body = {
        "prompt": asked.prompt,
        "max_tokens": asked.max_tokens,
        "temperature": 0,
        "stream": True,
    }
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            message = json.loads(line.removeprefix("data: "))
            if piece := message["choices"][0]["text"]:
                text += piece
                came.append(time.perf_counter())
            if message["usage"]:
                num_tokens = message["usage"]["completion_tokens"]
    ended = time.perf_counter()
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(came)]
    return Answer(text, num_tokens, (came[0] if came else ended) - begun, ended - begun, pauses_s)


@dataclass(frozen=True)
class Load:
    """What one contender did in one round."""

    answers: list[Answer]  # in the order of the requests
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.seconds


async def load(url: str, ask: Ask, requests: list[Asked], num_clients: int) -> Load:
    """Sends all of `requests`, from clients that take the next one as soon as they have an answer."""
    found: dict[int, Answer] = {}
    waiting = iter(enumerate(requests))
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, trust_env=False) as http:

        async def client() -> None:
            for place, asked in waiting:
                found[place] = await ask(http, asked)

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return Load([found[place] for place in range(len(requests))], time.perf_counter() - begun)


# ---- the comparison


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    ask: Ask


def compare(servers: list[Server], rounds: list[list[Asked]], clients: list[int], base: str) -> str:
    """BENCHMARKS.md's table of servers, each asked each of `rounds` in turn, by each number of `clients`.

    Args:
        base: the server whose tokens a second the last column divides by.
    """
    for server in servers:
        asyncio.run(load(server.url, server.ask, rounds[-1], max(clients)))
    rows = [f"| clients | server | {COLUMNS} | over {base} |", f"|{' --- |' * 7}"]
    for num_clients in clients:
        loads: dict[str, list[Load]] = {server.name: [] for server in servers}
        for number, requests in enumerate(rounds):
            for server in servers:
                done = asyncio.run(load(server.url, server.ask, requests, num_clients))
                loads[server.name].append(done)
                same = sum(
                    (one.text, one.num_tokens) == (first.text, first.num_tokens)
                    for one, first in zip(
                        done.answers, loads[servers[0].name][-1].answers, strict=True
                    )
                )
                said = f"{done.tokens_per_s:,.0f} tokens/s, {same} of {len(requests)} texts as the first server's"
                print(f"round {number}, clients: {num_clients}, {server.name}: {said}", flush=True)
        for name, done_by in loads.items():
            ratios = [
                one.tokens_per_s / other.tokens_per_s
                for one, other in zip(done_by, loads[base], strict=True)
            ]
            rows.append(f"| {num_clients} | {name} | {_told(done_by)} | {spread(ratios, 2)} |")
    return "\n".join(rows)


COLUMNS = "tokens/s | first token, ms | between pieces, ms | whole answer, ms"


def _told(loads: list[Load]) -> str:
    """`COLUMNS`: tokens a second over the rounds; of all answers' latencies the median, and in brackets the 99th percentile."""
    answers = [answer for one in loads for answer in one.answers]
    latencies = [
        [answer.first_s for answer in answers],
        [pause_s for answer in answers for pause_s in answer.pauses_s],
        [answer.whole_s for answer in answers],
    ]
    cells = [
        "{:,.0f} ({:,.0f})".format(*np.percentile(1000 * np.array(seconds), [50, 99]))
        if seconds
        else ""
        for seconds in latencies
    ]
    return " | ".join([f"{statistics.median(one.tokens_per_s for one in loads):,.0f}", *cells])
