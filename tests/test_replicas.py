"""Replicas without Ray: loading bundles, dead engines, disconnected clients, classes, logprobs."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from models import bundle
from serve import replicas
from serve.errors import Unavailable
from serve.http.app import build_app
from serve.http.schemas import CompletionRequest, GenerationsRequest
from serve.replicas import ImageReplica, TextReplica
from serve.session import ImageSession, TextSession
from serve.text.detokenize import token_text
from tests.support.fakes import LocalModel
from tests.support.served import CONTEXT, PROMPT


def test_replica_with_dead_engine_is_unhealthy(
    registry_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        replica = TextReplica(slots=1, threads=1, timeout_s=60)
        await replica.reconfigure({"uri": f"{registry_root}/gpt/2"})
        await replica.check_health()
        monkeypatch.setattr(replica.session, "decode", None)
        assert isinstance(await replica.complete(CompletionRequest(max_tokens=9), ""), Unavailable)
        with pytest.raises(RuntimeError, match="the engine's thread has ended"):
            await replica.check_health()

    asyncio.run(scenario())


class OpenedInOrder:
    """Replaces `open_bundle`: returns open sessions, the first one once `go` is set."""

    def __init__(self, sessions: list[Any]) -> None:
        self.sessions, self.opened, self.go = sessions, 0, threading.Event()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.opened += 1
        session = self.sessions[self.opened - 1]
        if self.opened == 1:
            self.go.wait(60)
        return session


@pytest.mark.parametrize(
    ("make", "session_type", "uri"),
    [
        (lambda: TextReplica(slots=1, threads=1, timeout_s=60), TextSession, "gpt/2"),
        (lambda: ImageReplica(threads=1), ImageSession, "dcgan/1"),
    ],
    ids=["text", "image"],
)
def test_last_of_overlapping_reconfigures_wins_and_same_uri_is_not_reloaded(
    registry_root: str,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    session_type: Any,
    uri: str,
) -> None:
    sessions = [session_type(f"{registry_root}/{uri}") for _ in range(2)]
    opening = OpenedInOrder(sessions)
    monkeypatch.setattr(replicas, "open_bundle", opening)

    async def scenario() -> None:
        replica, rollouts = make(), []
        replica.metrics.rollouts.inc = lambda value, tags: rollouts.append(tags["model"])
        first = asyncio.create_task(replica.reconfigure({"uri": "first"}))
        second = asyncio.create_task(replica.reconfigure({"uri": "second"}))
        await asyncio.wait({second}, timeout=0.5)  # it could overtake the first
        opening.go.set()
        await asyncio.gather(first, second)
        assert replica.session is sessions[1]
        assert rollouts == [f"{uri.rpartition('/')[0]}/{sessions[1].manifest['version']}"]
        served = dict(vars(replica))
        await replica.reconfigure({"uri": "second"})
        assert (opening.opened, len(rollouts)) == (2, 1)
        assert vars(replica) == served, "the same engine, with its running requests"
        if isinstance(replica, TextReplica):
            assert replica.engine is not None
            replica.engine.close()
            await asyncio.to_thread(replica.engine.join)
            sessions.append(session_type(f"{registry_root}/{uri}"))
            await replica.reconfigure({"uri": "second"})
            assert replica.engine.alive, "a dead engine is replaced although the URI is the same"

    asyncio.run(scenario())


def test_logprobs_equal_transformers(registry_root: str) -> None:
    async def scenario() -> dict[str, Any]:
        replica = TextReplica(slots=1, threads=1, timeout_s=60)
        await replica.reconfigure({"uri": f"{registry_root}/gpt/2"})
        transport = httpx.ASGITransport(build_app(LocalModel(replica), None))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {
                "prompt": PROMPT,
                "max_tokens": 24,
                "temperature": 1.0,
                "seed": 2,
                "top_k": 0,
                "logprobs": 3,
            }
            return (await http.post("/v1/completions", json=body)).json()["choices"][0]

    choice = asyncio.run(scenario())
    reported, text = choice["logprobs"], choice["text"]
    tokenizer = Tokenizer.from_file(f"{registry_root}/gpt/2/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(f"{registry_root}/gpt/2/transformers")
    ids = {token_text(tokenizer, token): token for token in range(tokenizer.get_vocab_size())}
    prompt, tokens = tokenizer.encode(PROMPT).ids, [ids[token] for token in reported["tokens"]]
    with torch.no_grad():
        expected = (
            model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
    np.testing.assert_allclose(reported["token_logprobs"], expected[range(24), tokens], atol=1e-4)
    for row, top, token in zip(expected, reported["top_logprobs"], reported["tokens"], strict=True):
        np.testing.assert_allclose([*top.values()][:3], row.topk(3).values, atol=1e-4)
        assert token in top
    for token, offset in zip(reported["tokens"], reported["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_no_token_is_started_for_a_disconnected_client(
    registry_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the token of the running step is generated. The test holds the decode steps."""
    allowed = threading.Semaphore(5)

    async def scenario() -> None:
        replica = TextReplica(slots=1, threads=1, timeout_s=60)
        await replica.reconfigure({"uri": f"{registry_root}/gpt/1"})
        engine, decode = replica.engine, replica.session.decode
        assert engine is not None

        def held(*step: Any) -> np.ndarray:
            allowed.acquire()
            return decode(*step)

        monkeypatch.setattr(replica.session, "decode", held)
        gone = asyncio.Event()
        body = {
            "prompt": PROMPT,
            "max_tokens": CONTEXT - 40,
            "temperature": 0,
            "n": 1,
            "stream": True,
        }
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": headers,
        }
        app = build_app(LocalModel(replica), None)
        request = asyncio.create_task(app(scope, receive, send))
        while engine.generated < 6:  # one of the prefill, and five of decode steps
            await asyncio.sleep(0.001)
        gone.set()
        await request
        allowed.release(CONTEXT)
        while engine.status()["running"]:
            await asyncio.sleep(0.001)
        assert engine.generated <= 6 + 1
        engine.close()
        await asyncio.to_thread(engine.join)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_exact_class_name_takes_precedence(tmp_path: Path, registry_root: str) -> None:
    folder = Path(shutil.copytree(Path(registry_root) / "dcgan/1", tmp_path / "gan"))
    manifest = bundle.read(folder)
    manifest["model"]["class_names"] = ["bag", "Bag", "shoe"]
    bundle.write(folder, manifest)

    async def labels() -> list[str | None]:
        replica = ImageReplica(threads=1)
        await replica.reconfigure({"uri": str(folder)})
        answers = [
            await replica.generate(GenerationsRequest(label=label))
            for label in ("Bag", "bag", "SHOE")
        ]
        return [answer[1].labels[0] for answer in answers if isinstance(answer, tuple)]

    assert asyncio.run(labels()) == ["Bag", "bag", "shoe"]
