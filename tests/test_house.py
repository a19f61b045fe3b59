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
TORCHLESS = {
    "models",
    "models.bundle",
    "models.cli",
    "models.latents",
    "models.registry",
    "models.runtime",
    "models.storage",
}  # what serve may import of models
MAY_IMPORT = {
    "models": {"models"},
    "cluster": {"cluster", "models.cli", "models.storage"},
    "train": {"train", "models", "cluster.connect"},
    "tune": {"tune", "train", "models", "cluster.connect"},
    "serve": {"serve", "cluster.connect", *TORCHLESS},
}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (
                f"{node.module}.{name.name}" for name in node.names if (ROOT / node.module.replace(".", "/") / f"{name.name}.py").is_file()
            )


def allowed(module: str, may: set[str]) -> bool:
    return any(module == name or (name in PACKAGES and name != "models" and module.startswith(f"{name}.")) for name in may) or (
        "models" in may and may != MAY_IMPORT["serve"] and module.startswith("models.")
    )


def test_arrows_point_one_way() -> None:
    wrong = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for module in imports(file):
                ours = module.split(".")[0] in PACKAGES and (ROOT / module.split(".")[0]).is_dir()
                # `from cluster import connect` and `from cluster.connect import connect` both name the package on the way.
                on_the_way = any(name.startswith(f"{module}.") for name in MAY_IMPORT[package])
                if ours and not on_the_way and not allowed(module.removesuffix(".connect.connect"), MAY_IMPORT[package]):
                    wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_the_arrow_test_can_fail() -> None:
    assert not allowed("serve.engine", MAY_IMPORT["train"])
    assert not allowed("models.gpt", MAY_IMPORT["serve"])
    assert not allowed("train.config", MAY_IMPORT["cluster"])
    assert allowed("models.gpt", MAY_IMPORT["train"])
    assert allowed("models.bundle", MAY_IMPORT["serve"])


def test_serve_never_loads_torch() -> None:
    modules = [f"serve.{file.stem}" for file in sorted((ROOT / "serve").glob("*.py")) if file.stem not in {"__init__", "__main__"}]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_top_level_is_fixed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {name.split("/")[0] for name in tracked}
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {*PACKAGES, "tests", "benchmarks", "docs", ".ci"}
    assert not [name for name in top if name.endswith(".py")], "a .py at the root shadows modules of a submitted job"
    assert {"cluster.yaml", "pyproject.toml", "README.md", "CHANGELOG.md", "BENCHMARKS.md", "LICENSE", "Makefile"} <= top


def test_every_package_is_shipped() -> None:
    import tomllib

    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {str(Path(name).parent).replace("/", ".") for name in tracked} == shipped


def test_the_lock_names_the_versions_that_are_installed() -> None:
    from importlib.metadata import version

    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith(("#", " "))]
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
        "train/data/README.md",
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []


def readme_commands() -> list[str]:
    """The commands in the README's shell blocks, one a line."""
    if not (ROOT / "README.md").is_file():
        return []
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_exists(line: str, tmp_path: Path) -> None:
    """Each command starts: its options are known. What they do is the business of their own tests."""
    from train import config

    found = tmp_path / "best.yaml"  # what a search writes: a whole config
    found.write_text(config.dump(config.load("gpt", "gpt-tiny")))
    words = [str(found) if word.endswith("/best.yaml") else word for word in shlex.split(line)]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif "-m" in words and words[words.index("-m") + 1] in PACKAGES:
        module, *rest = words[words.index("-m") + 1 :]
        assert (ROOT / module / "__main__.py").is_file()
        dry = ["--dry-run"] if rest[:1] and rest[0] in {"gpt", "gan"} and module in {"train", "tune"} else ["--help"]
        done = subprocess.run(
            [sys.executable, "-m", module, *rest, *dry], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    else:
        assert words[0] in {"git", "cd", "source", "curl", "ray", "tensorboard", "export", "ssh"}, f"unknown command: {line}"
