"""The demo goes the whole road, twice in a row, and leaves nothing running, whenever it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from cluster.__main__ import _demo_folder
from cluster.demo.demo import Demo

ROOT = Path(__file__).resolve().parent.parent


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    # Not on the session's cluster: the demo brings its own. A session of its own, as a terminal gives, so that Ctrl-C can reach all of it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Of a user's own, and neither of them the way to what the demo starts.
    env |= {
        "RAY_AUTH_TOKEN": "another cluster's",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }
    command = [sys.executable, "-m", "cluster", "demo", "--storage", str(folder), *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_of(folder: Path) -> list[str]:
    """Processes that know of the demo's folder: its cluster's environment and its commands' arguments name it."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                str(folder) in " ".join([*process.cmdline(), *process.environ().values()])
                and process.pid != os.getpid()
            ):
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return found


def check(folder: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    files = summary["files"]
    assert isinstance(files, dict)
    assert Path(files["text"]).read_text() == summary["text"]
    assert Image.open(files["pictures"]).width > 100
    for picture in files["curves"]:
        assert Image.open(picture).width > 300
    assert isinstance(summary["heldout_bits_per_byte"], float)
    return summary


def test_the_whole_road_at_tiny_size(tmp_path: Path) -> None:
    demo = start(tmp_path, "--preset", "tiny")
    said, _ = demo.communicate(timeout=400)
    assert demo.returncode == 0, said[-3000:]
    assert "The whole road in" in said
    check(tmp_path)
    assert left_of(tmp_path) == []


@pytest.mark.parametrize(
    ("stop", "during"), [(signal.SIGINT, "run demo-gpt"), (signal.SIGHUP, "   its dashboard:")]
)
def test_ctrl_c_and_a_closed_terminal_leave_no_process(
    tmp_path: Path, stop: signal.Signals, during: str
) -> None:
    demo = start(tmp_path, "--preset", "tiny")
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(during):
            break
    time.sleep(3)  # into the start of the workers
    os.killpg(demo.pid, stop)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, rest[-2000:]
    assert "Traceback" not in rest
    assert left_of(tmp_path) == []


def test_a_text_that_breaks_off_is_one_sentence(tmp_path: Path) -> None:
    stream = 'data: {"choices": [{"text": "To"}]}\n\ndata: {"error": {"message": "the engine is gone"}}\n\n'
    answering = httpx.Client(
        base_url="http://demo",
        transport=httpx.MockTransport(lambda request: httpx.Response(200, text=stream)),
    )
    with pytest.raises(ValueError, match=r"the endpoint broke off its text \(the engine is gone\)"):
        Demo(tmp_path, "tiny")._stream_text(answering, 8)


def test_the_demo_s_folder_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket = "s3://bucket/kiln?region=us-east-1"  # named, so that nobody asks the network for it
    monkeypatch.setenv("KILN_STORAGE", bucket)
    assert _demo_folder(None).absolute() == tmp_path / "kiln" / "demo"
    with pytest.raises(ValueError, match=r"--storage s3://.* name a folder"):
        _demo_folder(bucket)
    monkeypatch.setenv("KILN_STORAGE", str(tmp_path / "runs"))
    assert _demo_folder(None) == tmp_path / "runs" / "demo"
    assert _demo_folder(f"file://{tmp_path}") == tmp_path


@pytest.mark.slow
def test_the_demo_is_worth_looking_at_and_runs_twice(tmp_path: Path) -> None:
    for version in (1, 2):
        demo = start(tmp_path)
        said, _ = demo.communicate(timeout=1200)
        assert demo.returncode == 0, said[-3000:]
        summary = check(tmp_path)
        assert isinstance(summary["heldout_bits_per_byte"], float)
        assert summary["heldout_bits_per_byte"] <= 2.3
        assert (tmp_path / "models" / "gpt" / str(version) / "manifest.json").is_file()
    assert left_of(tmp_path) == []
