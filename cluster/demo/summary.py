"""The results of the demo: summary.json, the training curves, and the table at its end."""

import shutil
from pathlib import Path
from typing import TypedDict

from rich.table import Table

from cluster import cli, storage
from cluster.demo.client import Responses


class Files(TypedDict):
    """Paths of what the demo leaves."""

    text: str
    images: str
    curves: list[str]
    reports: list[str]
    page: str | None  # None: no screenshot was taken


class Summary(TypedDict):
    """The content of summary.json."""

    seconds: float
    stages_s: dict[str, float]
    heldout_bits_per_byte: float
    heldout_frechet_distance: float
    heldout_frechet_distance_baseline: float
    heldout_recall: float
    train_tokens_per_s: float
    train_images_per_s: float
    served_tokens_per_s: float
    served_images_per_s: float
    text: str
    files: Files
    runs: dict[str, str]  # kind: name


def write(
    folder: Path,
    runs: dict[str, str],
    stages_s: dict[str, float],
    seconds: float,
    responses: Responses,
    page: Path | None,
) -> Summary:
    """Collect the results and write the text, the images, the curves and summary.json.

    Args:
        folder: of the demo.
        runs: {kind: name of its run}.
        stages_s: seconds of each stage.
        seconds: of the whole demo.
        responses: what the endpoint has generated.
        page: the screenshot of the studio page.
    """
    (folder / "text.txt").write_text(responses.text, encoding="utf-8")
    responses.sheet.save(folder / "images.png")
    for kind, name in runs.items():
        shutil.copy(folder / "runs" / name / "curves.png", folder / f"curves-{kind}.png")
    gpt, gan = (
        storage.read_json(folder / "runs" / runs[kind] / "summary.json")["metrics"]
        for kind in ("gpt", "gan")
    )
    summary: Summary = {
        "seconds": round(seconds, 1),
        "stages_s": stages_s,
        "heldout_bits_per_byte": gpt["heldout_bits_per_byte"],
        "heldout_frechet_distance": gan["heldout_frechet_distance"],
        "heldout_frechet_distance_baseline": gan["heldout_frechet_distance_baseline"],
        "heldout_recall": gan["heldout_recall"],
        "train_tokens_per_s": gpt["tokens_per_s"],
        "train_images_per_s": gan["images_per_s"],
        "served_tokens_per_s": responses.tokens_per_s,
        "served_images_per_s": responses.images_per_s,
        "text": responses.text,
        "files": {
            "text": str(folder / "text.txt"),
            "images": str(folder / "images.png"),
            "curves": [str(folder / f"curves-{kind}.png") for kind in runs],
            "reports": [str(folder / "runs" / name / "report.md") for name in runs.values()],
            "page": None if page is None else str(page),
        },
        "runs": runs,
    }
    storage.write_json(folder / "summary.json", summary)
    return summary


def table(summary: Summary, folder: Path) -> Table:
    """Return the results for a terminal."""
    result = Table(title=f"The demo finished in {summary['seconds']:.0f} s", show_header=False)
    for stage, seconds in summary["stages_s"].items():
        result.add_row(stage, f"{seconds:.0f} s")
    result.add_section()
    bits, recall = summary["heldout_bits_per_byte"], summary["heldout_recall"]
    distance = summary["heldout_frechet_distance"]
    baseline = summary["heldout_frechet_distance_baseline"]
    result.add_row("held-out text", f"{bits:.2f} bits per byte (four plays it never saw)")
    result.add_row(
        "held-out images",
        f"Frechet distance {distance:.2f} ({baseline:.2f} real vs real), recall {recall:.2f}",
    )
    result.add_row(
        "training",
        f"{summary['train_tokens_per_s']:,.0f} tokens/s, "
        f"{summary['train_images_per_s']:,.0f} images/s",
    )
    result.add_row(
        "serving",
        f"{summary['served_tokens_per_s']:,.0f} tokens/s to one reader, "
        f"{summary['served_images_per_s']:,.0f} images/s",
    )
    result.add_section()
    files = summary["files"]
    serve_it = f"python -m serve up --storage {cli.typed(str(folder))}"
    result.add_row("text", cli.typed(files["text"]))
    result.add_row("images", cli.typed(files["images"]))
    result.add_row("curves", "  ".join(map(cli.typed, files["curves"])))
    result.add_row("page", cli.typed(files["page"]) if files["page"] else serve_it)
    result.add_row("all results", cli.typed(str(folder / "summary.json")))
    return result
