"""`python -m serve` on a private cluster, and its error messages."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.machine import free_port
from serve.__main__ import main
from tests.support.paths import ROOT
from tests.support.served import golden, stream, until


def test_up_refuses_invalid_options(
    command: Callable[..., Any], registry_root: str, tmp_path: Path
) -> None:
    storage = str(Path(registry_root).parent)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        taken = command("serve", "up", "--storage", storage, "--port", port, RAY_ADDRESS="")
    assert (taken.returncode, "Traceback" in taken.stderr) == (2, False)
    assert f"127.0.0.1:{port} cannot be used" in taken.stderr
    no_port = command("serve", "up", "--port", "70000", RAY_ADDRESS="")
    assert (
        no_port.returncode,
        "'70000' is not a port: use a number from 1 to 65535" in no_port.stderr,
    ) == (2, True)
    no_gpu = command("serve", "up", "--providers", "cuda", "--storage", storage, RAY_ADDRESS="")
    assert (
        no_gpu.returncode,
        "cannot be served: execution provider 'cuda' is not in this build" in no_gpu.stderr,
    ) == (2, True)
    detached = command("serve", "up", "--detach", "--storage", str(tmp_path), RAY_ADDRESS="")
    assert "--detach needs a cluster that keeps running" in detached.stderr
    missing = str(tmp_path / "missing.txt")
    no_file = command("serve", "up", "--blocklist", missing, "--storage", storage, RAY_ADDRESS="")
    assert (no_file.returncode, f"the blocklist {missing} cannot be read" in no_file.stderr) == (
        2,
        True,
    )
    fast = command("serve", "up", "--fast", "--storage", str(tmp_path), RAY_ADDRESS="127.0.0.1:1")
    assert (fast.returncode, "--fast is for a private cluster" in fast.stderr) == (2, True)


def test_status_of_another_openai_server_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": [{"id": "gpt-2", "object": "model"}]}')

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # an unused port
    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert main(["status", "--port", str(server.server_port)]) == 1
        thread.join(20)
    assert "is not raykiln: its /v1/models lists no bundles" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [[], ["--fast"]], ids=["default", "fast"])
def test_ctrl_c_stops_private_server_without_leftover_processes(
    registry_root: str, tmp_path: Path, mode: list[str]
) -> None:
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    (tmp_path / "blocked.txt").write_text("verboten\n")
    options = [*mode, "--blocklist", str(tmp_path / "blocked.txt")]
    arguments = [
        sys.executable,
        "-m",
        "serve",
        "up",
        "--storage",
        str(Path(registry_root).parent),
        "--port",
        str(port),
        *options,
    ]
    with open(tmp_path / "out", "w") as out:
        server = psutil.Popen(
            arguments, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until(
            lambda: server.poll() is not None or "Ctrl-C stops it" in (tmp_path / "out").read_text()
        )
        assert server.poll() is None, (tmp_path / "out").read_text()
        assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {
            "status": "ok",
            "models": ["gpt/1", "dcgan/1"],
        }
        blocked = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "It is VERBOTEN."}
        )
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (400, "content_filter")
        processes = server.children(recursive=True)
        names = [process.name() for process in processes]
        assert any("TextReplica" in name or "raylet" in name for name in names)
        scratch = check_fast_mode(processes, port, golden(registry_root, 1)) if mode else None
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive
        assert scratch is None or not scratch.exists()
    finally:
        for process in [*server.children(recursive=True), server] if server.is_running() else []:
            process.kill()


def check_fast_mode(processes: list[psutil.Process], port: int, recorded: dict[str, Any]) -> Path:
    """Check that HAProxy answers in place of the Python proxy, with the same text.

    Only its statistics may be reachable from other machines.

    Returns:
        The folder of HAProxy's files.
    """
    haproxy = [process for process in processes if process.name() == "haproxy"]
    replicas = [process for process in processes if "ServeReplica" in "".join(process.cmdline())]
    listening = {
        (process.name(), socket.laddr)
        for process in haproxy + replicas
        for socket in process.net_connections()
        if socket.status == "LISTEN"
    }
    assert ("haproxy", ("127.0.0.1", port)) in listening
    # The gateway's own port.
    direct = [address.ip for _, address in listening if 30_000 <= address.port <= 31_000]
    assert direct == ["127.0.0.1"]
    scratch = Path(haproxy[0].cmdline()[haproxy[0].cmdline().index("-f") + 1]).parents[1]
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert list(scratch.glob("*/admin.sock"))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        body = {
            "prompt": recorded["prompt"],
            "max_tokens": recorded["max_tokens"],
            "temperature": 0,
        }
        *messages, _ = stream(client, **body)
        assert "".join(message["choices"][0]["text"] for message in messages) == recorded["text"]
        response = client.get("/status", headers={"X-Request-ID": "mine"})
        assert response.headers.get_list("x-request-id") == ["mine"]
        assert response.json()["deployments"]["TextReplica"]["slots"] == 8
        refused = client.post("/v1/completions", json={"max_tokens": 0})
        assert refused.json()["error"]["param"] == "max_tokens"
    return scratch
