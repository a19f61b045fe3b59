"""Loss curves of one GPT under every strategy, number of workers and accumulation.

    python -m benchmarks.curves [--steps 100] [--image docs/assets/curves.png]

Each curve is a run of `python -m train gpt --config gpt-tiny` with the same seed and global batch,
so the curves should coincide. The second panel and the table show each curve's largest distance
from that of one worker; the table's first column is the loss at the last step.
"""

import itertools
import sys
import tempfile

from matplotlib.figure import Figure

from benchmarks.runs import parser, read_metrics, train
from cluster import cli

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
    """Train a run and return its loss at each step."""
    shared: Options = {
        "batch.global_size": 16,
        "batch.micro_size": 16,
        "model.width": 64,
        "optim.lr": 2e-3,
        "log.every": 1,
        "steps": steps,
    }
    shared |= {"log.eval_every": steps, "log.sample_every": steps, "checkpoint.every": steps}
    run = train("gpt", "gpt-tiny", storage, name, shared | options)
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def distances(curve: list[float], reference: list[float]) -> list[float]:
    """Return, for each step, the largest distance between the curves up to that step."""
    differences = (abs(a - b) for a, b in zip(curve, reference, strict=True))
    return list(itertools.accumulate(differences, max))


def plot(curves: dict[str, list[float]], path: str) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = next(iter(curves.values()))
    for name, curve in curves.items():
        steps = range(1, len(curve) + 1)
        left.plot(steps, curve, label=name, linewidth=1)
        if curve is not reference:
            # Zero has no place on a logarithmic axis.
            shown = [max(distance, 1e-9) for distance in distances(curve, reference)]
            right.plot(steps, shown, label=name, linewidth=1)
    left.set(xlabel="step", title="loss, nats per token")
    right.set(
        xlabel="step",
        title="largest distance from one worker's loss so far",
        yscale="log",
        ylim=(1e-9, 1e-2),
    )
    right.legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--image", default="docs/assets/curves.png", help="the file to write")
    arguments = options.parse_args(argv)
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as storage:
        for name, variant in VARIANTS.items():
            run = name.replace(" ", "-").replace(",", "")
            curves[name] = losses(storage, run, variant, arguments.steps)
            distance = distances(curves[name], next(iter(curves.values())))[-1]
            print(f"| {name} | {curves[name][-1]:.4f} | {distance:.1e} |", flush=True)
    plot(curves, arguments.image)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
