"""The registry: publishing, references, aliases, and the command `python -m models`."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow import fs

from cluster import storage
from models import bundle, registry
from models.__main__ import main as models_command
from tests.support.manifests import MANIFEST


def make(folder: Path, content: str = "graph") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text(content)
    (folder / "transformers").mkdir()
    (folder / "transformers" / "config.json").write_text("{}")
    bundle.write(folder, MANIFEST)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle")


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "models")


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a store in memory that, like S3, cannot rename."""
    original = storage.locate
    memory = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))

    def locate(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
        if str(uri).startswith("memory:"):
            return memory, str(uri).removeprefix("memory:/")
        return original(uri)

    monkeypatch.setattr(storage, "locate", locate)
    yield "memory://bucket/models"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


# ---------------------------------------------------------------- publishing


def test_versions_count_up_and_are_named_in_their_manifests(root: str, made: Path) -> None:
    assert [registry.publish(root, "gpt", made) for _ in range(3)] == [1, 2, 3]
    assert registry.versions(root, "gpt") == [1, 2, 3]
    assert registry.names(root) == ["gpt"]
    manifest = bundle.verify(storage.join(root, "gpt", "2"))
    assert (manifest["name"], manifest["version"]) == ("gpt", 2)
    assert bundle.read(made)["version"] is None, "the published folder must not change"


def test_versions_have_the_mode_of_the_model_folder(root: str, made: Path) -> None:
    made.chmod(0o700)
    registry.publish(root, "gpt", made)
    assert Path(root, "gpt", "1").stat().st_mode == Path(root, "gpt").stat().st_mode


def test_versions_are_ordered_as_numbers(root: str, made: Path) -> None:
    for _ in range(10):
        registry.publish(root, "gpt", made)
    assert registry.publish(root, "gpt", made) == 11
    assert registry.resolve(root, "gpt")[1] == 11


def test_damaged_bundle_is_not_published(root: str, made: Path) -> None:
    (made / "model.onnx").write_text("Graph")
    with pytest.raises(
        ValueError, match=r"model\.onnx does not have the sha256 that its manifest lists"
    ):
        registry.publish(root, "gpt", made)
    assert not Path(root).exists()


@pytest.mark.parametrize("name", ["", ".hidden", "../gpt", "a/b", "gpt@x", "gpt 2", "-gpt"])
def test_name_must_be_usable_as_a_folder(root: str, made: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not usable"):
        registry.publish(root, name, made)


def _publish_some(
    root: str, folder: str, start: Barrier, numbers: "multiprocessing.Queue[int]"
) -> None:
    start.wait()
    for _ in range(10):
        numbers.put(registry.publish(root, "gpt", folder))


def test_concurrent_publishers_get_a_version_each(root: str, made: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, numbers = context.Barrier(3), context.Queue()
    publishers = [
        context.Process(target=_publish_some, args=(root, str(made), start, numbers))
        for _ in range(3)
    ]
    for publisher in publishers:
        publisher.start()
    got = sorted(numbers.get(timeout=60) for _ in range(30))
    for publisher in publishers:
        publisher.join(60)
    assert got == list(range(1, 31)) == registry.versions(root, "gpt")
    for version in got:
        assert bundle.verify(storage.join(root, "gpt", str(version)))["version"] == version
    assert [entry for entry in os.listdir(storage.join(root, "gpt")) if entry.startswith(".")] == []


KILLED_WHILE_COPYING = """
import shutil, sys, time
from models import registry

def copy(source, target):
    target.mkdir(parents=True)
    (target / "manifest.json").write_text("{")
    print("copying", flush=True)
    time.sleep(60)

shutil.copytree = copy
registry.publish(sys.argv[1], "gpt", sys.argv[2])
"""


def test_killed_publisher_leaves_no_version(root: str, made: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_COPYING, root, str(made)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as publisher:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == "copying\n"
        publisher.send_signal(signal.SIGKILL)
    (left,) = Path(root, "gpt").iterdir()
    assert registry.versions(root, "gpt") == []
    assert registry.publish(root, "gpt", made) == 1
    assert left.exists(), "its publisher may still be copying"
    os.utime(left, times=(0, 0))
    assert registry.publish(root, "gpt", made) == 2
    assert not left.exists()


def test_copy_of_an_old_folder_is_not_deleted_as_abandoned(
    root: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(made, times=(0, 0))
    write_manifest = bundle.write_manifest
    calls: list[str] = []

    def after_another_publisher(*arguments: Any) -> None:
        if not calls:
            calls.append("first")
            assert registry.publish(root, "gpt", made) == 1
        write_manifest(*arguments)

    monkeypatch.setattr(bundle, "write_manifest", after_another_publisher)
    assert registry.publish(root, "gpt", made) == 2
    assert registry.versions(root, "gpt") == [1, 2]


def test_incomplete_version_is_not_listed_and_its_number_not_reused(root: str, made: Path) -> None:
    registry.publish(root, "gpt", made)
    shutil.copytree(made, storage.join(root, "gpt", "2"))
    os.unlink(storage.join(root, "gpt", "2", "manifest.json"))
    assert registry.versions(root, "gpt") == [1]
    assert registry.resolve(root, "gpt")[1] == 1
    with pytest.raises(ValueError, match=r"gpt/2 has no manifest\.json"):
        registry.resolve(root, "gpt/2")
    assert registry.publish(root, "gpt", made) == 3


def test_damaged_newest_version_is_skipped_with_a_warning(
    root: str, made: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        registry.publish(root, "gpt", made)
    manifest = Path(root, "gpt", "2", "manifest.json")
    manifest.write_text(manifest.read_text().replace('"opset": 24', '"opset": 25'))
    assert registry.resolve(root, "gpt")[1] == 1
    assert caplog.messages == ["gpt/2 is damaged: using gpt/1, the newest complete version"]
    with pytest.raises(ValueError, match="does not match its own sha256"):
        registry.resolve(root, "gpt/2")
    models_command(["list", "--storage", str(Path(root).parent)])
    assert "gpt/2 is damaged or incomplete, and is not served" in capsys.readouterr().out


# ---------------------------------------------------------------- object stores


def test_object_store_has_versions_and_aliases(object_store: str, made: Path) -> None:
    assert [registry.publish(object_store, "gpt", made) for _ in range(2)] == [1, 2]
    registry.alias(object_store, "gpt", "production", 1)
    assert registry.resolve(object_store, "gpt") == ("gpt", 1, f"{object_store}/gpt/1")
    assert bundle.verify(f"{object_store}/gpt/2")["version"] == 2


def test_interrupted_upload_is_not_a_version(
    object_store: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", _raise_connection_error)
        with pytest.raises(ConnectionError):
            registry.publish(object_store, "gpt", made)
    assert storage.exists(f"{object_store}/gpt/1/model.onnx")
    assert registry.versions(object_store, "gpt") == []
    assert registry.publish(object_store, "gpt", made) == 2


def _raise_connection_error(*_: Any) -> None:
    raise ConnectionError("the network is gone")


def test_concurrent_publishers_on_an_object_store_get_a_version_each(
    object_store: str, tmp_path: Path
) -> None:
    folders = [make(tmp_path / f"bundle-{index}", f"graph {index}") for index in range(4)]
    numbers: dict[int, int] = {}
    threads = [
        threading.Thread(
            target=lambda index=index: numbers.update(
                {index: registry.publish(object_store, "gpt", folders[index])}
            )
        )
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(numbers.values())) == 4
    for index, version in numbers.items():
        bundle.verify(f"{object_store}/gpt/{version}")
        assert (
            storage.read_bytes(f"{object_store}/gpt/{version}/model.onnx")
            == f"graph {index}".encode()
        )


def test_concurrent_aliases_on_an_object_store_are_all_kept(bucket: str, made: Path) -> None:
    registry.publish(bucket, "gpt", made)
    start = threading.Barrier(4)

    def set_some(writer: int) -> None:
        start.wait()
        for number in range(5):
            registry.alias(bucket, "gpt", f"writer-{writer}-{number}", 1)

    writers = [threading.Thread(target=set_some, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert len(registry.aliases(bucket, "gpt")) == 20


# ---------------------------------------------------------------- references and aliases


@pytest.fixture
def three(root: str, made: Path) -> str:
    for _ in range(3):
        registry.publish(root, "gpt", made)
    return root


def test_name_alone_means_production_else_the_newest(three: str) -> None:
    assert registry.resolve(three, "gpt") == ("gpt", 3, f"{three}/gpt/3")
    registry.alias(three, "gpt", "staging", 2)
    assert registry.resolve(three, "gpt")[1] == 3
    registry.alias(three, "gpt", "production", 1)
    assert registry.resolve(three, "gpt")[1] == 1
    assert registry.resolve(three, "gpt@staging")[1] == 2
    assert registry.resolve(three, "gpt/3")[1] == 3


def test_alias_can_be_moved(three: str) -> None:
    for version in (1, 3, 2):
        registry.alias(three, "gpt", "production", version)
        assert registry.aliases(three, "gpt") == {"production": version}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gtp", r"model 'gtp' is not in .*, did you mean gpt\?"),
        ("cats", "model 'cats' is not in .*: there is gpt"),
        ("gpt/9", "model 'gpt' has no version 9: it has 1, 2, 3"),
        (
            "gpt@production",
            "model 'gpt' has no alias 'production': it has none; set one with "
            "`python -m models alias gpt production VERSION`",
        ),
        ("gpt/x", "is not understood"),
        ("gpt/0", "is not understood"),
        ("gpt/1@production", "is not understood"),
        ("../gpt", "is not understood"),
        ("", "is not understood"),
    ],
)
def test_unknown_reference_names_what_exists(three: str, reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.resolve(three, reference)


def test_misspelt_alias_names_the_nearest(three: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    with pytest.raises(ValueError, match=r"no alias 'prodution', did you mean production\?"):
        registry.resolve(three, "gpt@prodution")


def test_empty_registry_says_how_to_export(root: str) -> None:
    with pytest.raises(ValueError, match="python -m train export RUN"):
        registry.resolve(root, "gpt")
    assert registry.names(root) == []
    assert registry.versions(root, "gpt") == []


def test_alias_requires_an_undamaged_version(three: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    Path(three, "gpt", "2", "model.onnx").write_text("Graph")
    for version, message in ((2, "model.onnx does not have the sha256"), (7, "no version 7")):
        with pytest.raises(ValueError, match=message):
            registry.alias(three, "gpt", "production", version)
    assert registry.aliases(three, "gpt") == {"production": 1}


def test_damaged_alias_can_be_set_again(three: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    Path(three, "gpt", "aliases", "production.json").write_text("{")
    with pytest.raises(ValueError, match=r"aliases/production\.json is not valid JSON"):
        registry.resolve(three, "gpt")
    registry.alias(three, "gpt", "production", 2)
    assert registry.resolve(three, "gpt")[1] == 2


def test_damaged_alias_does_not_affect_other_references(
    three: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for alias, version in (("production", 1), ("staging", 2)):
        registry.alias(three, "gpt", alias, version)
    Path(three, "gpt", "aliases", "staging.json").write_text("{")
    assert registry.resolve(three, "gpt")[1] == registry.resolve(three, "gpt@production")[1] == 1
    assert registry.aliases(three, "gpt") == {"production": 1, "staging": None}
    with pytest.raises(ValueError, match=r"aliases/staging\.json is not valid JSON"):
        registry.resolve(three, "gpt@staging")
    with pytest.raises(ValueError, match=r"no alias 'stagin', did you mean staging\?"):
        registry.resolve(three, "gpt@stagin")
    models_command(["list", "--storage", str(Path(three).parent)])
    listed = capsys.readouterr().out
    assert (
        "gpt@staging is damaged: set it again with `python -m models alias gpt staging VERSION`\n"
        in listed
    )
    assert all(what in listed for what in ("gpt/1", "gpt/2", "production"))
    models_command(["show", "gpt", "--storage", str(Path(three).parent)])
    assert "aliases  production\n" in re.sub(
        " +\n", "\n", re.sub(" {2,}", "  ", capsys.readouterr().out)
    )


def test_alias_of_a_deleted_version_is_an_error(three: str) -> None:
    registry.alias(three, "gpt", "production", 2)
    shutil.rmtree(storage.join(three, "gpt", "2"))
    with pytest.raises(ValueError, match="no version 2: it has 1, 3"):
        registry.resolve(three, "gpt")


@pytest.mark.parametrize(
    "content", ['["production"]', '{"version": "2"}', '{"version": true}', "{}"]
)
def test_damaged_alias_is_named(three: str, content: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    Path(three, "gpt", "aliases", "production.json").write_text(content)
    with pytest.raises(ValueError, match=r"aliases/production\.json is damaged"):
        registry.resolve(three, "gpt")


def _set_aliases(root: str, writer: int, start: Barrier) -> None:
    start.wait()
    for number in range(20):
        registry.alias(root, "gpt", f"writer-{writer}-{number}", 1 + number % 3)


def test_concurrent_aliases_are_all_kept_and_never_read_half_written(three: str) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    writers = [
        context.Process(target=_set_aliases, args=(three, writer, start)) for writer in range(3)
    ]
    for writer in writers:
        writer.start()
    start.wait(60)
    while any(writer.is_alive() for writer in writers):
        registry.aliases(three, "gpt")
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(registry.aliases(three, "gpt")) == 60


# ---------------------------------------------------------------- the command

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_command_lists_shows_verifies_and_sets_aliases(
    root: str, made: Path, command: Command
) -> None:
    store = str(Path(root).parent)
    assert "no models in" in command("models", "list", "--storage", store).stdout
    for _ in range(2):
        registry.publish(root, "gpt", made)
    assert (
        command("models", "alias", "gpt", "production", "1", "--storage", store).stdout
        == "gpt@production is now gpt/1\n"
    )
    listed = command("models", "list", KILN_STORAGE=store).stdout
    assert "gpt/1" in listed
    assert "gpt/2" in listed
    assert listed.count("production") == 1
    assert (
        "transformers/config.json"
        in command("models", "show", "gpt@production", "--storage", store).stdout
    )
    assert (
        command("models", "verify", "gpt/2", "--storage", store).stdout
        == "gpt/2: 2 files, 7 bytes, all as published\n"
    )


def test_command_prints_json(root: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(*arguments: str) -> Any:
        assert models_command([*arguments, "--json", "--storage", str(Path(root).parent)]) == 0
        return json.loads(capsys.readouterr().out)

    assert result("list") == []
    for _ in range(2):
        registry.publish(root, "gpt", made)
    registry.alias(root, "gpt", "production", 1)
    (model,) = result("list")
    assert (model["name"], model["incomplete"]) == ("gpt", [])
    assert model["aliases"] == {"production": 1}
    assert [(entry["version"], entry["aliases"]) for entry in model["versions"]] == [
        (1, ["production"]),
        (2, []),
    ]
    shown = result("show", "gpt@production")
    assert (shown["name"], shown["version"], shown["aliases"]) == ("gpt", 1, ["production"])
    assert shown["manifest"] == bundle.read(shown["uri"]) == model["versions"][0]["manifest"]
    assert result("verify", "gpt/2") == {"name": "gpt", "version": 2, "files": 2, "bytes": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "gtp"], "error: model 'gtp' is not in"),
        (["verify", "gpt/1"], "model.onnx does not have the sha256 that its manifest lists"),
        (["alias", "gpt", "production", "5"], "error: model 'gpt' has no version 5: it has 1"),
    ],
)
def test_command_fails_with_an_error_of_one_line(
    root: str, made: Path, command: Command, arguments: list[str], message: str
) -> None:
    registry.publish(root, "gpt", made)
    Path(root, "gpt", "1", "model.onnx").write_text("Graph")
    done = command("models", *arguments, "--storage", str(Path(root).parent))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(Path(root, "gpt", "1", "manifest.json").read_text())["version"] == 1
