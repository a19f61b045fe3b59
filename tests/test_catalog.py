"""What the gateway tells of the registry."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from models import registry
from serve.catalog import Catalog
from serve.errors import Unavailable, UnknownModel
from tests import bundles


@pytest.fixture
def root(tmp_path: Path) -> str:
    root = str(tmp_path / "models")
    for version in (1, 2):
        registry.publish(root, "gpt", bundles.tiny_gpt_bundle(tmp_path / f"gpt-{version}"))
    registry.alias(root, "gpt", "production", 1)
    return root


def looking_in(root: str) -> Catalog:
    catalog = Catalog()
    catalog.look_in({"gpt": root})
    return catalog


def test_versions_are_told_with_aliases_and_lineage_newest_first(root: str) -> None:
    told = asyncio.run(looking_in(root).versions("gpt"))
    assert [(one.id, one.version, one.aliases) for one in told] == [("gpt", 2, []), ("gpt", 1, ["production"])]
    manifest = registry.listed(root, "gpt").versions[1]
    assert (told[1].run, told[1].metrics, told[1].commit) == (manifest["run"], manifest["metrics"], manifest["commit"])


def test_a_version_that_is_damaged_is_not_told(root: str) -> None:
    Path(root, "gpt/2/manifest.json").write_text("{")
    assert [one.version for one in asyncio.run(looking_in(root).versions("gpt"))] == [1]


def test_a_sample_is_the_version_s_own_as_published_or_none(root: str) -> None:
    catalog = looking_in(root)
    assert asyncio.run(catalog.sample("gpt", 2)) == ("gpt", Path(root, "gpt/2/sample.txt").read_bytes())
    with pytest.raises(UnknownModel, match="no sample of gpt/3"):
        asyncio.run(catalog.sample("gpt", 3))
    Path(root, "gpt/2/sample.txt").write_text("something else")
    with pytest.raises(UnknownModel, match="sample of gpt/2 is damaged"):
        asyncio.run(catalog.sample("gpt", 2))
    Path(root, "gpt/2/sample.txt").unlink()
    with pytest.raises(UnknownModel, match="sample of gpt/2 is damaged"):
        asyncio.run(catalog.sample("gpt", 2))


def test_the_registry_is_read_at_most_every_few_seconds_and_anew_where_it_is_another(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    listed = registry.listed

    def counted(root: Any, name: str) -> registry.Listed:
        read.append(root)
        return listed(root, name)

    monkeypatch.setattr(registry, "listed", counted)

    async def ask() -> None:
        catalog = looking_in(root)
        await asyncio.gather(*(catalog.versions("gpt") for _ in range(20)))
        assert read == [root]
        other = str(tmp_path / "other")
        catalog.look_in({"gpt": other})
        assert await catalog.versions("gpt") == []
        assert read == [root, other]

    asyncio.run(ask())


def test_storage_that_does_not_answer_is_said(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(registry, "listed", broken)
    with pytest.raises(Unavailable, match="storage does not answer"):
        asyncio.run(looking_in(root).versions("gpt"))


def test_a_model_of_another_registry_is_not_told(root: str) -> None:
    with pytest.raises(UnknownModel, match="registry of gan is not known"):
        asyncio.run(looking_in(root).versions("gan"))
