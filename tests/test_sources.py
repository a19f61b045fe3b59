"""Files of a source: what paths, folders and globs match, their fingerprints, and names."""

from pathlib import Path

import pytest

from cluster import storage
from train.data.sources import find_files, identity, name_of

SUFFIXES = (".txt", ".md")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files in it and in its subfolders."""
    for name in ("a.txt", "b.md", "x/c.txt", "x/y/d.TXT", "x/.hidden/e.txt", ".f.txt", "x/.g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "fixed", "expected"),
    [
        ("a.txt", "", ["a.txt"]),
        (".f.txt", "", [".f.txt"]),  # hidden, but named in full
        ("x/c.txt", "x", ["c.txt"]),
        (".", "", ["a.txt", "b.md", "x/c.txt", "x/y/d.TXT"]),
        ("x", "x", ["c.txt", "y/d.TXT"]),
        ("x/", "x", ["c.txt", "y/d.TXT"]),
        ("*.txt", "", ["a.txt"]),
        ("./*.txt", "", ["a.txt"]),
        ("*", "", ["a.txt", "b.md"]),
        ("?/*.txt", "", ["x/c.txt"]),
        ("*/*/*", "", ["x/y/d.TXT"]),
        ("[a-b].*", "", ["a.txt", "b.md"]),
        ("x/*", "x", ["c.txt"]),
        ("x*/c.txt", "", ["x/c.txt"]),
        ("**", "", ["a.txt", "b.md", "x/c.txt", "x/y/d.TXT"]),
        ("**/*.txt", "", ["a.txt", "x/c.txt"]),
        ("x/**/*.TXT", "x", ["y/d.TXT"]),
        ("nowhere", "", []),
        ("nowhere/*", "", []),
        ("x/*.md", "x", []),
    ],
)
def test_files_are_found_by_path_folder_and_glob(
    tree: Path, pattern: str, fixed: str, expected: list[str]
) -> None:
    found = {str(tree / fixed / inside): inside for inside in expected}
    assert find_files(pattern, SUFFIXES) == found
    assert list(find_files(str(tree) + "/" + pattern, SUFFIXES)) == list(found)
    if "[" not in pattern:  # not valid in a URI
        assert find_files(f"file://{tree}/{pattern}", SUFFIXES) == found


def test_file_of_another_kind_is_refused(tree: Path) -> None:
    (tree / "x" / "z.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"x/z\.png is not one of the files expected here \(\.txt, \.md\): "
        r".* such as 'folder/\*\.txt'",
    ):
        find_files("x", SUFFIXES)
    assert list(find_files("x/*.txt", SUFFIXES)) == [str(tree / "x" / "c.txt")]


def test_identity_changes_with_the_content(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(str(tree / "a.txt"))
    assert first == storage.sha256(tree / "a.txt") + ".txt"
    (tree / "a.txt").write_text("other")
    assert identity(str(tree / "a.txt")) != first
    uri, size = f"file://{tree}/a.txt", len("other")
    monkeypatch.setattr(storage, "local_path", lambda uri: None)  # as on an object store
    assert identity(uri).startswith(f"{uri} {size} ")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("fashion-mnist", "fashion-mnist"),
        ("s3://bucket/My Plays_2.jsonl", "my-plays-2"),
        ("corpus/*.txt", "text"),
        ("corpus/*", "corpus"),
        ("/data/img_align_celeba/", "img-align-celeba"),
        ("hf:owner/Some.Set", "some"),
    ],
)
def test_data_set_is_named_after_its_source(source: str, name: str) -> None:
    assert name_of([source, "another"], "text") == name
