"""Norms, objectives and penalties of a GAN, compared in one run.

    python -m benchmarks.gan_variants [--steps 350] [--seeds 2] ['gan.objective=hinge' ...]

Each variant is the demo's GAN (gan-demo: Fashion-MNIST, 2 workers with one thread each) with the
keys given, as in 'gan.objective=hinge gan.penalty_weight=0', trained once per seed. Printed are
median and range over the seeds of the final held-out metrics and of images per second.
"""

import json
import sys
import tempfile

from benchmarks.runs import median_and_range, parser, train
from cluster import cli
from train.config import loader as configs

DEFAULT = ["", "model.norm=batch", "model.critic_norm=layer"] + [
    f"gan.objective={objective} gan.penalty_weight={weight}"
    for objective in ("lsgan", "hinge", "non-saturating")
    for weight in (0, 1, 10, 100)
]
METRICS = {"frechet_distance": 2, "recall": 2, "coverage": 2}  # with the digits to print


def values_of(variant: str) -> dict[str, str]:
    """Parse "a=1 b=2" into {"a": "1", "b": "2"}.

    Raises:
        ValueError: a key has no value.
    """
    pairs = [word.partition("=") for word in variant.split()]
    if invalid := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(
            f"variant {variant!r}: {invalid[0]!r} has no value: write key=value, and quote a "
            "variant of several keys"
        )
    return {key: value for key, _, value in pairs}


def final_metrics(variant: str, seed: int, steps: int, storage: str) -> dict[str, float]:
    """Train a variant and return its final metrics."""
    name = f"{variant.replace(' ', '-').replace('=', '-') or 'default'}-{seed}"
    options = {"steps": steps, "run.seed": seed, **values_of(variant)}
    options |= dict.fromkeys(("log.eval_every", "log.sample_every", "checkpoint.every"), steps)
    run = train("gan", "gan-demo", storage, name, options)
    metrics: dict[str, float] = json.loads((run / "summary.json").read_text())["metrics"]
    return metrics


def row(variant: str, seeds: list[dict[str, float]]) -> str:
    """Return a row of the table from a variant's metrics for each seed."""
    cells = [
        median_and_range([metrics[f"heldout_{name}"] for metrics in seeds], digits)
        for name, digits in METRICS.items()
    ]
    cells.append(median_and_range([metrics["images_per_s"] for metrics in seeds], 0))
    return f"| {variant or 'gan-demo unchanged'} | {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=350, help="generator steps")
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("variants", nargs="*", default=DEFAULT)
    arguments = options.parse_args(argv)
    for variant in arguments.variants:
        configs.load("gan", "gan-demo", values_of(variant))
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in arguments.variants}
    with tempfile.TemporaryDirectory() as storage:
        for seed in range(arguments.seeds):
            for variant, seeds in found.items():
                seeds.append(final_metrics(variant, seed, arguments.steps, storage))
                print(f"seed {seed} {row(variant, seeds[-1:])}", flush=True)
    print(f"| gan-demo, {arguments.steps} steps | {' | '.join(METRICS)} | images/s |")
    for variant, seeds in found.items():
        print(row(variant, seeds))
    baselines = [
        f"{seeds[0][f'heldout_{name}_baseline']:.{digits}f}" for name, digits in METRICS.items()
    ]
    print(f"| real images | {' | '.join(baselines)} | |")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
