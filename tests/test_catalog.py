"""What the gateway tells of the registry, which may be slow, away, or damaged."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from models import registry
from serve.catalog import FAILURE_AGE_S, Catalog
from serve.errors import Unavailable, UnknownModel
from tests.support import bundles


@pytest.fixture
def root(tmp_path: Path) -> str:
    root = str(tmp_path / "models")
    for version in (1, 2):
        registry.publish(root, "gpt", bundles.tiny_gpt_bundle(tmp_path / f"gpt-{version}"))
    registry.alias(root, "gpt", "production", 1)
    return root


def test_versions_are_told_with_aliases_and_lineage_newest_first(root: str) -> None:
    told = asyncio.run(Catalog().versions(root, "gpt"))
    assert [(one.id, one.version, one.kind, one.aliases) for one in told] == [
        ("gpt", 2, "gpt", []),
        ("gpt", 1, "gpt", ["production"]),
    ]
    manifest = registry.listed(root, "gpt").versions[1]
    assert (told[1].metrics, told[1].dataset, told[1].commit) == (
        manifest["metrics"],
        manifest["dataset"],
        manifest["commit"],
    )
    assert told[1].run == {"name": "tiny", "step": 0}, (
        "where the run's storage is, is nobody's business"
    )


def test_a_version_that_is_damaged_is_not_told(root: str) -> None:
    Path(root, "gpt/2/manifest.json").write_text("{")
    assert [one.version for one in asyncio.run(Catalog().versions(root, "gpt"))] == [1]


@pytest.mark.parametrize(
    "damage", [lambda sample: sample.write_text("something else"), Path.unlink]
)
def test_a_sample_is_the_version_s_own_as_published_or_none(root: str, damage: Any) -> None:
    sample = Path(root, "gpt/2/sample.txt")
    assert asyncio.run(Catalog().sample(root, "gpt", 2)) == ("gpt", sample.read_bytes())
    with pytest.raises(UnknownModel, match="no sample of gpt/3"):
        asyncio.run(Catalog().sample(root, "gpt", 3))
    damage(sample)
    with pytest.raises(UnknownModel, match="sample of gpt/2 is missing or damaged"):
        asyncio.run(Catalog().sample(root, "gpt", 2))


def test_what_was_read_serves_all_who_ask(
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


def test_storage_that_is_away_is_said_and_asked_again(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def away(*_: Any) -> Any:
        asked.append(time.monotonic())
        raise OSError("no route to host")

    monkeypatch.setattr(registry, "listed", away)

    async def ask() -> None:
        catalog = Catalog()
        for _ in range(3):
            with pytest.raises(Unavailable, match="storage does not answer"):
                await catalog.versions(root, "gpt")
        assert len(asked) == 1
        await asyncio.sleep(FAILURE_AGE_S)
        with pytest.raises(Unavailable):
            await catalog.versions(root, "gpt")
        assert len(asked) == 2

    asyncio.run(ask())


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry of which reads of `gpt` hang until the test is over; the names that were read."""
    over, read, listed = threading.Event(), list[str](), registry.listed

    def slow(root: Any, name: str) -> registry.Listed:
        read.append(name)
        if name == "gpt":
            over.wait(60)
        return listed(root, name)

    monkeypatch.setattr(registry, "listed", slow)
    yield read
    over.set()


def test_storage_that_hangs_holds_up_nobody_else(root: str, hung: list[str]) -> None:
    async def ask() -> None:
        catalog = Catalog(timeout_s=0.2)
        impatient = [asyncio.create_task(catalog.versions(root, "gpt")) for _ in range(40)]
        await asyncio.sleep(0.05)
        for task in impatient[:30]:
            task.cancel()
        assert await catalog.versions(root, "dcgan") == []
        await asyncio.to_thread(time.monotonic)  # what others run on threads goes on
        for task in impatient[30:]:
            with pytest.raises(Unavailable, match="storage does not answer"):
                await task
        assert sorted(hung) == ["dcgan", "gpt"], "one thread waits for all"

    asyncio.run(ask())


def test_what_took_long_to_read_is_kept_as_long(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, listed = [], registry.listed

    def slow(root: Any, name: str) -> registry.Listed:
        read.append(name)
        time.sleep(0.4)
        return listed(root, name)

    monkeypatch.setattr(registry, "listed", slow)
    monkeypatch.setattr("serve.catalog.AGE_S", 0.3)

    async def ask() -> None:
        catalog = Catalog(timeout_s=0.1)
        with pytest.raises(Unavailable):
            await catalog.versions(root, "gpt")
        await asyncio.sleep(0.45)
        assert len(await catalog.versions(root, "gpt")) == 2, "it came meanwhile"
        assert read == ["gpt"]
        await asyncio.sleep(0.3)
        with pytest.raises(Unavailable):
            await catalog.versions(root, "gpt")
        assert read == ["gpt", "gpt"], "and was old"

    asyncio.run(ask())


def test_a_storage_that_cannot_be_opened_damages_nothing(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once made every version of a registry an unfinished one, and every alias a damaged one."""
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
