"""The files that names, folders and globs stand for."""

from pathlib import Path

import pytest

from train.data.dataset import find_files

SUFFIXES = (".txt", ".md")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files in it and below it."""
    for name in ("a.txt", "b.md", "x/c.txt", "x/y/d.TXT", "x/.hidden/e.txt", ".f.txt", "x/.g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "fixed", "expected"),
    [
        ("a.txt", "", ["a.txt"]),
        (".f.txt", "", [".f.txt"]),  # named in full, so meant
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
def test_names_folders_and_globs(tree: Path, pattern: str, fixed: str, expected: list[str]) -> None:
    found = {str(tree / fixed / inside): inside for inside in expected}
    assert find_files(pattern, SUFFIXES) == found
    assert list(find_files(str(tree) + "/" + pattern, SUFFIXES)) == list(found)
    if "[" not in pattern:  # no character of a URI
        assert find_files(f"file://{tree}/{pattern}", SUFFIXES) == found


def test_another_kind_of_file_is_named(tree: Path) -> None:
    (tree / "x" / "z.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"x/z\.png is not one of the files expected here \(\.txt, \.md\): .* such as 'folder/\*\.txt'",
    ):
        find_files("x", SUFFIXES)
    assert list(find_files("x/*.txt", SUFFIXES)) == [str(tree / "x" / "c.txt")]
