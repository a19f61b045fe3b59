"""What the documentation site adds to the pages of docs/: an API reference made from docstrings,
and the Markdown files that lie outside docs/.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "models", "train", "tune", "serve")
OUTSIDE = ("BENCHMARKS.md", "CONTRIBUTING.md", "CHANGELOG.md", "train/data/shipped/README.md")


def reference_pages() -> Iterator[tuple[str, str]]:
    """Yield (path, Markdown) of one page per package that has modules, subpackages included."""
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            folder = init.parent.relative_to(ROOT)
            modules = sorted(
                file.stem for file in init.parent.glob("*.py") if not file.stem.startswith("__")
            )
            if modules:
                name = ".".join(folder.parts)
                blocks = [f"::: {name}.{module}" for module in modules]
                yield f"reference/{folder}.md", "\n\n".join([f"# {name}", *blocks, ""])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference pages into the navigation."""
    assert config.nav is not None
    section = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    section.extend(path for path, _ in reference_pages() if path not in section)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages and the Markdown files outside docs/."""
    for path, content in reference_pages():
        files.append(File.generated(config, path, content=content))
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between docs/ and the rest of the repository at the site's own pages."""
    if page.file.src_uri in OUTSIDE:
        return markdown.replace("](docs/", "](")
    # On the site the files of OUTSIDE lie beside docs/'s own folders, one level lower.
    return re.sub(r"\]\(\.\./((?:\.\./)*(?:[A-Z]+\.md|train/data/))", r"](\1", markdown)
