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
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow import fs

from cluster import storage
from models import bundle, registry
from models.__main__ import main as models_command
from tests.test_bundle import MANIFEST


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
    """A store that cannot rename, as S3 can't: fsspec's, in memory."""
    usual = storage.locate
    memory = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    monkeypatch.setattr(
        storage,
        "locate",
        lambda uri: (
            (memory, str(uri).removeprefix("memory:/"))
            if str(uri).startswith("memory:")
            else usual(uri)
        ),
    )
    yield "memory://bucket/models"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


# ---------------------------------------------------------------- publishing


def test_versions_count_up_and_know_themselves(root: str, made: Path) -> None:
    assert [registry.publish(root, "gpt", made) for _ in range(3)] == [1, 2, 3]
    assert registry.versions(root, "gpt") == [1, 2, 3]
    assert registry.names(root) == ["gpt"]
    manifest = bundle.verify(storage.join(root, "gpt", "2"))
    assert (manifest["name"], manifest["version"]) == ("gpt", 2)
    assert bundle.read(made)["version"] is None, "the folder that was published stays as it was"


def test_who_may_read_the_model_may_read_its_versions(root: str, made: Path) -> None:
    made.chmod(0o700)
    registry.publish(root, "gpt", made)
    assert Path(root, "gpt", "1").stat().st_mode == Path(root, "gpt").stat().st_mode


def test_ten_follows_nine(root: str, made: Path) -> None:
    for _ in range(10):
        registry.publish(root, "gpt", made)
    assert registry.publish(root, "gpt", made) == 11
    assert registry.resolve(root, "gpt")[1] == 11


def test_a_damaged_bundle_is_not_published(root: str, made: Path) -> None:
    (made / "model.onnx").write_text("Graph")
    with pytest.raises(ValueError, match=r"model\.onnx is not what its bundle promises"):
        registry.publish(root, "gpt", made)
    assert not Path(root).exists()


@pytest.mark.parametrize("name", ["", ".hidden", "../gpt", "a/b", "gpt@x", "gpt 2", "-gpt"])
def test_a_name_must_be_usable_as_a_folder(root: str, made: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not usable"):
        registry.publish(root, name, made)


def _publish_some(root: str, folder: str, start: Any, numbers: Any) -> None:
    start.wait()
    for _ in range(10):
        numbers.put(registry.publish(root, "gpt", folder))


def test_publishers_at_once_get_a_version_each(root: str, made: Path) -> None:
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
shutil.copytree = lambda source, target: (target.mkdir(parents=True), (target / "manifest.json").write_text("{"), print("copying", flush=True), time.sleep(60))
registry.publish(sys.argv[1], "gpt", sys.argv[2])
"""


def test_a_publisher_killed_half_way_leaves_no_version(root: str, made: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_COPYING, root, str(made)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as publisher:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == "copying\n"
        publisher.send_signal(signal.SIGKILL)
    (left,) = Path(root, "gpt").iterdir()
    assert registry.versions(root, "gpt") == []
    assert registry.publish(root, "gpt", made) == 1
    assert left.exists(), "another publisher may still be copying"
    os.utime(left, times=(0, 0))
    assert registry.publish(root, "gpt", made) == 2
    assert not left.exists()


def test_an_old_folder_does_not_look_abandoned_while_it_is_published(
    root: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(made, times=(0, 0))
    write_manifest = bundle.write_manifest
    others: list[str] = []

    def after_another_publisher(*arguments: Any) -> None:
        if not others:
            others.append("is here")
            assert registry.publish(root, "gpt", made) == 1
        write_manifest(*arguments)

    monkeypatch.setattr(bundle, "write_manifest", after_another_publisher)
    assert registry.publish(root, "gpt", made) == 2
    assert registry.versions(root, "gpt") == [1, 2]


def test_a_half_written_version_is_not_listed_and_its_number_not_reused(
    root: str, made: Path
) -> None:
    registry.publish(root, "gpt", made)
    shutil.copytree(made, storage.join(root, "gpt", "2"))
    os.unlink(storage.join(root, "gpt", "2", "manifest.json"))
    assert registry.versions(root, "gpt") == [1]
    assert registry.resolve(root, "gpt")[1] == 1
    with pytest.raises(ValueError, match=r"gpt/2 has no manifest\.json"):
        registry.resolve(root, "gpt/2")
    assert registry.publish(root, "gpt", made) == 3


def test_a_damaged_newest_version_is_passed_over_but_not_in_silence(
    root: str, made: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        registry.publish(root, "gpt", made)
    place = Path(root, "gpt", "2", "manifest.json")
    place.write_text(place.read_text().replace('"opset": 24', '"opset": 25'))
    assert registry.resolve(root, "gpt")[1] == 1
    assert caplog.messages == ["gpt/2 is damaged: gpt/1 is the newest that is not"]
    with pytest.raises(ValueError, match="is not as it was written"):
        registry.resolve(root, "gpt/2")
    models_command(["list", "--storage", str(Path(root).parent)])
    assert "gpt/2 is damaged or not finished, and is not served" in capsys.readouterr().out


# ---------------------------------------------------------------- object stores


def test_an_object_store_holds_versions_and_aliases(object_store: str, made: Path) -> None:
    assert [registry.publish(object_store, "gpt", made) for _ in range(2)] == [1, 2]
    registry.alias(object_store, "gpt", "production", 1)
    assert registry.resolve(object_store, "gpt") == ("gpt", 1, f"{object_store}/gpt/1")
    assert bundle.verify(f"{object_store}/gpt/2")["version"] == 2


def test_an_interrupted_upload_is_no_version(
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


def test_publishers_at_once_on_an_object_store_never_share_a_version(
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


def test_aliases_set_at_once_on_an_object_store_all_stay(bucket: str, made: Path) -> None:
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


def test_a_name_alone_is_production_or_else_the_newest(three: str) -> None:
    assert registry.resolve(three, "gpt") == ("gpt", 3, f"{three}/gpt/3")
    registry.alias(three, "gpt", "staging", 2)
    assert registry.resolve(three, "gpt")[1] == 3
    registry.alias(three, "gpt", "production", 1)
    assert registry.resolve(three, "gpt")[1] == 1
    assert registry.resolve(three, "gpt@staging")[1] == 2
    assert registry.resolve(three, "gpt/3")[1] == 3


def test_an_alias_moves_and_moves_back(three: str) -> None:
    for version in (1, 3, 2):
        registry.alias(three, "gpt", "production", version)
        assert registry.aliases(three, "gpt") == {"production": version}


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("gtp", "model 'gtp' is not in .*: did you mean 'gpt'?"),
        ("cats", "model 'cats' is not in .*: there is gpt"),
        ("gpt/9", "model 'gpt' has no version 9: it has 1, 2, 3"),
        (
            "gpt@production",
            "model 'gpt' has no alias 'production': it has none; set one with `python -m models alias gpt production VERSION`",
        ),
        ("gpt/x", "is not understood"),
        ("gpt/0", "is not understood"),
        ("gpt/1@production", "is not understood"),
        ("../gpt", "is not understood"),
        ("", "is not understood"),
    ],
)
def test_an_unknown_reference_says_what_there_is(three: str, reference: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        registry.resolve(three, reference)


def test_a_misspelt_alias_names_the_nearest(three: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    with pytest.raises(ValueError, match=r"no alias 'prodution': did you mean 'production'\?"):
        registry.resolve(three, "gpt@prodution")


def test_an_empty_registry_says_how_to_fill_it(root: str) -> None:
    with pytest.raises(ValueError, match="python -m train export RUN"):
        registry.resolve(root, "gpt")
    assert registry.names(root) == []
    assert registry.versions(root, "gpt") == []


def test_an_alias_needs_an_undamaged_version(three: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    Path(three, "gpt", "2", "model.onnx").write_text("Graph")
    for version, sentence in ((2, "model.onnx is not what"), (7, "no version 7")):
        with pytest.raises(ValueError, match=sentence):
            registry.alias(three, "gpt", "production", version)
    assert registry.aliases(three, "gpt") == {"production": 1}


def test_an_alias_that_is_damaged_is_set_again(three: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    Path(three, "gpt", "aliases", "production.json").write_text("{")
    with pytest.raises(ValueError, match=r"aliases/production\.json is not valid JSON"):
        registry.resolve(three, "gpt")
    registry.alias(three, "gpt", "production", 2)
    assert registry.resolve(three, "gpt")[1] == 2


def test_a_damaged_alias_stops_nobody_who_does_not_ask_for_it(
    three: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for alias, version in (("production", 1), ("staging", 2)):
        registry.alias(three, "gpt", alias, version)
    Path(three, "gpt", "aliases", "staging.json").write_text("{")
    assert registry.resolve(three, "gpt")[1] == registry.resolve(three, "gpt@production")[1] == 1
    assert registry.aliases(three, "gpt") == {"production": 1, "staging": None}
    with pytest.raises(ValueError, match=r"aliases/staging\.json is not valid JSON"):
        registry.resolve(three, "gpt@staging")
    with pytest.raises(ValueError, match=r"no alias 'stagin': did you mean 'staging'\?"):
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


def test_an_alias_of_a_vanished_version_is_refused(three: str) -> None:
    registry.alias(three, "gpt", "production", 2)
    shutil.rmtree(storage.join(three, "gpt", "2"))
    with pytest.raises(ValueError, match="no version 2: it has 1, 3"):
        registry.resolve(three, "gpt")


@pytest.mark.parametrize(
    "content", ['["production"]', '{"version": "2"}', '{"version": true}', "{}"]
)
def test_damaged_aliases_are_named(three: str, content: str) -> None:
    registry.alias(three, "gpt", "production", 1)
    Path(three, "gpt", "aliases", "production.json").write_text(content)
    with pytest.raises(ValueError, match=r"aliases/production\.json is damaged"):
        registry.resolve(three, "gpt")


def _set_aliases(root: str, writer: int, start: Any) -> None:
    start.wait()
    for number in range(20):
        registry.alias(root, "gpt", f"writer-{writer}-{number}", 1 + number % 3)


def test_aliases_set_at_once_all_stay_and_readers_never_see_half(three: str) -> None:
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


def test_the_command_lists_shows_verifies_and_moves(
    root: str, made: Path, command: Command
) -> None:
    place = str(Path(root).parent)
    assert "no models in" in command("models", "list", "--storage", place).stdout
    for _ in range(2):
        registry.publish(root, "gpt", made)
    assert (
        command("models", "alias", "gpt", "production", "1", "--storage", place).stdout
        == "gpt@production is now gpt/1\n"
    )
    listed = command("models", "list", KILN_STORAGE=place).stdout
    assert "gpt/1" in listed
    assert "gpt/2" in listed
    assert listed.count("production") == 1
    assert (
        "transformers/config.json"
        in command("models", "show", "gpt@production", "--storage", place).stdout
    )
    assert (
        command("models", "verify", "gpt/2", "--storage", place).stdout
        == "gpt/2: 2 files, 7 bytes, all as published\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "gtp"], "error: model 'gtp' is not in"),
        (["verify", "gpt/1"], "model.onnx is not what its bundle promises"),
        (["alias", "gpt", "production", "5"], "error: model 'gpt' has no version 5: it has 1"),
    ],
)
def test_the_command_ends_with_a_sentence(
    root: str, made: Path, command: Command, arguments: list[str], sentence: str
) -> None:
    registry.publish(root, "gpt", made)
    Path(root, "gpt", "1", "model.onnx").write_text("Graph")
    done = command("models", *arguments, "--storage", str(Path(root).parent))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(Path(root, "gpt", "1", "manifest.json").read_text())["version"] == 1
