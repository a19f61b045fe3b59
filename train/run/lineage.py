"""Where a run comes from: its data set, its commit, and what evaluates it (lineage.json)."""

import shutil
import subprocess
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from cluster import storage
from train.data.dataset import Dataset, ExtractorEntry
from train.run.folder import Run


class DatasetEntry(TypedDict):
    """What lineage.json says about the data set."""

    name: str
    fingerprint: str
    uri: str


class Lineage(TypedDict):
    """The content of lineage.json."""

    dataset: DatasetEntry
    commit: str | None
    extractor: NotRequired[ExtractorEntry]


def uri_of(run_uri: str) -> str:
    """Return the URI of a run's lineage."""
    return storage.join(run_uri, "lineage.json")


def read(run_uri: str) -> Lineage | None:
    """Return a run's lineage, or None where it has none yet."""
    uri = uri_of(run_uri)
    return cast(Lineage, storage.read_json(uri)) if storage.exists(uri) else None


def check_dataset(run: Run, dataset: Dataset) -> Lineage:
    """Return the run's lineage; a new one where the run starts.

    Raises:
        ValueError: the run resumes, and its data differ from those that it was started with.
    """
    lineage = read(run.uri) if run.start else None
    if lineage is None:
        return {
            "dataset": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "uri": dataset.uri,
            },
            "commit": _commit(),
        }
    before = lineage["dataset"]["fingerprint"]
    if before != dataset.fingerprint:
        raise ValueError(
            f"run {run.name} was started with data {before}, and data.source now gives "
            f"{dataset.fingerprint}: its files, or how they are prepared, have changed; restore "
            "them, or use another --run.name"
        )
    return lineage


def check_extractor(run: Run, lineage: Lineage, extractor: ExtractorEntry) -> Lineage:
    """Return the lineage with the extractor that evaluates the run's images.

    Args:
        run: the run.
        lineage: its lineage so far.
        extractor: the one that evaluates it now.

    Raises:
        ValueError: the run was evaluated by another extractor.
    """
    before = lineage.get("extractor")
    if before is not None and before["sha256"] != extractor["sha256"]:
        raise ValueError(
            f"run {run.name} was evaluated with {before['uri']}, and now there is "
            f"{extractor['uri']}, whose metrics are not comparable: restore that file, or use "
            "another --run.name"
        )
    return {**lineage, "extractor": extractor}


def write(run: Run, lineage: Lineage) -> None:
    """Write the run's lineage."""
    storage.write_json(uri_of(run.uri), lineage)


def _commit() -> str | None:
    """Return the checkout's commit; None outside of a checkout, as in a submitted job's copy."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run(
        [git, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return done.stdout.strip() or None
