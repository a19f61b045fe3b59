"""What the served endpoint gives beside what one would write in an afternoon: FastAPI around transformers' `generate`, two ways.

    python -m benchmarks.serve_text [--fast] [--storage kiln/demo] [--rounds 4] [--requests 96] [--clients 1 4 16]

All serve the same weights over HTTP on this machine and are asked in turn, in one run: by so many clients at once, each
sending its next request when it has its answer; greedily, prompts of 16 to 48 tokens of held-out Shakespeare, texts of 16 to 112 tokens.
"raykiln" streams from one replica of one thread with all defaults (`python -m serve up`), or with --fast as `serve up --fast` does.
The others are one uvicorn process each, on one thread too: "generate" answers one request at a time, "static batches" pads all that
wait to one batch, and takes the next when the whole of it is done. They can't stream, so their first token comes with their last.

A row of the table is a server under so many clients: generated tokens a second (the median of the rounds); median and 99th percentile
of the time to the first token, between the pieces of a stream (each is what was made since the one before) and of the
whole answer; and its tokens a second over those of "generate" in the same round. Without a storage the model is the demo's, untrained.
"""

import argparse
import asyncio
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks import completions
from benchmarks.completions import Answer, Asked, Server
from cluster import cli

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

    inputs = tokenizer(
        [request.prompt for request in requests], return_tensors="pt", padding=len(requests) > 1
    )
    with torch.inference_mode():
        output = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max(request.max_new_tokens for request in requests),
            do_sample=False, use_cache=True, pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
    answers: list[dict[str, str | int]] = []
    for request, row in zip(requests, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        end = (
            row.index(model.config.eos_token_id) + 1
            if model.config.eos_token_id in row
            else len(row)
        )  # padding follows
        new = row[: min(end, request.max_new_tokens)]
        answers.append(
            {
                "text": tokenizer.decode(
                    new, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
                "tokens": len(new),
            }
        )
    return answers


OTHERS: dict[str, Callable[[str, int], None]] = {
    "generate": generate,
    "static batches": static_batches,
}
BASE = "generate"


async def ask_other(http: httpx.AsyncClient, asked: Asked) -> Answer:
    begun = time.perf_counter()
    response = await http.post(
        "/generate", json={"prompt": asked.prompt, "max_new_tokens": asked.max_tokens}
    )
    whole_s = time.perf_counter() - begun
    answer = response.raise_for_status().json()
    return Answer(answer["text"], answer["tokens"], whole_s, whole_s, [])


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    completions.add_options(options)
    options.add_argument(
        "--fast", action="store_true", help="ours in Serve's HAProxy and throughput-optimised modes"
    )
    options.add_argument("--other", choices=OTHERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", help=argparse.SUPPRESS)
    options.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.other:
        OTHERS[given.other](given.folder, given.port)
        return 0
    with contextlib.ExitStack() as stack:
        storage, reference, folder = completions.find_model(given, stack)
        # One replica: a second one, which autoscaling would add after a while, would make the rounds unlike each other.
        ours = [
            "-m",
            "serve",
            "up",
            "--storage",
            storage,
            "--text",
            reference,
            "--max-replicas",
            "1",
            *(["--fast"] if given.fast else []),
        ]
        url = stack.enter_context(completions.serving(ours, "/health"))
        servers = [Server("raykiln --fast" if given.fast else "raykiln", url, completions.ask_us)]
        for other in OTHERS:
            words = [
                "-m",
                "benchmarks.serve_text",
                "--other",
                other,
                "--folder",
                f"{folder}/transformers",
            ]
            servers.append(
                Server(
                    other,
                    stack.enter_context(completions.serving(words, "/openapi.json")),
                    ask_other,
                )
            )
        rounds = completions.rounds_of_requests(folder, given)
        print(completions.compare(servers, rounds, given.clients, BASE))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
