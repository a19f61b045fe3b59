"""The same model whoever trains it: curves of every strategy, number of workers and accumulation, laid over one another.

    python benchmarks/curves.py [--steps 100] [--picture docs/curves.png]

Each is a run of `python -m train gpt --config gpt-tiny` with the same seed and global batch. The second panel is each curve's
largest distance so far from that of one worker, and the table where it ended.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
ZERO = {
    f"ZeRO {stage}": ["--parallel.workers", "2", "--parallel.strategy", "deepspeed", "--parallel.zero_stage", str(stage)]
    for stage in range(4)
}
FOUR = ["--parallel.workers", "4", "--parallel.cpus_per_worker", "0.5"]
VARIANTS = {
    "1 worker": [],
    "1 worker, 4 accumulated": ["--batch.micro_size", "4"],
    "2 workers, DDP": ["--parallel.workers", "2"],
    "2 workers, DDP, 4 accumulated": ["--parallel.workers", "2", "--batch.micro_size", "2"],
    **{f"2 workers, {name}": words for name, words in ZERO.items()},
    "2 workers, ZeRO 2, 4 accumulated": [*ZERO["ZeRO 2"], "--batch.micro_size", "2"],
    "4 workers, DDP": FOUR,
    "4 workers, ZeRO 3": [*ZERO["ZeRO 3"], *FOUR],
}


def losses(storage: str, name: str, words: list[str], steps: int) -> list[float]:
    shape = {"batch.global_size": 16, "batch.micro_size": 16, "model.width": 64, "optim.lr": 2e-3, "log.every": 1, "steps": steps}
    shape |= {"log.eval_every": steps, "log.sample_every": steps, "checkpoint.every": steps}
    command = [sys.executable, "-m", "train", "gpt", "--config", "gpt-tiny", "--storage", storage, "--run.name", name]
    command += [word for key, value in shape.items() if f"--{key}" not in words for word in (f"--{key}", str(value))]
    subprocess.run([*command, *words], cwd=ROOT, check=True, capture_output=True, env={**os.environ, "RAY_ADDRESS": ""})
    rows = [json.loads(line) for line in Path(storage, "runs", name, "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def draw(curves: dict[str, list[float]], path: str) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = next(iter(curves.values()))
    for name, curve in curves.items():
        steps = range(1, len(curve) + 1)
        left.plot(steps, curve, label=name, linewidth=1)
        if curve is not reference:
            furthest = itertools.accumulate((abs(a - b) for a, b in zip(curve, reference, strict=True)), max)
            right.plot(steps, [max(distance, 1e-9) for distance in furthest], label=name, linewidth=1)
    left.set(xlabel="step", title="loss, nats a token")
    right.set(xlabel="step", title="largest distance from one worker's loss so far", yscale="log", ylim=(1e-9, 1e-2))
    right.legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--picture", default="docs/curves.png")
    given = options.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as storage:
        for name, words in VARIANTS.items():
            curves[name] = losses(storage, name.replace(" ", "-").replace(",", ""), words, given.steps)
            furthest = max(abs(a - b) for a, b in zip(curves[name], next(iter(curves.values())), strict=True))
            print(f"| {name} | {curves[name][-1]:.4f} | {furthest:.1e} |", flush=True)
    draw(curves, given.picture)


if __name__ == "__main__":
    main()
