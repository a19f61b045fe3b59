"""What the choices in a GAN's config come to: norms, objectives and penalties beside each other, in turn, in one run.

    python -m benchmarks.gan_variants [--steps 350] [--seeds 2] ['gan.objective=hinge gan.penalty_weight=0' ...]

Each variant is the demo's GAN (gan-demo: Fashion-MNIST, 2 workers of one thread) with the keys given, trained once for each seed.
The figures are of held-out quality at the end, median and range over the seeds, and images a second.
"""

import argparse
import json
import sys
import tempfile

from benchmarks.runs import spread, train
from cluster import cli
from train.config import loader as configs

DEFAULT = ["", "model.norm=batch", "model.critic_norm=layer"] + [
    f"gan.objective={objective} gan.penalty_weight={weight}"
    for objective in ("lsgan", "hinge", "non-saturating")
    for weight in (0, 1, 10, 100)
]
SHOWN = {
    "frechet_distance": 2,
    "recall": 2,
    "coverage": 2,
}  # of the figures of quality, with so many digits


def keys_of(variant: str) -> dict[str, str]:
    """ "a=1 b=2" as {"a": "1", "b": "2"}."""
    pairs = [word.partition("=") for word in variant.split()]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(
            f"variant {variant!r}: {wrong[0]!r} has no value: write key=value, several in one word of the command line"
        )
    return {key: value for key, _, value in pairs}


def trained(variant: str, seed: int, steps: int, storage: str) -> dict[str, float]:
    """The final metrics of one run."""
    name = f"{variant.replace(' ', '-').replace('=', '-') or 'default'}-{seed}"
    options = {"steps": steps, "run.seed": seed, **keys_of(variant)}
    options |= dict.fromkeys(("log.eval_every", "log.sample_every", "checkpoint.every"), steps)
    run = train("gan", "gan-demo", storage, name, options)
    return json.loads((run / "summary.json").read_text())["metrics"]


def row(variant: str, found: list[dict[str, float]]) -> str:
    cells = [
        spread([metrics[f"heldout_{name}"] for metrics in found], digits)
        for name, digits in SHOWN.items()
    ]
    return f"| {variant or 'as it is'} | {' | '.join(cells)} | {spread([metrics['images_per_s'] for metrics in found], 0)} |"


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=350, help="generator steps")
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("variants", nargs="*", default=DEFAULT)
    given = options.parse_args(argv)
    for variant in given.variants:
        configs.load("gan", "gan-demo", keys_of(variant))
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in given.variants}
    with tempfile.TemporaryDirectory() as storage:
        for seed in range(given.seeds):
            for variant, runs in found.items():
                runs.append(trained(variant, seed, given.steps, storage))
                print(f"seed {seed} {row(variant, runs[-1:])}", flush=True)
    print(f"| gan-demo, {given.steps} steps | {' | '.join(SHOWN)} | images/s |")
    for variant, runs in found.items():
        print(row(variant, runs))
    floors = [f"{runs[0][f'heldout_{name}_baseline']:.{digits}f}" for name, digits in SHOWN.items()]
    print(f"| real pictures | {' | '.join(floors)} | |")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
