"""Which tests are left out by `make quick`: they get the marker `ray` when they are collected."""

import inspect
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

# Fixtures that start Ray, a command, an S3 server or a browser; or that train a model.
FIXTURES = {"ray_address", "command", "bucket", "browser", "garments", "registry_root"}
# Names in the code of a test, or of its fixtures, that start other processes, or train and export.
STARTERS = {"spawn", "subprocess", "trained_gpt", "tiny_gan_bundle", "tiny_gpt_bundle"}
# Beginnings of the names of test files that start clusters, train, export or plot.
FILES = (
    "test_api",
    "test_blocklist",
    "test_browser",
    "test_cluster",
    "test_demo",
    "test_export",
    "test_extractor",
    "test_faults",
    "test_gan",
    "test_page",
    "test_quality",
    "test_replicas",
    "test_report",
    "test_routes",
    "test_serve",
    "test_session",
    "test_strategy",
    "test_tune",
    "test_verify",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import the files that `-m "not ray"` would leave out as a whole: imports take long."""
    left_out = "not ray" in str(config.option.markexpr)
    return True if left_out and collection_path.stem.startswith(FILES) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start Ray, other processes or a browser, or compute for long."""
    for item in items:
        if isinstance(item, pytest.Function) and _is_heavy(item):
            item.add_marker(pytest.mark.ray)


def _is_heavy(item: pytest.Function) -> bool:
    if item.path.stem.startswith(FILES) or FIXTURES & set(item.fixturenames):
        return True
    fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
    return any(STARTERS & _names(function) for function in (item.function, *fixtures))


def _names(function: Any) -> set[str]:
    """Return the global names and attributes in a function's code, nested functions included."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    names: set[str] = set()
    todo = [code]
    while todo:
        code = todo.pop()
        if isinstance(code, CodeType):
            names |= set(code.co_names)
            todo += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return names
