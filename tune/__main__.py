"""python -m tune gpt | gan: search hyper-parameters over training runs, write the best config."""

import argparse
import contextlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import cli
from train.config import loader
from train.kinds import KINDS

if TYPE_CHECKING:
    from tune.plan import Plan
    from tune.results import Summary


def main(argv: list[str]) -> int:
    return program(argv).main(argv)


def program(argv: list[str]) -> cli.Program:
    """Return the commands, with the options of the keys of the kind that `argv` begins with."""
    tune = cli.Program(
        "tune",
        "Search hyper-parameters over training runs and write the best config.",
        epilog="To resume an interrupted search, start it again with its --name.",
    )
    for kind in KINDS:
        parser = _add_command(tune, kind)
        if argv[:1] == [kind]:
            keys = loader.KeyOptions(parser, kind)
            keys.check(argv[1:])
            parser.set_defaults(kind=kind, key_options=keys)
    return tune


def _add_command(program: cli.Program, kind: str) -> cli.Parser:
    parser = program.command(
        kind,
        _search,
        f"search the hyper-parameters of a {kind.upper()}",
        storage="where data, runs and searches are stored",
        prints_json=True,
    )
    parser.add_argument(
        "--config", metavar="NAME|FILE", help="a preset or YAML file that all trials start from"
    )
    parser.add_argument(
        "--space",
        metavar="NAME|FILE",
        default=kind,
        help=f"a shipped search space or a YAML file (default: {kind})",
    )
    parser.add_argument(
        "--num-samples",
        metavar="N",
        type=int,
        default=8,
        help="draws from the space, for each combination of its grids (default: 8)",
    )
    parser.add_argument(
        "--max-concurrent",
        metavar="N",
        type=int,
        help="trials at once (default: as many as the cluster's nodes hold)",
    )
    parser.add_argument(
        "--name", help="name of the search (default: made from the config's name and the time)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print the plan, start nothing"
    )
    return parser


def _search(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments)
    if arguments.dry_run:
        _print_plan(plan, arguments.json)
        return 0

    from tune import launch

    # With --json, stdout holds nothing but the result.
    stdout = sys.stderr if arguments.json else sys.stdout
    try:
        with contextlib.redirect_stdout(stdout):
            summary = launch.search(plan, cli.storage_of(arguments))
    except launch.SearchFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nto resume search {plan.name}, start it again with --name {plan.name}",
            file=sys.stderr,
        )
        raise
    if arguments.json:
        cli.print_json(asdict(summary))
    else:
        _print_summary(summary, plan.kind)
    return 0


def _plan(arguments: argparse.Namespace) -> "Plan":
    from tune import space
    from tune.plan import Plan

    kind = arguments.kind
    base, _ = loader.read(kind, arguments.config)
    stem = Path(arguments.config).stem if arguments.config else kind
    return Plan(
        kind,
        loader.merge(base, arguments.key_options.values(arguments)),
        space.read(arguments.space),
        arguments.num_samples,
        arguments.name or f"{stem}-search-{time.strftime('%Y%m%d-%H%M%S')}",
        arguments.max_concurrent,
    )


def _print_plan(plan: "Plan", as_json: bool) -> None:
    if as_json:
        cli.print_json(
            {
                "search": plan.name,
                "trials": plan.num_trials,
                "steps": plan.steps,
                "metric": plan.metric,
                "space": plan.record()["space"],
            }
        )
        return
    print(
        f"search {plan.name}: {plan.num_trials} trials of at most {plan.steps} steps, "
        f"minimizing {plan.metric}"
    )
    for key, distribution in plan.space.items():
        print(f"  {key}: {distribution.name} {list(distribution.values)}")


def _print_summary(summary: "Summary", kind: str) -> None:
    best = summary.best
    print(f"search {summary.search} is complete: {summary.trials} trials, {summary.failed} failed")
    values = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in best.values.items()
    )
    print(f"best: run {best.run}, {summary.metric} {best.score:.4f} at step {best.step}  {values}")
    print(f"curves: tensorboard --logdir {summary.uri}")
    print(f"train it: python -m train {kind} --config {summary.uri}/best.yaml")


if __name__ == "__main__":
    sys.exit(cli.run(main))
