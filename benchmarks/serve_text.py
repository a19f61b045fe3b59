"""What the served endpoint gives beside what one would write in an afternoon: FastAPI around transformers' `generate`, two ways.

    python benchmarks/serve_text.py [--storage kiln/demo] [--rounds 5] [--requests 96] [--clients 1 4 16]

All serve the same weights over HTTP on this machine and are asked in turn, in one run: by so many clients at once, each
sending its next request when it has its answer; greedily, prompts of 16 to 48 tokens of held-out Shakespeare, 64 tokens each.
Ours streams from one replica of one thread with all defaults (`python -m serve up`). The others are one uvicorn process each, on one
thread too: "generate" answers one request at a time, "static batches" pads all that wait to one batch, and takes the next when the
whole of it is done. They can't stream, so their first token comes with their last.
The figure is generated tokens a second, ours over theirs, round by round. Of a stream it also tells the time between its pieces: each
is what was made since the one before, at most every 20 ms. Without a storage the model is the demo's, untrained.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.runs import spread  # noqa: E402  # needs the path above
from models import bundle, cli, registry  # noqa: E402

NAME = "gpt"  # in the registry: what `train export` calls a GPT
SHORTEST_PROMPT, LONGEST_PROMPT, NEW_TOKENS = 16, 48, 64
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 180, 300


# ---- the model and what it is asked


def export_untrained(storage: str) -> None:
    """Publishes the demo's GPT with fresh weights: as fast as a trained one, and no run is needed."""
    import torch

    from models import gpt
    from train import config as configs
    from train import text
    from train.export_gpt import export_gpt

    config = configs.load("gpt", "gpt-demo")
    assert isinstance(config, configs.GptConfig)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_file, folder = Path(scratch, "tokenizer.json"), Path(scratch, "bundle")
        folder.mkdir()
        tokenizer = text.tokenizer_for(config.data, text.pieces(config.data))
        tokenizer.save(str(tokenizer_file))
        sizes, end = config.model, text.end_of_text(tokenizer)
        model = gpt.build(tokenizer.get_vocab_size(), sizes.context, sizes.width, sizes.layers, sizes.heads, eos_token_id=end)
        made = export_gpt(model, tokenizer_file, heldout_ids(tokenizer), folder)
        lineage = {
            "created": "2000-01-01T00:00:00+00:00",
            "run": {"name": "untrained", "step": 0, "storage": storage},
            "commit": None,
            "dataset": {"name": "shakespeare", "fingerprint": "none"},
            "metrics": {},
            "libraries": {library: metadata.version(library) for library in ("torch", "onnxruntime", "transformers")},
        }
        bundle.write(folder, lineage | made)
        registry.publish(f"{storage}/models", NAME, folder)


def heldout_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The shipped Shakespeare's held-out documents, one after the other: (N) token ids."""
    from train import text
    from train.config import TextData

    data = TextData()
    found = [written for piece in text.pieces(data) for written, heldout in text.documents(piece, data) if heldout]
    return np.array(tokenizer.encode("".join(found)).ids)


def prompts(tokenizer: Tokenizer, ids: np.ndarray, count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1, size=count)
    starts = draw.integers(len(ids) - LONGEST_PROMPT, size=count)
    return [tokenizer.decode(ids[start : start + size].tolist()) for start, size in zip(starts, sizes, strict=True)]


# ---- the other servers; each serves until it is ended


class Request(BaseModel):
    prompt: str
    max_new_tokens: int


def generate(folder: str, port: int) -> None:
    """The article's way: the model behind a lock, and an endpoint around it."""
    tokenizer, model = from_transformers(folder)
    app, lock = FastAPI(), threading.Lock()

    @app.post("/generate")
    def answer(request: Request) -> dict[str, str | int]:
        with lock:
            return continued(tokenizer, model, [request])[0]

    uvicorn.run(app, port=port, log_level="warning")


def static_batches(folder: str, port: int) -> None:
    """Static batching: whatever waits when the model is free goes through `generate` together."""
    tokenizer, model = from_transformers(folder)
    app: FastAPI = FastAPI()
    waiting: queue.SimpleQueue[tuple[Request, Future[dict[str, str | int]]]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            batch = [waiting.get()]
            while not waiting.empty():
                batch.append(waiting.get())
            answers = continued(tokenizer, model, [request for request, _ in batch])
            for (_, future), found in zip(batch, answers, strict=True):
                future.set_result(found)

    @app.post("/generate")
    async def answer(request: Request) -> dict[str, str | int]:
        future: Future[dict[str, str | int]] = Future()
        waiting.put((request, future))
        return await asyncio.wrap_future(future)

    threading.Thread(target=work, daemon=True).start()
    uvicorn.run(app, port=port, log_level="warning")


def from_transformers(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # a fifth faster than two on a model this small
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder).eval()


def continued(tokenizer: Any, model: Any, requests: list[Request]) -> list[dict[str, str | int]]:
    import torch

    inputs = tokenizer([request.prompt for request in requests], return_tensors="pt", padding=len(requests) > 1)
    with torch.inference_mode():
        output = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max(request.max_new_tokens for request in requests),
            do_sample=False, use_cache=True, pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
    answers: list[dict[str, str | int]] = []
    for request, row in zip(requests, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        end = row.index(model.config.eos_token_id) + 1 if model.config.eos_token_id in row else len(row)  # padding follows
        new = row[: min(end, request.max_new_tokens)]
        answers.append({"text": tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False), "tokens": len(new)})
    return answers


OTHERS: dict[str, Callable[[str, int], None]] = {"generate": generate, "static batches": static_batches}


@contextlib.contextmanager
def serving(words: list[str], ready: str) -> Iterator[str]:
    """A server's URL once its path `ready` answers; `words` is what runs it, without the interpreter and the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "RAY_ADDRESS": ""}  # a cluster of its own
        server = subprocess.Popen([sys.executable, *words, "--port", str(port)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(url + ready):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"`python {' '.join(words)}` does not serve; it said: {log.read()[-2000:]}")
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


Ask = Callable[[httpx.AsyncClient, str], Awaitable[Answer]]


async def ask_us(http: httpx.AsyncClient, prompt: str) -> Answer:
    """One completion over server-sent events."""
    text, num_tokens = "", 0
    begun = time.perf_counter()
    came = []  # when each piece of text did
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
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


async def ask_other(http: httpx.AsyncClient, prompt: str) -> Answer:
    begun = time.perf_counter()
    response = await http.post("/generate", json={"prompt": prompt, "max_new_tokens": NEW_TOKENS})
    whole_s = time.perf_counter() - begun
    answer = response.raise_for_status().json()
    return Answer(answer["text"], answer["tokens"], whole_s, whole_s, [])


@dataclass(frozen=True)
class Load:
    """What one contender did in one round."""

    answers: list[Answer]  # in the order of the prompts
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.seconds


async def load(url: str, ask: Ask, asked: list[str], num_clients: int) -> Load:
    """Sends all of `asked`, from clients that take the next prompt as soon as they have an answer."""
    found: dict[int, Answer] = {}
    waiting = iter(enumerate(asked))
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, trust_env=False) as http:

        async def client() -> None:
            for place, prompt in waiting:
                found[place] = await ask(http, prompt)

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return Load([found[place] for place in range(len(asked))], time.perf_counter() - begun)


# ---- the comparison


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    ask: Ask


def compare(servers: list[Server], rounds: list[list[str]], num_clients: int) -> list[str]:
    """The rows for BENCHMARKS.md: the first server, ours, beside each of the others; all are asked each of `rounds`."""
    loads: dict[str, list[Load]] = {server.name: [] for server in servers}
    ours, *others = servers
    for number, asked in enumerate(rounds):
        for server in servers:
            done = asyncio.run(load(server.url, server.ask, asked, num_clients))
            loads[server.name].append(done)
            same = sum(one.text == our.text for one, our in zip(done.answers, loads[ours.name][-1].answers, strict=True))
            said = "" if server is ours else f", {same} of {len(asked)} texts as ours"
            print(f"round {number}, clients: {num_clients}, {server.name} {done.tokens_per_s:,.0f} tokens/s{said}", flush=True)
    rows = []
    for other in others:
        pairs = zip(loads[ours.name], loads[other.name], strict=True)
        ratios = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in pairs]
        cells = told(loads[ours.name]), f"FastAPI, {other.name}: {told(loads[other.name])}", spread(ratios, 2)
        rows.append(f"| serve {NAME}, clients: {num_clients} | {' | '.join(cells)} |")
    return rows


def told(loads: list[Load]) -> str:
    """Tokens a second over the rounds, and latencies over all their answers."""
    answers = [answer for one in loads for answer in one.answers]
    latencies = {
        "first token": [answer.first_s for answer in answers],
        "between pieces": [pause_s for answer in answers for pause_s in answer.pauses_s],
        "whole answer": [answer.whole_s for answer in answers],
    }
    tellings = [
        "{} {:,.0f} ms (p99 {:,.0f})".format(what, *np.percentile(1000 * np.array(seconds), [50, 99]))
        for what, seconds in latencies.items()
        if seconds
    ]
    return f"{statistics.median(one.tokens_per_s for one in loads):,.0f} tokens/s, {', '.join(tellings)}"


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--storage", type=Path, help="a folder with a GPT in its registry; by default an untrained one is made")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=96, help="in a round, whatever the number of clients")
    options.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--other", choices=OTHERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", help=argparse.SUPPRESS)
    options.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.other:
        OTHERS[given.other](given.folder, given.port)
        return 0
    with contextlib.ExitStack() as stack:
        storage = str(given.storage or stack.enter_context(tempfile.TemporaryDirectory()))
        if given.storage is None:
            export_untrained(storage)
        name, version, folder = registry.resolve(f"{storage}/models", NAME)
        context = bundle.verify(folder)["model"]["context"]
        if context < LONGEST_PROMPT + NEW_TOKENS:
            raise ValueError(
                f"{folder} has a context of {context}, and this asks for up to {LONGEST_PROMPT + NEW_TOKENS} tokens: serve another"
            )
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        ids = heldout_ids(tokenizer)
        # One replica: a second one, which autoscaling would add after a while, would make the rounds unlike each other.
        serve_up = ["-m", "serve", "up", "--storage", storage, "--text", f"{name}/{version}", "--max-replicas", "1"]
        servers = [Server("raykiln", stack.enter_context(serving(serve_up, "/health")), ask_us)]
        for other in OTHERS:
            words = [__file__, "--other", other, "--folder", f"{folder}/transformers"]
            servers.append(Server(other, stack.enter_context(serving(words, "/openapi.json")), ask_other))
        rounds = [prompts(tokenizer, ids, given.requests, seed) for seed in range(given.rounds)]
        warm_up = prompts(tokenizer, ids, 2 * max(given.clients), given.rounds)
        for server in servers:
            asyncio.run(load(server.url, server.ask, warm_up, max(given.clients)))
        rows = [row for num_clients in given.clients for row in compare(servers, rounds, num_clients)]
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
