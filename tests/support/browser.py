"""What the browser's tests need before they start one."""

import os

import pytest

from cluster.demo import browser


def require_browser() -> None:
    """Skip the test without a browser; fail it if RAYKILN_EXPECT_CHROMIUM is 1."""
    if reason := browser.unavailable():
        expected = os.environ.get("RAYKILN_EXPECT_CHROMIUM") == "1"
        (pytest.fail if expected else pytest.skip)(f"the page is NOT tested: {reason}")
