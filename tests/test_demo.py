"""The demo runs from data to endpoint, and leaves no process, whenever it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from cluster.__main__ import demo_folder
from cluster.demo import client
from tests.support.paths import ROOT


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    # Without the test session's cluster: the demo starts its own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A token and a proxy of the user, neither of which the demo may use for its own endpoints.
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
        start_new_session=True,  # as in a terminal: Ctrl-C then reaches the whole group
    )


def processes_of(folder: Path) -> list[str]:
    """Return the processes whose environment or arguments name the demo's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), *process.environ().values()])
            if str(folder) in words and process.pid != os.getpid():
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return found


def check(folder: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    files = summary["files"]
    assert isinstance(files, dict)
    assert Path(files["text"]).read_text() == summary["text"]
    assert Image.open(files["images"]).width > 100
    for curves in files["curves"]:
        assert Image.open(curves).width > 300
    assert isinstance(summary["heldout_bits_per_byte"], float)
    return summary


def test_demo_completes_with_tiny_presets(tmp_path: Path) -> None:
    demo = start(tmp_path, "--preset", "tiny")
    output, _ = demo.communicate(timeout=400)
    assert demo.returncode == 0, output[-3000:]
    assert "The demo finished in" in output
    check(tmp_path)
    assert processes_of(tmp_path) == []


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
    time.sleep(3)  # until the workers are being started
    os.killpg(demo.pid, stop)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, rest[-2000:]
    assert "Traceback" not in rest
    assert processes_of(tmp_path) == []


def test_error_in_the_text_stream_ends_the_demo() -> None:
    stream = (
        'data: {"choices": [{"text": "To"}]}\n\n'
        'data: {"error": {"message": "the engine is gone"}}\n\n'
    )
    http = httpx.Client(
        base_url="http://demo",
        transport=httpx.MockTransport(lambda request: httpx.Response(200, text=stream)),
    )
    shown: list[str] = []
    with pytest.raises(ValueError, match=r"endpoint ended its text early \(the engine is gone\)"):
        client.stream_text(http, 8, shown.append)
    assert shown == ["To"]


def test_sheet_has_a_row_of_enlarged_images_per_class() -> None:
    rows = [
        [np.full((28, 28, 3), 10 * row + column, np.uint8) for column in range(3)]
        for row in range(2)
    ]
    sheet = np.asarray(client._sheet(rows))
    assert sheet.shape == (2 * 60, 3 * 60, 3)
    assert sheet[30::60, 30::60, 0].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert (sheet[:2] == 255).all()
    assert (sheet[58:62] == 255).all()


def test_demo_folder_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bucket = (
        "s3://bucket/kiln?region=us-east-1"  # with the region, which would be asked for otherwise
    )
    monkeypatch.setenv("KILN_STORAGE", bucket)
    assert demo_folder(None).absolute() == tmp_path / "kiln" / "demo"
    with pytest.raises(ValueError, match=r"--storage s3://.* name a folder"):
        demo_folder(bucket)
    monkeypatch.setenv("KILN_STORAGE", str(tmp_path / "runs"))
    assert demo_folder(None) == tmp_path / "runs" / "demo"
    assert demo_folder(f"file://{tmp_path}") == tmp_path


@pytest.mark.slow
def test_demo_trains_a_good_model_and_runs_twice(tmp_path: Path) -> None:
    for version in (1, 2):
        demo = start(tmp_path)
        output, _ = demo.communicate(timeout=1200)
        assert demo.returncode == 0, output[-3000:]
        summary = check(tmp_path)
        assert isinstance(summary["heldout_bits_per_byte"], float)
        assert summary["heldout_bits_per_byte"] <= 2.3
        assert (tmp_path / "models" / "gpt" / str(version) / "manifest.json").is_file()
    assert processes_of(tmp_path) == []
