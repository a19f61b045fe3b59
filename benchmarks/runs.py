"""Shared by the benchmarks: their options, training runs, and a median with its range."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import cli

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str | None) -> cli.Parser:
    """Return a benchmark's parser; its description is printed as it is wrapped."""
    return cli.Parser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def train(
    kind: str, preset: str, storage: str | Path, name: str, options: Mapping[str, object]
) -> Path:
    """Train a run to its end on a private cluster and return its folder.

    Args:
        kind: gpt or gan.
        preset: the config to start from.
        storage: the folder that holds data and runs.
        name: the run's.
        options: config values by dotted key.
    """
    command = [sys.executable, "-m", "train", kind, "--config", preset]
    command += ["--storage", str(storage), "--run.name", name]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    # Without RAY_ADDRESS the command starts a private cluster.
    environment = {**os.environ, "RAY_ADDRESS": ""}
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, env=environment)
    return Path(storage) / "runs" / name


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl in a run's folder."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def median_and_range(values: Sequence[float], digits: int) -> str:
    """Return `MEDIAN (SMALLEST to LARGEST)`, or the value alone where there is one."""
    median = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
