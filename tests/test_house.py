"""The repository's structure: import direction, packages, files and commands that docs name."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

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
    assert not is_allowed("train.launch", "serve.text.engine")
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
    files = sorted((ROOT / "serve").rglob("*.py"))
    modules = [module_of(file) for file in files if file.stem != "__main__"]
    assert len(modules) > 30
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("package", PACKAGES)
def test_commands_load_neither_torch_nor_ray_before_they_need_it(package: str) -> None:
    """Otherwise --help, --dry-run and a misspelt option take seconds."""
    heavy = {"torch", "ray", "matplotlib"}
    code = f"import sys, {package}.__main__\nprint({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_top_level_is_fixed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in tracked}
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {*PACKAGES, "tests", "benchmarks", "docs", ".ci", ".github"}
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

DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = [
    "README.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "train/data/shipped/README.md",
    *DOCS,
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(text: str) -> Iterator[str]:
    """Yield the lines of a page that are neither code nor table, link targets left out."""
    for line in FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            yield re.sub(r"\]\([^)]*\)", "]()", line)


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", read(page)) if "://" not in link
    ]
    assert [
        link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_wrapped_at_100_columns(page: str) -> None:
    assert [line for line in prose(read(page)) if len(line) > 100] == []


def test_files_that_docs_name_exist() -> None:
    named = {
        (page, path)
        for page in PAGES
        if page != "CHANGELOG.md"
        for path in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|yaml|md))`", read(page))
        if path.split("/")[0] in {*PACKAGES, "tests", "benchmarks", "docs"}
    }
    assert len(named) > 20
    assert [(page, path) for page, path in sorted(named) if not (ROOT / path).exists()] == []


def test_pages_that_code_names_exist() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.yaml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    named = {
        (file, page)
        for file in tracked
        for page in re.findall(r"\bdocs/[\w/.-]+\.(?:md|png)", read(file))
    }
    assert named
    assert [(file, page) for file, page in sorted(named) if not (ROOT / page).exists()] == []


def test_newest_release_in_the_changelog_is_this_version() -> None:
    import tomllib

    headings = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d{2}-\d{2}", headings[1])
    assert released, headings[1]
    assert released[1] == tomllib.loads(read("pyproject.toml"))["project"]["version"]


def test_ci_runs_the_same_targets_on_every_host() -> None:
    local = re.findall(r"^make \w+$", read(".ci/run"), re.MULTILINE)
    hosted = re.findall(r"- run: (make \w+)$", read(".github/workflows/ci.yml"), re.MULTILINE)
    assert local == hosted
    assert "make test" in local


def test_files_left_out_by_make_quick_exist() -> None:
    from tests.support.marks import FILES

    stems = [file.stem for file in (ROOT / "tests").glob("test_*.py")]
    assert [name for name in FILES if not any(stem.startswith(name) for stem in stems)] == []


def test_files_that_make_test_orders_exist() -> None:
    from tests.support.groups import GROUPS, LAST

    stems = {path.stem for path in (ROOT / "tests").glob("test_*")}  # test_serve is a folder
    assert {*LAST, *(name for group in GROUPS for name in group)} - stems == set()


def test_storage_page_shows_the_checkpoint_format_that_is_written() -> None:
    from train.run import checkpoint

    page, trainer = read("docs/reference/storage.md"), read("train/gan/trainer.py")
    assert f'"format": {checkpoint.FORMAT}' in page
    for name in ("gan_cadence", "critic_updates_in_step"):
        assert f'"{name}"' in trainer
        assert name in page


def test_every_module_is_in_the_api_reference() -> None:
    from docs.hooks import reference_pages

    listed = {
        line.removeprefix("::: ")
        for _, page in reference_pages()
        for line in page.splitlines()
        if line.startswith(":::")
    }
    modules = {
        module_of(file)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if not file.stem.startswith("__")
    }
    assert listed == modules


def commands(page: str) -> list[str]:
    """Return the commands in a page's shell blocks; a backslash continues a line."""
    blocks = [code for language, code in FENCE.findall(read(page)) if language in {"bash", "sh"}]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]


def documented_commands() -> list[str]:
    """Return the commands of the README, the start pages and the guides, each once."""
    pages = [
        "README.md",
        "CONTRIBUTING.md",
        *(page for page in DOCS if page.startswith(("docs/start/", "docs/guides/"))),
    ]
    return list(dict.fromkeys(line for page in pages for line in commands(page)))


def parse(module: str, argv: list[str]) -> None:
    """Parse a command without running it.

    Raises:
        ValueError: a command, option or config key is unknown.
    """
    from train.config import loader

    program = importlib.import_module(f"{module}.__main__").program
    # A kind's config keys are options of its command only.
    arguments = (program(argv) if module in {"train", "tune"} else program()).parse(argv)
    if arguments.keys:  # verify-resume and extractor, which is a GAN's, parse them when they run
        loader.parse(getattr(arguments, "kind", "gan"), arguments.keys)


@pytest.mark.parametrize("line", documented_commands())
def test_documented_command_exists(line: str, tmp_path: Path) -> None:
    """The command starts, and its options are known. What it does is tested elsewhere."""
    from train.config import loader

    found = tmp_path / "best.yaml"  # what a search writes: a whole config
    found.write_text(loader.load("gpt", "gpt-tiny").to_yaml())
    words = [str(found) if word.endswith("/best.yaml") else word for word in shlex.split(line)]
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif "-m" in words and words[words.index("-m") + 1] in PACKAGES:
        module, *argv = words[words.index("-m") + 1 :]
        parse(module, argv)
        # A dry run checks the values too.
        starts_a_run = module in {"train", "tune"} and argv[0] in {"gpt", "gan"}
        done = subprocess.run(
            [sys.executable, "-m", module, *argv, "--dry-run" if starts_a_run else "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    else:
        known = {"git", "cd", "source", "curl", "ray", "tensorboard", "export", "ssh"}
        assert words[0] in {*known, ".venv/bin/pre-commit"}, f"unknown command: {line}"


@pytest.mark.parametrize(
    "line",
    [
        "cluster status --bogus 3",
        "models list --bogus 3",
        "serve up --bogus 3",
        "train gpt --bogus 3",
        "train export my-gpt --bogus 3",
        "train extractor --config gan-tiny --bogus 3",
        "train verify-resume gpt --bogus 3",
        "tune gan --bogus 3",
    ],
)
def test_command_with_an_unknown_option_does_not_count_as_existing(line: str) -> None:
    module, *argv = line.split()
    with pytest.raises(ValueError, match="--bogus"):
        parse(module, argv)
