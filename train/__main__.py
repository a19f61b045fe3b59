"""The command line `python -m train gpt | gan | verify-resume | export | extractor`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import cli, storage
from train.config import loader
from train.config.sections import Config
from train.kinds import KINDS
from train.verify import options as verify_options

if TYPE_CHECKING:
    from train.run.summary import Summary

DESCRIPTION = "Train models on a Ray cluster, verify their resume, and export them."
KEYS_FOLLOW = (
    "Keys of the config may follow as --KEY VALUE; `python -m train {} --help` lists them."
)


def main(argv: list[str]) -> int:
    """Run the command line."""
    return program(argv).main(argv)


def program(argv: list[str]) -> cli.Program:
    """Return the commands, with the options of the keys of the kind that `argv` begins with."""
    train = cli.Program("train", DESCRIPTION, epilog=_presets())
    for kind in KINDS.values():
        parser = train.command(
            kind.name,
            _train,
            f"train a {kind.name.upper()}, or resume its run",
            prints_json=True,
            epilog=f"A list is given as A,B. {_presets(kind.name)}",
        )
        _add_config(parser)
        parser.add_argument(
            "--dry-run", action="store_true", help="print the resolved config and the plan only"
        )
        if argv[:1] == [kind.name]:
            key_options = loader.KeyOptions(parser, kind.name)
            key_options.check(argv[1:])
            parser.set_defaults(kind=kind.name, key_options=key_options)
    parser = train.command(
        "verify-resume",
        _verify_resume,
        "verify on your own config that a run which is killed and resumed equals an uninterrupted "
        "one",
        prints_json=True,
        takes_keys=True,
        epilog=KEYS_FOLLOW.format("|".join(KINDS)),
    )
    verify_options.add_options(parser)
    _add_export(train.command("export", _export, "publish a run's model", prints_json=True))
    parser = train.command(
        "extractor",
        _extractor,
        "train the feature extractor that evaluates a GAN's images",
        takes_keys=True,
        epilog=KEYS_FOLLOW.format("gan"),
    )
    _add_config(parser)
    return train


def _presets(kind: str = "*") -> str:
    files = loader.PRESETS.glob(f"{kind}-*.yaml")
    return f"Presets: {', '.join(sorted(file.stem for file in files))}."


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="NAME|FILE", help="a preset, or a YAML file with the same keys"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    parser.add_argument("--name", help="the model's name in the registry (default: the kind's)")
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="newest|best|STEP",
        help="which checkpoint to publish; best: on held-out data, of those that "
        "checkpoint.keep_best kept (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        default="fp32",
        metavar="FORMAT",
        help="number format of the weights: fp32; or int8 (GPT only), faster on a CPU, whose loss "
        "on held-out data is measured (default: %(default)s)",
    )


def _train(arguments: argparse.Namespace) -> int:
    config = loader.load(arguments.kind, arguments.config, arguments.key_options.values(arguments))
    if arguments.dry_run:
        if arguments.json:
            cli.print_json({"kind": config.kind, **config.model_dump()})
        else:
            print(config.to_yaml(), end="")
            print(plan(config))
        return 0

    from train import launch

    if not arguments.json:
        print(plan(config))
    root = cli.storage_of(arguments)
    stem = Path(arguments.config).stem if arguments.config else arguments.kind
    try:
        summary = launch.fit(config, root, stem=stem, quiet=arguments.json)
    except launch.TrainingFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if arguments.json:
        cli.print_json(summary)
    else:
        _print_summary(summary, root)
    return 0


def _print_summary(summary: "Summary", root: str) -> None:
    kind = KINDS[summary["kind"]]
    metrics = "  ".join(
        f"{name} {value:,.4g}"
        for name, value in summary["metrics"].items()
        if kind.is_headline(name)
    )
    run, steps, seconds = summary["run"], summary["steps"], summary["seconds"]
    print(f"run {run} is complete: {steps} steps in {seconds:.0f} s  {metrics}")
    print(f"report: {storage.join(root, 'runs', run, 'report.md')}")
    print(f"export: python -m train export {run}")


def plan(config: Config) -> str:
    """Return what the run will do, derived values included, as one line."""
    parallel = config.parallel
    device = "GPU" if parallel.gpu else "CPU"
    zero = f"DeepSpeed ZeRO {parallel.zero_stage}"
    strategy = zero if parallel.strategy == "deepspeed" else "DDP"
    text = (
        f"plan: {config.steps} steps of {config.batch.global_size} samples on {parallel.workers} "
        f"{device} worker(s) ({strategy}, {parallel.precision}), in micro-batches of "
        f"{config.micro_size}, {config.accumulation} per step and worker"
    )
    own = KINDS[config.kind].plan(config)
    return f"{text}; {own}" if own else text


def _verify_resume(arguments: argparse.Namespace) -> int:
    from train.verify import command

    return command.run(arguments, arguments.keys)


def _export(arguments: argparse.Namespace) -> int:
    from train.export import export

    done = export(
        arguments.run,
        cli.storage_of(arguments),
        arguments.name,
        arguments.checkpoint,
        arguments.weights,
    )
    if arguments.json:
        cli.print_json({"name": done.name, "version": done.version, "uri": done.uri})
        return 0
    from models import bundle

    parity = done.manifest["parity"]
    print(
        f"exported {done.name}/{done.version}: {done.uri} (ONNX differs from torch by at most "
        f"{parity['max_abs_diff']:.1e}, {parity['tolerance']:.0e} allowed)"
    )
    if done.manifest["quantization"]:
        print(f"weights: {bundle.describe_weights(done.manifest)}")
    return 0


def _extractor(arguments: argparse.Namespace) -> int:
    """Find the extractor of a config's data set; train it where there is none."""
    overrides = loader.parse("gan", arguments.keys)
    config = loader.load("gan", arguments.config, overrides)

    from cluster.connect import connect
    from train import launch

    kind = KINDS["gan"]
    launch.check_resources(config, connect())
    dataset = kind.prepare(config, cli.storage_of(arguments))
    kind.prepare_evaluation(config, dataset, cli.log)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
