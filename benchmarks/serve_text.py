"""What the served endpoint gives beside what one would write in an afternoon: FastAPI around transformers' `generate`.

    python benchmarks/serve_text.py [--storage kiln/demo] [--rounds 5] [--requests 96] [--clients 1 4 16]

Both serve the same weights over HTTP on this machine and are asked in turn, in one run: by so many clients at once, each
sending its next request when it has its answer; greedily, prompts of 16 to 48 tokens of held-out Shakespeare, 64 tokens each.
Ours streams from one replica of one thread with all defaults (`python -m serve up`). The other is one uvicorn process that
answers one request at a time, on one thread too; it can't stream, so its first token comes with its last.
The figure is generated tokens a second, ours over theirs, round by round. Without a storage the model is the demo's, untrained.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import numpy as np
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


# ---- the two servers


def article(folder: str, port: int) -> None:
    """The other contender: the model behind a lock, and an endpoint around it. Serves until it is ended."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    torch.set_num_threads(1)  # a fifth faster than two on a model this small
    app, lock = FastAPI(), threading.Lock()

    class Request(BaseModel):
        prompt: str
        max_new_tokens: int

    @app.post("/generate")
    def generate(request: Request) -> dict[str, str | int]:
        inputs = tokenizer(request.prompt, return_tensors="pt")
        with lock, torch.inference_mode():
            output = model.generate(  # type: ignore[misc]  # its own annotation does not fit its own models
                inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=request.max_new_tokens,
                do_sample=False, use_cache=True, pad_token_id=model.config.eos_token_id,
            )  # fmt: skip
        new = output[0, inputs.input_ids.shape[1] :]
        return {"text": str(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)), "tokens": len(new)}

    uvicorn.run(app, port=port, log_level="warning")


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


Ask = Callable[[httpx.AsyncClient, str], Awaitable[Answer]]


async def ask_us(http: httpx.AsyncClient, prompt: str) -> Answer:
    """One completion over server-sent events."""
    text, num_tokens, first_s = "", 0, None
    begun = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            message = json.loads(line.removeprefix("data: "))
            text += message["choices"][0]["text"]
            if text and first_s is None:
                first_s = time.perf_counter() - begun
            if message["usage"]:
                num_tokens = message["usage"]["completion_tokens"]
    whole_s = time.perf_counter() - begun
    return Answer(text, num_tokens, whole_s if first_s is None else first_s, whole_s)


async def ask_article(http: httpx.AsyncClient, prompt: str) -> Answer:
    begun = time.perf_counter()
    response = await http.post("/generate", json={"prompt": prompt, "max_new_tokens": NEW_TOKENS})
    whole_s = time.perf_counter() - begun
    answer = response.raise_for_status().json()
    return Answer(answer["text"], answer["tokens"], whole_s, whole_s)


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


def compare(our_url: str, article_url: str, rounds: list[list[str]], num_clients: int) -> str:
    """The row for BENCHMARKS.md; each of `rounds` is asked of both."""
    pairs = []
    for number, asked in enumerate(rounds):
        ours = asyncio.run(load(our_url, ask_us, asked, num_clients))
        theirs = asyncio.run(load(article_url, ask_article, asked, num_clients))
        same = sum(mine.text == other.text for mine, other in zip(ours.answers, theirs.answers, strict=True))
        print(
            f"round {number}, clients: {num_clients}, raykiln {ours.tokens_per_s:,.0f} tokens/s, "
            f"generate {theirs.tokens_per_s:,.0f} tokens/s, {same} of {len(asked)} texts the same",
            flush=True,
        )
        pairs.append((ours, theirs))
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
    our_side, their_side = (told(list(column)) for column in zip(*pairs, strict=True))
    return f"| serve {NAME}, clients: {num_clients} | {our_side} | FastAPI around generate: {their_side} | {spread(ratios, 2)} |"


def told(loads: list[Load]) -> str:
    """Tokens a second over the rounds, and latencies over all their answers."""
    answers = [answer for one in loads for answer in one.answers]
    first, whole = (
        "{:,.0f} ms (p99 {:,.0f})".format(*np.percentile([1000 * seconds for seconds in of_all], [50, 99]))
        for of_all in ([answer.first_s for answer in answers], [answer.whole_s for answer in answers])
    )
    return f"{statistics.median(one.tokens_per_s for one in loads):,.0f} tokens/s, first token {first}, whole answer {whole}"


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--storage", type=Path, help="a folder with a GPT in its registry; by default an untrained one is made")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=96, help="in a round, whatever the number of clients")
    options.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--article", help=argparse.SUPPRESS)
    options.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.article:
        article(given.article, given.port)
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
        our_url = stack.enter_context(serving(serve_up, "/health"))
        article_url = stack.enter_context(serving([__file__, "--article", f"{folder}/transformers"], "/openapi.json"))
        rounds = [prompts(tokenizer, ids, given.requests, seed) for seed in range(given.rounds)]
        warm_up = prompts(tokenizer, ids, 2 * max(given.clients), given.rounds)
        for url, ask in ((our_url, ask_us), (article_url, ask_article)):
            asyncio.run(load(url, ask, warm_up, max(given.clients)))
        rows = [compare(our_url, article_url, rounds, num_clients) for num_clients in given.clients]
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
