"""Headless Chromium, controlled by Selenium: for the demo's screenshot and for the page's tests.

Selenium is an optional dependency of this module: `unavailable` says whether it is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster import machine

if TYPE_CHECKING:
    from selenium.webdriver import Chrome, ChromeService

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
    "--no-proxy-server",  # only pages of this machine are opened
)
PROFILE_VARIABLE = "RAYKILN_BROWSER_PROFILE"  # marks the processes of one browser
TIMEOUT_S = 60
POLL_INTERVAL_S = 0.1
END_TIMEOUT_S = 5


def unavailable() -> str | None:
    """Return what is missing to start a browser and how to install it, or None."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install selenium"
    if _find_browser() is None:
        return f"none of {', '.join(BROWSERS)} is on PATH: apt-get install chromium"
    if shutil.which("chromedriver") is None:
        return "chromedriver is not on PATH: apt-get install chromium-driver"
    return None


@contextlib.contextmanager
def started(width: int, height: int) -> Iterator[Chrome]:
    """Start a browser, and end all its processes when the block ends.

    Args:
        width: of the window, in pixels.
        height: of the window, in pixels.

    Raises:
        RuntimeError: Selenium, the browser or its driver is not installed.
        selenium.common.WebDriverException: the browser did not start.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    with tempfile.TemporaryDirectory(
        prefix="raykiln-chromium-", ignore_cleanup_errors=True
    ) as profile:
        options = ChromeOptions()
        options.binary_location = str(_find_browser())
        for option in (*OPTIONS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        with warnings.catch_warnings():
            # Its replacement, a ClientConfig, cannot be passed to Chrome.
            warnings.simplefilter("ignore", DeprecationWarning)
            options.ignore_local_proxy_environment_variables()
        # With the paths of both programs given, Selenium downloads neither. In a session of its
        # own, the driver does not receive the terminal's Ctrl-C, so that it is ended below.
        service = ChromeService(
            executable_path=str(shutil.which("chromedriver")),
            env={**os.environ, PROFILE_VARIABLE: profile},
            popen_kw={"start_new_session": True},
        )
        try:
            driver = Chrome(options=options, service=service)
            driver.set_page_load_timeout(TIMEOUT_S)
            yield driver
        finally:
            _end_processes(service, profile)


def screenshot(
    url: str,
    ready: str,
    path: Path,
    size: tuple[int, int] = (1200, 1200),
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Save a screenshot of a page as PNG.

    Chromium's own `--screenshot` would need `--virtual-time-budget` to wait for the page, which
    falsifies the latencies that the page measures.

    Args:
        url: of the page.
        ready: a JavaScript function body that returns true once the page can be photographed.
        path: of the PNG.
        size: of the window, width and height in pixels.
        timeout_s: how long to wait until the page is ready.

    Raises:
        RuntimeError: no browser is available, it failed, or the page was not ready in time.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    from selenium.common import TimeoutException, WebDriverException
    from selenium.webdriver.support.wait import WebDriverWait
    from urllib3.exceptions import HTTPError

    try:
        with started(*size) as driver:
            driver.get(url)
            try:
                wait = WebDriverWait(driver, timeout_s, POLL_INTERVAL_S)
                wait.until(lambda _: driver.execute_script(ready))
            except TimeoutException as error:
                raise RuntimeError(f"the page was not ready after {timeout_s:g} s") from error
            path.write_bytes(driver.get_screenshot_as_png())
    except (WebDriverException, HTTPError) as error:
        message = str(error).removeprefix("Message: ").splitlines()[0]
        raise RuntimeError(f"the browser failed: {message}") from error


def _find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _end_processes(service: ChromeService, profile: str) -> None:
    """Kill the driver, the browser and every process that they have started."""
    # Crash handlers are in no tree of processes, but have the variable; renderers hide theirs.
    processes = set(machine.processes_with(PROFILE_VARIABLE, profile))
    for process in list(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.update(process.children(recursive=True))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if hasattr(service, "process"):  # it was started
        service.process.wait(END_TIMEOUT_S)
        service.stop()  # closes the pipe to the driver
    psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
