"""Read what a run recorded: metrics, starts and alarms, one JSON object per line."""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

from cluster import storage

# A file in the run's samples/.
SAMPLE = re.compile(r"(?P<name>.+)_(?P<step>\d+)\.(?P<suffix>png|txt)")
METRICS, STARTS, ALARMS = "metrics.jsonl", "starts.jsonl", "alarms.jsonl"

Row = dict[str, float]


class Alarm(TypedDict):
    """A line of alarms.jsonl."""

    step: int
    kind: str
    message: str


def metrics(run_uri: str) -> list[Row]:
    """Return the rows of metrics.jsonl: {"step", "time" (Unix, seconds), metric: value, ...}."""
    return cast(list[Row], _read(storage.join(run_uri, METRICS)))


def starts(run_uri: str) -> list[Row]:
    """Return when the run was started and from which step, {"time" (Unix, seconds), "step"}.

    The first row is the run's beginning.
    """
    uri = storage.join(run_uri, STARTS)
    return cast(list[Row], _read(uri)) if storage.exists(uri) else []


def alarms(run_uri: str) -> list[Alarm] | None:
    """Return the run's alarms; None where the file is missing, as in runs of an older version."""
    uri = storage.join(run_uri, ALARMS)
    return cast(list[Alarm], _read(uri)) if storage.exists(uri) else None


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as JSON lines to a local file, atomically."""
    storage.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _read(uri: str) -> list[object]:
    rows: list[object] = []
    for line in storage.read_bytes(uri).decode().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed process was writing this line
            rows.append(json.loads(line))
    return rows
