"""A run on one page: `report.md` with its figures, where its time went, its curves as a picture and its latest sample."""

import io
import math
from datetime import UTC, datetime
from typing import Any

from models import storage
from train import metrics

# What is drawn, one panel a row of tags: the first that a run recorded decides whether there is a panel.
PANELS = {
    "gpt": [
        ("loss, nats a token", ["loss", "heldout_loss"]),
        ("held-out bits per byte", ["heldout_bits_per_byte"]),
        ("tokens per second", ["tokens_per_s"]),
        ("gradient norm", ["grad_norm"]),
        ("learning rate", ["lr"]),
    ],
    "gan": [
        ("losses", ["critic_loss", "generator_loss"]),
        ("Wasserstein estimate and penalty", ["wasserstein_distance", "gradient_penalty"]),
        ("held-out sliced Wasserstein", ["heldout_sliced_wasserstein", "heldout_sliced_wasserstein_floor"]),
        ("pictures per second", ["images_per_s"]),
    ],
}  # fmt: skip
COLUMNS = 3  # panels side by side

# Seconds that a loop's meter counted, and what they were spent on. In training's time it may wait for data.
TIMES = {
    "train_s": "training",
    "data_s": "of it waiting for data",
    "eval_s": "evaluation",
    "sample_s": "samples",
    "checkpoint_s": "blocked by checkpoints",
}


def write(uri: str, summary: dict[str, Any]) -> None:
    """Writes curves.png and report.md into the run's folder.

    Args:
        uri: the run's folder.
        summary: what `train.launch.fit` returns.
    """
    storage.write_bytes(storage.join(uri, "curves.png"), curves(metrics.read(uri), summary["kind"], summary["run"]))
    storage.write_bytes(storage.join(uri, "report.md"), _page(uri, summary).encode())


def curves(rows: list[dict[str, float]], kind: str, title: str) -> bytes:
    """The run's curves over its steps, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    panels = [(label, found) for label, tags in PANELS[kind] if (found := [tag for tag in tags if any(tag in row for row in rows)])]
    rows_of_panels = max(math.ceil(len(panels) / COLUMNS), 1)
    figure = Figure(figsize=(5 * min(max(len(panels), 1), COLUMNS), 3.4 * rows_of_panels), layout="constrained")
    figure.suptitle(title)
    for place, (label, tags) in enumerate(panels, 1):
        axes = figure.add_subplot(rows_of_panels, min(len(panels), COLUMNS), place)
        for tag in tags:
            points = [(row["step"], row[tag]) for row in rows if tag in row]
            axes.plot(*zip(*points, strict=True), label=tag, marker="." if len(points) < 20 else None, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        if len(tags) > 1:
            axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _page(uri: str, summary: dict[str, Any]) -> str:
    lines = [
        f"# Run {summary['run']}",
        "",
        f"{summary['steps']} steps on {summary['workers']} worker(s) in {summary['seconds']} s, data {summary['dataset']}.",
        "",
    ]
    if summary["resumed_from"]:
        lines += [f"Went on from step {summary['resumed_from']}; the seconds are those of this part.", ""]
    lines += _starts(metrics.starts(uri))
    if spent := [f"{summary['metrics'][tag]:,.1f} s {what}" for tag, what in TIMES.items() if tag in summary["metrics"]]:
        lines += [f"Time: {', '.join(spent)}.", ""]
    figures = {tag: value for tag, value in summary["metrics"].items() if tag not in TIMES}
    lines += ["| figure | value |", "| --- | ---: |", *(f"| {tag} | {value:,.4g} |" for tag, value in figures.items()), ""]
    lines += ["![curves](curves.png)", "", "The config is in `run.yaml`, every measurement in `metrics.jsonl` and `tensorboard/`.", ""]
    samples = storage.names(storage.join(uri, "samples"))
    if samples and samples[-1].endswith(".png"):
        lines += ["## Latest sample", "", f"![{samples[-1]}](samples/{samples[-1]})", ""]
    elif samples:
        text = storage.read_bytes(storage.join(uri, "samples", samples[-1])).decode()
        lines += ["## Latest sample", "", *(f"    {line}" for line in text.splitlines()), ""]
    return "\n".join(lines)


def _starts(starts: list[dict[str, float]]) -> list[str]:
    """How often the run was started again, and from where."""
    if len(starts) < 2:
        return []
    again = [
        f"- from step {start['step']:.0f} at {datetime.fromtimestamp(start['time'], UTC):%Y-%m-%d %H:%M:%S} UTC" for start in starts[1:]
    ]
    return [f"Resumed {len(again)} time(s):", "", *again, ""]
