"""A run's summary.json: what a run that has ended says about itself."""

from typing import NotRequired, TypedDict, cast

from cluster import storage

FILE = "summary.json"


class Summary(TypedDict):
    """The content of summary.json."""

    run: str
    kind: str
    steps: int
    workers: int
    seconds: float
    """Of the last command."""
    dataset: str
    resumed_from: int
    metrics: dict[str, float]
    failed: NotRequired[str]
    """Why the run did not reach its steps; such a summary is in report.md only."""


def read(run_uri: str) -> Summary | None:
    """Return the summary of a run, or None where it has not completed its steps yet."""
    uri = storage.join(run_uri, FILE)
    return cast(Summary, storage.read_json(uri)) if storage.exists(uri) else None


def write(run_uri: str, summary: Summary) -> None:
    """Write the summary of a complete run."""
    storage.write_json(storage.join(run_uri, FILE), summary)
