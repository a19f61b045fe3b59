"""What the benchmarks share: our training as a command, and figures with their range."""

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def train(kind: str, preset: str, storage: str | Path, name: str, options: dict[str, Any]) -> Path:
    """Trains the run `name` to its end on a cluster of its own; its folder.

    Args:
        options: values of the config by dotted key.
    """
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [
        sys.executable,
        "-m",
        "train",
        kind,
        "--config",
        preset,
        "--storage",
        str(storage),
        "--run.name",
        name,
        *words,
    ]
    # Without RAY_ADDRESS: a cluster of its own.
    subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    return Path(storage) / "runs" / name


def spread(values: list[float], digits: int) -> str:
    """The median, and from where to where if there are several."""
    middle = f"{statistics.median(values):,.{digits}f}"
    return (
        middle
        if len(values) == 1
        else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
    )
