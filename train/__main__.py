"""`python -m train gpt|gan [--config NAME|FILE] [--storage URI] [--dry-run] [--KEY VALUE ...]` and `python -m train verify-resume|export|extractor`."""

import argparse
import sys
from pathlib import Path

from cluster import cli, storage
from models import bundle
from train.config import sections as configs

USAGE = """usage: python -m train gpt|gan [--config NAME|FILE] [--storage URI] [--dry-run] [--debug] [--KEY VALUE ...]
       python -m train verify-resume gpt|gan [--steps N] [--kills LIST] [--config NAME|FILE] [--storage URI] [--KEY VALUE ...]
       python -m train export RUN [--name NAME] [--checkpoint newest|best|STEP] [--weights fp32|int8] [--storage URI]
       python -m train extractor [--config NAME|FILE] [--storage URI] [--KEY VALUE ...]

`python -m train gpt --help` lists the keys. Presets: {presets}"""


USAGE_OPTIONS = """options beside the config's keys below:
  --config NAME|FILE  a preset, or a YAML file with the same keys
  --storage URI       where data, runs and models go (KILN_STORAGE; default ./kiln)
  --dry-run           print the resolved config and the plan, start nothing
  --debug             show the traceback of an error
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help"}:
        print(
            USAGE.format(
                presets=", ".join(sorted(file.stem for file in configs.PRESETS.glob("*.yaml")))
            )
        )
        return 0 if argv else 2
    command, *rest = argv
    if command in configs.KINDS:
        return train(command, rest)
    if command == "verify-resume":
        from train.verify import verify

        return verify.command(rest)
    if command == "export":
        return export(rest)
    if command == "extractor":
        return extractor(rest)
    near = configs.nearest(command, [*configs.KINDS, "verify-resume", "export", "extractor"])
    raise ValueError(
        f"there is no command {command!r}{near}: use gpt, gan, verify-resume, export or extractor"
    )


def train(kind: str, argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        prog=f"python -m train {kind}", add_help=False, allow_abbrev=False
    )
    options.add_argument("--config")
    options.add_argument("--storage", default=cli.storage_default())
    options.add_argument("--dry-run", action="store_true")
    given, rest = options.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(USAGE_OPTIONS)
    config = configs.load(kind, given.config, configs.parse(kind, rest))
    if given.dry_run:
        print(configs.dump(config), end="")
        print(plan(config))
        return 0

    from train import launch
    from train.run import report

    print(plan(config))
    try:
        summary = launch.fit(
            config, given.storage, stem=Path(given.config).stem if given.config else kind
        )
    except launch.TrainingFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    figures = "  ".join(
        f"{name} {value:,.4g}"
        for name, value in summary["metrics"].items()
        if report.is_headline(name)
    )
    print(
        f"run {summary['run']} is complete: {summary['steps']} steps in {summary['seconds']:.0f} s  {figures}"
    )
    print(f"its report: {storage.join(given.storage, 'runs', summary['run'], 'report.md')}")
    print(f"export it: python -m train export {summary['run']}")
    return 0


def plan(config: configs.Config) -> str:
    """What will be done, in one paragraph: derived values included."""
    parallel = config.parallel
    device = "GPU" if parallel.gpu else "CPU"
    strategy = (
        f"DeepSpeed ZeRO {parallel.zero_stage}" if parallel.strategy == "deepspeed" else "DDP"
    )
    text = (
        f"plan: {config.steps} steps of {config.batch.global_size} samples on {parallel.workers} {device} worker(s) ({strategy}, {parallel.precision}), "
        f"micro-batches of {config.micro_size}, {config.accumulation} accumulated"
    )
    if isinstance(config, configs.GptConfig):
        tokens, size = config.tokens_per_step * config.steps, config.model
        parameters = (
            config.data.known_vocab_size + size.context
        ) * size.width + 12 * size.layers * size.width**2
        text += f"; {config.tokens_per_step:,} tokens a step, {tokens:,} in all"
        if size.pretrained is None:
            # 6 operations a parameter and token; a checkpoint holds each parameter and Adam's two moments in fp32.
            text += f"; about {parameters / 1e6:,.1f} M parameters, {6e-15 * parameters * tokens:,.3g} PFLOP, checkpoints of {parameters * 12 / 1e6:,.0f} MB"
    return text


def export(argv: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m train export", allow_abbrev=False)
    options.add_argument("run", help="the run's name")
    options.add_argument("--name", help="the model's name in the registry; by default gpt or gan")
    options.add_argument(
        "--checkpoint",
        default="newest",
        help="newest, best (on held-out data; see checkpoint.keep_best), or a step",
    )
    options.add_argument(
        "--weights",
        default="fp32",
        help="of a GPT's graph: fp32, or int8 (faster on a CPU; its cost is measured)",
    )
    options.add_argument("--storage", default=cli.storage_default())
    given = options.parse_args(argv)

    from train.export import export as export_run

    done = export_run(given.run, given.storage, given.name, given.checkpoint, given.weights)
    parity = done.manifest["parity"]
    print(
        f"exported {done.name}/{done.version}: {done.uri} (ONNX differs from torch by at most {parity['max_abs_diff']:.1e}, {parity['tolerance']:.0e} allowed)"
    )
    if done.manifest["quantization"]:
        print(f"its weights are {bundle.describe_weights(done.manifest)}")
    return 0


def extractor(argv: list[str]) -> int:
    """Trains or finds the extractor of a GAN config's data."""
    options = argparse.ArgumentParser(
        prog="python -m train extractor", add_help=False, allow_abbrev=False
    )
    options.add_argument("--config")
    options.add_argument("--storage", default=cli.storage_default())
    given, rest = options.parse_known_args(argv)
    config = configs.load("gan", given.config, configs.parse("gan", rest))
    assert isinstance(config, configs.GanConfig)

    from cluster.connect import connect
    from train import launch
    from train.data import images
    from train.gan import extractor as extractors

    launch.refuse_impossible(config, connect())
    extractors.prepare(config, images.prepare(config.data, given.storage, config.model.conditional))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
