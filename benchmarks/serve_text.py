"""Text generation with raykiln, compared with FastAPI around transformers' `generate`.

    python -m benchmarks.serve_text [--fast] [--storage kiln/demo] [--rounds 4] [--requests 96]
                                    [--clients 1 4 16]

All servers serve the same weights over HTTP on this machine and get the same load one after the
other, in one run: so many clients at once, each sending its next request when it has a response;
greedy decoding, prompts of 16 to 48 tokens of held-out Shakespeare, 16 to 112 tokens to generate.
"raykiln" streams from one replica with one thread and all defaults (`python -m serve up`), or with
--fast as `serve up --fast` does. The others are one uvicorn process with one thread each:
"generate" handles one request at a time, "static batches" pads all waiting requests to one batch
and takes the next when the whole batch is done. They cannot stream, so their time to first token
is that of the whole response.

A row of the table is a server under a number of clients: generated tokens per second (the median
of the rounds); median and 99th percentile of the time to first token, between the chunks of a
stream (a chunk has all tokens since the one before) and of the whole response; and the ratio of
its tokens per second to those of "generate" in the same round. Without --storage the model is the
demo's, untrained.
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
from benchmarks.completions import Request, Response, Server
from benchmarks.runs import parser
from cluster import cli

# ---- the other servers; each serves until its process is ended


class GenerateRequest(BaseModel):
    prompt: str
    max_new_tokens: int


class GenerateResponse(BaseModel):
    text: str
    tokens: int


def generate(folder: str, port: int) -> None:
    """Serve as the article does: the model behind a lock, and an endpoint around it."""
    tokenizer, model = from_transformers(folder)
    app, lock = FastAPI(), threading.Lock()

    @app.post("/generate")
    def endpoint(request: GenerateRequest) -> GenerateResponse:
        with lock:
            return complete(tokenizer, model, [request])[0]

    uvicorn.run(app, port=port, log_level="warning")


def static_batches(folder: str, port: int) -> None:
    """Serve with static batching: all waiting requests go through `generate` together."""
    tokenizer, model = from_transformers(folder)
    app: FastAPI = FastAPI()
    waiting: queue.SimpleQueue[tuple[GenerateRequest, Future[GenerateResponse]]] = (
        queue.SimpleQueue()
    )

    def work() -> None:
        while True:
            batch = [waiting.get()]
            while not waiting.empty():
                batch.append(waiting.get())
            responses = complete(tokenizer, model, [request for request, _ in batch])
            for (_, future), response in zip(batch, responses, strict=True):
                future.set_result(response)

    @app.post("/generate")
    async def endpoint(request: GenerateRequest) -> GenerateResponse:
        future: Future[GenerateResponse] = Future()
        waiting.put((request, future))
        return await asyncio.wrap_future(future)

    threading.Thread(target=work, daemon=True).start()
    uvicorn.run(app, port=port, log_level="warning")


# The stubs of transformers do not say what the Auto classes return.
def from_transformers(folder: str) -> tuple[Any, Any]:
    """Return the tokenizer and model of a bundle's transformers/ folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # a fifth faster than two for a model this small
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder).eval()


def complete(tokenizer: Any, model: Any, requests: list[GenerateRequest]) -> list[GenerateResponse]:
    """Generate for all requests in one padded batch."""
    import torch

    inputs = tokenizer(
        [request.prompt for request in requests], return_tensors="pt", padding=len(requests) > 1
    )
    end_of_text = model.config.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            do_sample=False,
            use_cache=True,
            pad_token_id=end_of_text,
        )
    responses = []
    for request, row in zip(requests, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        # Padding follows the first end of text.
        length = row.index(end_of_text) + 1 if end_of_text in row else len(row)
        new = row[: min(length, request.max_new_tokens)]
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        responses.append(GenerateResponse(text=text, tokens=len(new)))
    return responses


OTHERS: dict[str, Callable[[str, int], None]] = {
    "generate": generate,
    "static batches": static_batches,
}
BASELINE = "generate"


async def request_generate(client: httpx.AsyncClient, request: Request) -> Response:
    """Request a completion from one of the other servers."""
    begin = time.perf_counter()
    response = await client.post(
        "/generate", json={"prompt": request.prompt, "max_new_tokens": request.max_tokens}
    )
    seconds = time.perf_counter() - begin
    body = response.raise_for_status().json()
    return Response(body["text"], body["tokens"], seconds, seconds, [])


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    completions.add_options(options)
    options.add_argument(
        "--fast", action="store_true", help="serve raykiln as `serve up --fast` does"
    )
    options.add_argument("--other", choices=OTHERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", help=argparse.SUPPRESS)
    options.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.other:
        OTHERS[arguments.other](arguments.folder, arguments.port)
        return 0
    with contextlib.ExitStack() as stack:
        storage, reference, folder = completions.find_model(arguments, stack)
        # One replica: autoscaling would add a second one during the rounds.
        command = ["-m", "serve", "up", "--storage", storage, "--text", reference]
        command += ["--max-replicas", "1"]
        name = "raykiln"
        if arguments.fast:
            command.append("--fast")
            name += " --fast"
        url = stack.enter_context(completions.serving(command, "/health"))
        servers = [Server(name, url, completions.stream_completion)]
        for other in OTHERS:
            command = ["-m", "benchmarks.serve_text", "--other", other]
            command += ["--folder", f"{folder}/transformers"]
            url = stack.enter_context(completions.serving(command, "/openapi.json"))
            servers.append(Server(other, url, request_generate))
        rounds = completions.rounds_of_requests(folder, arguments)
        print(completions.compare(servers, rounds, arguments.clients, BASELINE))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
