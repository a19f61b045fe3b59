"""The house keeps its shape: who imports whom, what lies where, commands that the README names."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["cluster", "models", "serve", "train", "tune"]
MAY_IMPORT = {
    "cluster": {"cluster"},
    "models": {"models", "cluster"},
    "train": {"train", "models", "cluster"},
    "tune": {"tune", "train", "models", "cluster"},
    "serve": {"serve", "models", "cluster"},
}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(file: Path) -> Iterator[str]:
    """Yield every module that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if is_module(name) else node.module for name in names)


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return {module: the modules of ours that it imports}."""
    files = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    return {
        module_of(file): {name for name in imports(file) if name.split(".")[0] in PACKAGES}
        for file in files
    }


def is_allowed(importer: str, imported: str) -> bool:
    if importer.split(".")[0] == "serve" and f"{imported}.".startswith("models.nets."):
        return False
    return imported.split(".")[0] in MAY_IMPORT[importer.split(".")[0]]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for module in arrows:
        seen, open_ = set[str](), [module]
        while open_:
            for imported in arrows.get(open_.pop(), set()) - seen:
                seen.add(imported)
                open_.append(imported)
        reached[module] = seen
    return [
        sorted(
            {module} | {other for other in reached[module] if module in reached.get(other, set())}
        )
        for module in arrows
        if module in reached[module]
    ]


def test_arrows_point_one_way() -> None:
    arrows = graph()
    assert len(arrows) > 60
    wrong = [
        f"{one} imports {other}"
        for one, others in arrows.items()
        for other in others
        if not is_allowed(one, other)
    ]
    assert wrong == []


def test_the_arrow_test_can_fail() -> None:
    assert not is_allowed("train.launch", "serve.engine")
    assert not is_allowed("serve.session", "models.nets.gpt")
    assert not is_allowed("cluster.local", "models.registry")
    assert is_allowed("train.launch", "models.nets.gpt")
    assert is_allowed("serve.session", "models.bundle")


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count: a circle that is imported lazily is still one."""
    assert circles(graph()) == []


def test_the_circle_test_can_fail() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"], ["b", "c"]]


def test_only_nets_and_training_import_torch() -> None:
    files = [
        file
        for package in ("cluster", "models", "serve")
        for file in (ROOT / package).rglob("*.py")
    ]
    with_torch = {
        module_of(file)
        for file in files
        if "torch" in {name.split(".")[0] for name in imports(file)}
    }
    assert with_torch
    assert {name for name in with_torch if not name.startswith("models.nets.")} == set()


def test_serve_never_loads_torch() -> None:
    modules = [
        f"serve.{file.stem}"
        for file in sorted((ROOT / "serve").glob("*.py"))
        if file.stem not in {"__init__", "__main__"}
    ]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_top_level_is_fixed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in tracked}
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {*PACKAGES, "tests", "benchmarks", "docs", ".ci"}
    assert not [name for name in top if name.endswith(".py")], (
        "a .py at the root shadows modules of a submitted job"
    )
    assert {
        "cluster.yaml",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "BENCHMARKS.md",
        "LICENSE",
        "Makefile",
    } <= top


def test_every_package_is_shipped() -> None:
    import tomllib

    shipped = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {str(Path(name).parent).replace("/", ".") for name in tracked} == shipped


def test_the_lock_names_the_versions_that_are_installed() -> None:
    from importlib.metadata import version

    from packaging.requirements import Requirement

    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith(("#", " "))
    ]
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(lines)
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            assert version(requirement.name) in requirement.specifier, line


# ---------------------------------------------------------------- README and docs


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "BENCHMARKS.md",
        "CHANGELOG.md",
        "train/data/shipped/README.md",
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [
        link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()
    ] == []


def readme_commands() -> list[str]:
    """The commands in the README's shell blocks, one a line."""
    if not (ROOT / "README.md").is_file():
        return []
    blocks = re.findall(
        r"```(?:bash|sh|console)\n(.*?)```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [
        line.split("  #")[0].strip()
        for line in joined.splitlines()
        if line.strip() and not line.startswith("#")
    ]


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_exists(line: str, tmp_path: Path) -> None:
    """Each command starts: its options are known. What they do is the business of their own tests."""
    from train.config import loader as config

    found = tmp_path / "best.yaml"  # what a search writes: a whole config
    found.write_text(config.load("gpt", "gpt-tiny").to_yaml())
    words = [str(found) if word.endswith("/best.yaml") else word for word in shlex.split(line)]
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif "-m" in words and words[words.index("-m") + 1] in PACKAGES:
        module, *rest = words[words.index("-m") + 1 :]
        assert (ROOT / module / "__main__.py").is_file()
        dry = (
            ["--dry-run"]
            if rest[:1] and rest[0] in {"gpt", "gan"} and module in {"train", "tune"}
            else ["--help"]
        )
        done = subprocess.run(
            [sys.executable, "-m", module, *rest, *dry],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    else:
        assert words[0] in {"git", "cd", "source", "curl", "ray", "tensorboard", "export", "ssh"}, (
            f"unknown command: {line}"
        )
