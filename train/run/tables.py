"""Tables of a report, as Markdown."""

from train.run.meter import TIMES


def row(*cells: str) -> str:
    """Return one row of a table."""
    return f"| {' | '.join(cells)} |"


def metrics_table(metrics: dict[str, float]) -> list[str]:
    """Return a table of metrics without times, the curves, and where the data of both are."""
    rows = [row(name, f"{value:,.4g}") for name, value in metrics.items() if name not in TIMES]
    sources = (
        "The config is in `run.yaml`, every measurement in `metrics.jsonl` and `tensorboard/`."
    )
    head = [row("metric", "value"), row("---", "---:")]
    return [*head, *rows, "", "![curves](curves.png)", "", sources, ""]
