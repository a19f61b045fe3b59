"""python -m tune gpt|gan: searches hyper-parameters over training runs and writes the best config."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from cluster import cli
from train.config import loader as configs
from train.kinds import KINDS

USAGE = """usage: python -m tune gpt|gan [--config NAME|FILE] [--space NAME|FILE] [--num-samples N] [--max-concurrent N]
                      [--name NAME] [--storage URI] [--dry-run] [--debug] [--KEY VALUE ...]

--KEY VALUE: the same for all trials, e.g. --steps 200; `python -m train gpt --help` lists the keys.
A search that was interrupted goes on when it is started again with its --name."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE)
        return 0 if argv else 2
    kind, *rest = argv
    if kind not in KINDS:
        raise ValueError(
            f"there is no kind of run {kind!r}{configs.nearest(kind, list(KINDS))}: use gpt or gan"
        )
    given, keys = _parser(kind).parse_known_args(rest)

    from tune import launch, space

    base, _ = configs.read(kind, given.config)
    base = configs.merge(base, configs.parse(kind, keys))
    stem = Path(given.config).stem if given.config else kind
    name = given.name or f"{stem}-search-{time.strftime('%Y%m%d-%H%M%S')}"
    plan = launch.Plan(
        kind, base, space.read(given.space), given.num_samples, name, given.max_concurrent
    )
    if given.dry_run:
        print(
            f"search {name}: {space.size(plan.space, plan.num_samples)} trials of at most {plan.steps} steps for the least {plan.metric}"
        )
        for key, distribution in plan.space.items():
            print(f"  {key}: {distribution.name} {list(distribution.values)}")
        return 0
    try:
        _report(launch.search(plan, given.storage), kind)
    except launch.SearchFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsearch {name} goes on when it is started again with --name {name}")
        raise
    return 0


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m tune {kind}", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config")
    parser.add_argument("--space", default=kind)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--max-concurrent", type=int)
    parser.add_argument("--name")
    parser.add_argument("--storage", default=cli.storage_default())
    parser.add_argument("--dry-run", action="store_true")
    return parser


def _report(summary: dict[str, Any], kind: str) -> None:
    best, metric = summary["best"], summary["metric"]
    print(
        f"search {summary['search']} is complete: {summary['trials']} trials, {summary['failed']} failed"
    )
    values = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in best["values"].items()
    )
    print(f"best: run {best['run']}, {metric} {best['score']:.4f} at step {best['step']}  {values}")
    print(f"curves: tensorboard --logdir {summary['uri']}")
    print(f"train it: python -m train {kind} --config {summary['uri']}/best.yaml")


if __name__ == "__main__":
    sys.exit(cli.run(main))
