"""Other versions replace the served ones in place, under load, and failed rollouts are undone."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models import bundle, registry
from serve import launch, selection
from serve.deployments import Options
from tests.support.served import CONTEXT, PROMPT, complete, events, golden, serves, until


class Load:
    """Repeats each request on a thread of its own until the `with` block ends.

    Exceptions of the requests are raised at the end of the block.
    """

    def __init__(self, client: httpx.Client, *requests: Callable[[httpx.Client], None]) -> None:
        self.base_url, self.requests = client.base_url, requests
        self.ended = threading.Event()

    def __enter__(self) -> None:
        self.pool = ThreadPoolExecutor(len(self.requests))
        self.futures = [self.pool.submit(self._repeat, request) for request in self.requests]

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.pool.shutdown()
        for future in self.futures:
            future.result()

    def _repeat(self, request: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=self.base_url, timeout=60) as client:
            while not self.ended.is_set():
                request(client)


def test_rollout_in_place_loses_no_request(
    client: httpx.Client, registry_root: str, address: launch.Address
) -> None:
    texts = {version: golden(registry_root, version)["text"] for version in (1, 2)}
    short = {
        "prompt": golden(registry_root, 1)["prompt"],
        "max_tokens": golden(registry_root, 1)["max_tokens"],
        "temperature": 0,
    }
    assert golden(registry_root, 2)["prompt"] == short["prompt"]
    long = {"prompt": PROMPT, "max_tokens": CONTEXT - 40, "temperature": 0}
    whole = complete(client, **long)["choices"][0]["text"]
    answers: list[tuple[int, str, str]] = []
    streamed: list[tuple[int, str]] = []

    def ask_short(client: httpx.Client) -> None:
        response = client.post("/v1/completions", json=short)
        if response.status_code != 200:
            answers.append((response.status_code, "", response.text))
            return
        body = response.json()
        answers.append((200, body["system_fingerprint"], body["choices"][0]["text"]))

    def ask_long(client: httpx.Client) -> None:
        """Streams in succession: one is running when the version with a short context loads."""
        with client.stream("POST", "/v1/completions", json={**long, "stream": True}) as response:
            if response.status_code != 200:
                streamed.append((response.status_code, ""))
                return
            *messages, done = events(response)
        assert done == "[DONE]", done
        assert {message["system_fingerprint"] for message in messages} == {"gpt/1"}
        streamed.append((200, "".join(message["choices"][0]["text"] for message in messages)))

    def roll_out(version: int) -> None:
        selected = selection.select(registry_root, text=f"gpt/{version}")
        launch.deploy(selected, address, Options(max_replicas=1))
        until(lambda: serves(client, f"gpt/{version}"))

    with Load(client, ask_short, ask_short, ask_short, ask_long):
        roll_out(2)
        until(lambda: (413, "") in streamed)
        roll_out(1)
    assert set(answers) == {(200, f"gpt/{version}", text) for version, text in texts.items()}
    assert set(streamed) == {(200, whole), (413, "")}


def test_bundle_with_wrong_outputs_does_not_stop_the_served_one(
    client: httpx.Client, registry_root: str, address: launch.Address, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(Path(registry_root) / "gpt/2", tmp_path / "wrong"))
    wrong = golden(registry_root, 2) | {"text": "something else"}
    (folder / "golden.json").write_text(json.dumps(wrong))
    bundle.write(folder, bundle.read(folder))
    bad = str(tmp_path / "models")
    registry.publish(bad, "gpt", folder)
    with pytest.raises(
        ValueError, match=r"gpt/1 cannot be served: .* gives other text than golden\.json"
    ):
        selection.select(bad)

    # Without `select`, as if the bundle failed on the replicas' machines only.
    _, _, uri = registry.resolve(bad, "gpt")
    unverified = selection.SelectedBundle("gpt", 1, uri, bundle.read(uri))
    selected = selection.select(registry_root) | {"text": unverified}
    with pytest.raises(ValueError, match=r"the models could not be served"):
        launch.deploy(selected, address, Options(max_replicas=1))
    recorded = golden(registry_root, 1)
    answer = complete(
        client, prompt=recorded["prompt"], max_tokens=recorded["max_tokens"], temperature=0
    )
    assert (answer["system_fingerprint"], answer["choices"][0]["text"]) == (
        "gpt/1",
        recorded["text"],
    )
