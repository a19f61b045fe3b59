"""The same model whoever trains it: curves of every strategy, number of workers and accumulation, laid over one another.

    python -m benchmarks.curves [--steps 100] [--picture docs/assets/curves.png]

Each is a run of `python -m train gpt --config gpt-tiny` with the same seed and global batch. The second panel is each curve's
largest distance so far from that of one worker, and the table where it ended.
"""

import argparse
import itertools
import json
import tempfile

from matplotlib.figure import Figure

from benchmarks.runs import train

Options = dict[str, object]
TWO: Options = {"parallel.workers": 2}
ZERO: dict[str, Options] = {
    f"ZeRO {stage}": {**TWO, "parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
    for stage in range(4)
}
FOUR: Options = {"parallel.workers": 4, "parallel.cpus_per_worker": 0.5}
VARIANTS: dict[str, Options] = {
    "1 worker": {},
    "1 worker, 4 accumulated": {"batch.micro_size": 4},
    "2 workers, DDP": TWO,
    "2 workers, DDP, 4 accumulated": {**TWO, "batch.micro_size": 2},
    **{f"2 workers, {name}": options for name, options in ZERO.items()},
    "2 workers, ZeRO 2, 4 accumulated": {**ZERO["ZeRO 2"], "batch.micro_size": 2},
    "4 workers, DDP": FOUR,
    "4 workers, ZeRO 3": {**ZERO["ZeRO 3"], **FOUR},
}


def losses(storage: str, name: str, options: Options, steps: int) -> list[float]:
    shape: Options = {
        "batch.global_size": 16,
        "batch.micro_size": 16,
        "model.width": 64,
        "optim.lr": 2e-3,
        "log.every": 1,
        "steps": steps,
    }
    shape |= {"log.eval_every": steps, "log.sample_every": steps, "checkpoint.every": steps}
    run = train("gpt", "gpt-tiny", storage, name, shape | options)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def draw(curves: dict[str, list[float]], path: str) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = next(iter(curves.values()))
    for name, curve in curves.items():
        steps = range(1, len(curve) + 1)
        left.plot(steps, curve, label=name, linewidth=1)
        if curve is not reference:
            furthest = itertools.accumulate(
                (abs(a - b) for a, b in zip(curve, reference, strict=True)), max
            )
            right.plot(
                steps, [max(distance, 1e-9) for distance in furthest], label=name, linewidth=1
            )
    left.set(xlabel="step", title="loss, nats a token")
    right.set(
        xlabel="step",
        title="largest distance from one worker's loss so far",
        yscale="log",
        ylim=(1e-9, 1e-2),
    )
    right.legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--picture", default="docs/assets/curves.png")
    given = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as storage:
        for name, options in VARIANTS.items():
            curves[name] = losses(
                storage, name.replace(" ", "-").replace(",", ""), options, given.steps
            )
            furthest = max(
                abs(a - b) for a, b in zip(curves[name], next(iter(curves.values())), strict=True)
            )
            print(f"| {name} | {curves[name][-1]:.4f} | {furthest:.1e} |", flush=True)
    draw(curves, given.picture)


if __name__ == "__main__":
    main()
