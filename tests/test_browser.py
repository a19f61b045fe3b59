"""The demo's headless browser: its processes end with it, and the demo works without it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image
from selenium.webdriver.common.selenium_manager import SeleniumManager

from cluster import machine
from cluster.demo import browser
from cluster.demo.demo import Demo
from tests.support.browser import require_browser
from tests.support.paths import ROOT

MARKER = "RAYKILN_TEST_BROWSER"  # an environment variable of every process that a test starts
PAGE = "data:text/html,<title>page</title>"

SCRIPT = """
import signal

from cluster.demo import browser

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
print("starting", flush=True)
with browser.started(800, 600) as driver:
    driver.get("about:blank")
    print("started", flush=True)
    driver.execute_async_script("")  # never ends
"""


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The value of MARKER in every process that the test starts."""
    require_browser()
    monkeypatch.setenv(MARKER, str(tmp_path))
    return str(tmp_path)


def browser_processes(marker: str, parent: psutil.Process) -> list[psutil.Process]:
    """All descendants of a process, and all processes that have left its tree."""
    marked = [process for process in machine.processes_with(MARKER, marker) if process != parent]
    return list({*marked, *parent.children(recursive=True)})


def nothing() -> None:
    pass


def fail() -> None:
    raise LookupError("in the block")


def interrupt() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray's replaces it
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("action", "expected"), [(nothing, None), (fail, LookupError), (interrupt, KeyboardInterrupt)]
)
def test_no_process_is_left_after_the_block(
    marker: str,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], None],
    expected: type[BaseException] | None,
) -> None:
    monkeypatch.setattr(SeleniumManager, "binary_paths", lambda *_: fail())  # it downloads
    raised: type[BaseException] | None = None
    others = set(psutil.Process().children(recursive=True))  # the session's Ray cluster
    processes: list[psutil.Process] = []
    try:
        with browser.started(800, 600) as driver:
            driver.get(PAGE)
            assert driver.title == "page"
            found = browser_processes(marker, psutil.Process())
            processes = [process for process in found if process not in others]
            action()
    except (LookupError, KeyboardInterrupt) as error:
        raised = type(error)
    assert raised is expected
    assert len(processes) > 3  # driver, browser, renderers
    assert [process for process in processes if machine.is_running(process)] == []
    assert machine.processes_with(MARKER, marker) == []


@pytest.mark.parametrize("when", ["starting", "started"])
def test_no_process_is_left_after_ctrl_c(marker: str, when: str) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert script.stdout is not None
    while script.stdout.readline().strip() != when:
        assert script.poll() is None
    parent = psutil.Process(script.pid)
    while not (processes := browser_processes(marker, parent)):
        time.sleep(0.01)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does
    _, errors = script.communicate(timeout=60)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert [process for process in processes if machine.is_running(process)] == []
    assert machine.processes_with(MARKER, marker) == []


def test_screenshot_has_the_size_of_the_window(tmp_path: Path) -> None:
    require_browser()
    path = tmp_path / "page.png"
    browser.screenshot(PAGE, "return document.title === 'page'", path, (640, 700))
    assert Image.open(path).width == 640


@pytest.mark.parametrize(
    ("url", "ready", "timeout_s", "message"),
    [
        (PAGE, "return false", 0.5, "the page was not ready after 0.5 s"),
        (PAGE, "return missing", 60, "the browser failed: .* missing is not defined"),
        ("http://127.0.0.1:45999", "return true", 60, "the browser failed: .*ERR_"),
    ],
)
def test_screenshot_fails_in_one_sentence(
    tmp_path: Path, url: str, ready: str, timeout_s: float, message: str
) -> None:
    require_browser()
    with pytest.raises(RuntimeError, match=f"^{message}"):
        browser.screenshot(url, ready, tmp_path / "page.png", timeout_s=timeout_s)


def test_demo_continues_without_selenium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "selenium", None)
    assert Demo(tmp_path, "tiny")._photograph("http://127.0.0.1:1") is None
    expected = "no screenshot of the page was taken: selenium is not installed"
    assert expected in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert browser.unavailable() == (
        "none of chromium, chromium-browser, google-chrome is on PATH: apt-get install chromium"
    )
    chromium = tmp_path / "chromium"
    chromium.touch(mode=0o755)
    assert browser.unavailable() == ("chromedriver is not on PATH: apt-get install chromium-driver")
    with pytest.raises(RuntimeError, match="chromedriver is not on PATH"), browser.started(8, 8):
        pass
