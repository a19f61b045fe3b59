"""Chromium without a window, through chromedriver: for the demo's picture of the page, and for the page's tests.

It speaks WebDriver (https://www.w3.org/TR/webdriver2/) in the page's own time: Chromium's `--screenshot` would need `--virtual-time-budget` to
wait for anything, and then whatever the page measures is false.
"""

import base64
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import machine

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",  # it looks at this machine alone
)
POLL_S = 0.02


class Browser:
    """One page.

    Every method raises RuntimeError with the driver's own words where that refuses, and httpx.HTTPError where it does not answer.
    """

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A command of WebDriver's; its value."""
        response = self.http.request(method, path, json=body)
        if not response.is_success:
            raise RuntimeError(
                f"chromedriver answered {method} {path} with {response.status_code}: {response.text}"
            )
        return response.json()["value"]

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        """The condition's value once it is true.

        Raises:
            TimeoutError: it never was.
        """
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the page was not so after {timeout_s:g} s")
            time.sleep(POLL_S)
        return value

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


def is_installed() -> bool:
    return shutil.which("chromedriver") is not None and _binary() is not None


def _binary() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextlib.contextmanager
def started(width: int, height: int) -> Iterator[Browser]:
    """A browser with a window of so many pixels, for as long as the block; `is_installed` must hold."""
    port = machine.free_port(9515)
    with tempfile.TemporaryDirectory(
        prefix="raykiln-chromium-", ignore_cleanup_errors=True
    ) as profile:
        driver = psutil.Popen(
            [str(shutil.which("chromedriver")), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # Tries again until it listens.
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}",
                timeout=60,
                transport=httpx.HTTPTransport(retries=10),
            ) as http:
                browser = Browser(http)
                arguments = [
                    *OPTIONS,
                    f"--window-size={width},{height}",
                    f"--user-data-dir={profile}",
                ]
                wanted = {
                    "goog:chromeOptions": {"binary": _binary(), "args": arguments},
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
                session = browser.call(
                    "POST", "/session", {"capabilities": {"alwaysMatch": wanted}}
                )
                http.base_url = f"{http.base_url}/session/{session['sessionId']}"
                yield browser
        finally:
            for left in [*driver.children(recursive=True), driver]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            driver.wait(10)
