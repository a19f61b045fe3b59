"""Reading a registry that may be slow, unreachable or damaged."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from models import registry
from serve.errors import Unavailable, UnknownModel
from serve.http.catalog import FAILURE_MAX_AGE_S, Catalog
from tests.support import bundles


@pytest.fixture
def root(tmp_path: Path) -> str:
    root = str(tmp_path / "models")
    for version in (1, 2):
        registry.publish(root, "gpt", bundles.tiny_gpt_bundle(tmp_path / f"gpt-{version}"))
    registry.alias(root, "gpt", "production", 1)
    return root


def test_versions_are_listed_newest_first_with_aliases_and_lineage(root: str) -> None:
    listed = asyncio.run(Catalog().versions(root, "gpt"))
    assert [(one.id, one.version, one.kind, one.aliases) for one in listed] == [
        ("gpt", 2, "gpt", []),
        ("gpt", 1, "gpt", ["production"]),
    ]
    manifest = registry.listed(root, "gpt").versions[1]
    assert (listed[1].metrics, listed[1].dataset, listed[1].commit) == (
        manifest["metrics"],
        manifest["dataset"],
        manifest["commit"],
    )
    assert listed[1].run == {"name": "tiny", "step": 0}, "without the run's storage"


def test_damaged_version_is_not_listed(root: str) -> None:
    Path(root, "gpt/2/manifest.json").write_text("{")
    assert [one.version for one in asyncio.run(Catalog().versions(root, "gpt"))] == [1]


@pytest.mark.parametrize(
    "damage", [lambda sample: sample.write_text("something else"), Path.unlink]
)
def test_damaged_or_missing_sample_is_an_error(root: str, damage: Any) -> None:
    sample = Path(root, "gpt/2/sample.txt")
    assert asyncio.run(Catalog().sample(root, "gpt", 2)) == ("gpt", sample.read_bytes())
    with pytest.raises(UnknownModel, match="no sample of gpt/3"):
        asyncio.run(Catalog().sample(root, "gpt", 3))
    damage(sample)
    with pytest.raises(UnknownModel, match="sample of gpt/2 is missing or damaged"):
        asyncio.run(Catalog().sample(root, "gpt", 2))


def test_concurrent_and_recent_requests_share_one_read(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    listed = registry.listed

    def counted(root: Any, name: str) -> registry.Listed:
        read.append(root)
        return listed(root, name)

    monkeypatch.setattr(registry, "listed", counted)

    async def ask() -> None:
        catalog, other = Catalog(), str(tmp_path / "other")
        await asyncio.gather(*(catalog.versions(root, "gpt") for _ in range(20)))
        await catalog.versions(root, "gpt")
        assert read == [root]
        assert await catalog.versions(other, "gpt") == []
        assert read == [root, other]

    asyncio.run(ask())


def test_unreachable_storage_is_an_error_and_read_again_later(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def unreachable(*_: Any) -> Any:
        reads.append(time.monotonic())
        raise OSError("no route to host")

    monkeypatch.setattr(registry, "listed", unreachable)

    async def ask() -> None:
        catalog = Catalog()
        for _ in range(3):
            with pytest.raises(Unavailable, match="storage does not answer"):
                await catalog.versions(root, "gpt")
        assert len(reads) == 1
        await asyncio.sleep(FAILURE_MAX_AGE_S)
        with pytest.raises(Unavailable):
            await catalog.versions(root, "gpt")
        assert len(reads) == 2

    asyncio.run(ask())


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that are read from a registry whose reads of `gpt` hang until the test ends."""
    ended, read, listed = threading.Event(), list[str](), registry.listed

    def slow(root: Any, name: str) -> registry.Listed:
        read.append(name)
        if name == "gpt":
            ended.wait(60)
        return listed(root, name)

    monkeypatch.setattr(registry, "listed", slow)
    yield read
    ended.set()


def test_hanging_storage_does_not_block_other_requests(root: str, hung: list[str]) -> None:
    async def ask() -> None:
        catalog = Catalog(timeout_s=0.2)
        impatient = [asyncio.create_task(catalog.versions(root, "gpt")) for _ in range(40)]
        await asyncio.sleep(0.05)
        for task in impatient[:30]:
            task.cancel()
        assert await catalog.versions(root, "dcgan") == []
        await asyncio.to_thread(time.monotonic)  # other threads are available
        for task in impatient[30:]:
            with pytest.raises(Unavailable, match="storage does not answer"):
                await task
        assert sorted(hung) == ["dcgan", "gpt"], "one read for all requests"

    asyncio.run(ask())


def test_slow_read_is_kept_for_its_full_age(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, listed = [], registry.listed

    def slow(root: Any, name: str) -> registry.Listed:
        read.append(name)
        time.sleep(0.4)
        return listed(root, name)

    monkeypatch.setattr(registry, "listed", slow)
    monkeypatch.setattr("serve.http.catalog.MAX_AGE_S", 0.3)

    async def ask() -> None:
        catalog = Catalog(timeout_s=0.1)
        with pytest.raises(Unavailable):
            await catalog.versions(root, "gpt")
        await asyncio.sleep(0.45)
        assert len(await catalog.versions(root, "gpt")) == 2, (
            "the read has finished in the meantime"
        )
        assert read == ["gpt"]
        await asyncio.sleep(0.3)
        with pytest.raises(Unavailable):
            await catalog.versions(root, "gpt")
        assert read == ["gpt", "gpt"], "the result was too old"

    asyncio.run(ask())


def test_storage_error_is_not_taken_for_damage(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage error must not make versions look unfinished, or aliases damaged."""
    read_json = storage.read_json

    def flaky(uri: Any) -> Any:
        if str(uri).endswith(("2/manifest.json", "production.json")):
            raise OSError("no region")
        return read_json(uri)

    monkeypatch.setattr(storage, "read_json", flaky)
    with pytest.raises(OSError, match="no region"):
        registry.listed(root, "gpt")
    with pytest.raises(OSError, match="no region"):
        registry.aliases(root, "gpt")
    with pytest.raises(OSError, match="no region"):
        registry.versions(root, "gpt")
