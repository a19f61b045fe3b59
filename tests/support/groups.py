"""In which order two pytest processes share the work of `make test`.

xdist's `--dist loadfile` deals one file at a time to whichever process is free, those with most
tests first. Then the few files with the longest tests, which start Ray clusters, come last and side
by side. Here one process begins with such files while the other runs all that need no cluster, and
both end with what is left.
"""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Dealt to one process as a whole: clusters that are started and stopped again and again, and files
# that use the same trained bundles, which each process would train for itself.
GROUPS = (
    ("test_cluster", "test_demo", "test_faults"),
    (
        "test_access_log",
        "test_api",
        "test_blocklist",
        "test_catalog",
        "test_export",
        "test_page",
        "test_replicas",
        "test_routes",
        "test_selection",
        "test_session",
    ),
)
# Dealt when nothing else is left, the longest first: these start a cluster too.
LAST = ("test_tune", "test_verify", "test_serve", "test_gpt", "test_serve_cli", "test_kinds")


class ByGroup(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
    """Deals groups, then single files, then the files of `LAST`."""

    def _split_scope(self, nodeid: str) -> str:
        file = _file_of(nodeid)
        return next((group[0] for group in GROUPS if file in group), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Replace xdist's own scheduler where `--dist loadfile` asks for files."""
    return ByGroup(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by group: with `--no-loadscope-reorder`, they are dealt in this order."""
    items.sort(key=lambda item: _rank_of(_file_of(item.nodeid)))


def _file_of(nodeid: str) -> str:
    return nodeid.split("::")[0].removesuffix(".py").split("/")[1]


def _rank_of(file: str) -> int:
    if file in LAST:
        return len(GROUPS) + 1 + LAST.index(file)
    return next((rank for rank, group in enumerate(GROUPS) if file in group), len(GROUPS))
