"""What is in the registry, and what its aliases point to.

python -m models list | show REF | verify REF | alias NAME ALIAS VERSION   [--storage URI]
"""

import argparse
import sys

from rich.console import Console
from rich.table import Column, Table

from cluster import cli, storage
from models import bundle, registry


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    root = storage.join(arguments.storage, "models")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if arguments.action == "list":
        list_models(root, console)
    elif arguments.action == "show":
        show(root, arguments.reference, console)
    elif arguments.action == "verify":
        verify(root, arguments.reference, console)
    else:
        registry.alias(root, arguments.name, arguments.alias, arguments.version)
        console.print(
            f"{arguments.name}@{arguments.alias} is now {arguments.name}/{arguments.version}"
        )


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--storage",
        default=cli.storage_default(),
        metavar="URI",
        help="where models/ lies (KILN_STORAGE; default ./kiln)",
    )
    parser = argparse.ArgumentParser(
        prog="python -m models", description="The registry of models.", epilog=cli.REFERENCE
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", parents=[common], help="every version of every model")
    for action, text in (
        ("show", "what a version is, and where it comes from"),
        ("verify", "check every file of a version against its hash"),
    ):
        actions.add_parser(action, parents=[common], help=text, epilog=cli.REFERENCE).add_argument(
            "reference", metavar="REF"
        )
    alias = actions.add_parser("alias", parents=[common], help="point an alias to a version")
    alias.add_argument("name", metavar="NAME")
    alias.add_argument("alias", metavar="ALIAS")
    alias.add_argument("version", metavar="VERSION", type=int)
    return parser


def list_models(root: str, console: Console) -> None:
    models = registry.listing(root)
    if any(model.versions for model in models):
        console.print(_table(models))
    else:
        console.print(f"no models in {root} yet: export a run with `python -m train export RUN`")
    for model in models:
        for version in model.unfinished:
            console.print(f"{model.name}/{version} is damaged or not finished, and is not served")
        for alias, target in model.aliases.items():
            if target is None:
                console.print(
                    f"{model.name}@{alias} is damaged: set it again with `python -m models alias {model.name} {alias} VERSION`"
                )


def _table(models: list[registry.Listed]) -> Table:
    table = Table(
        "model", "kind", "aliases", "from run", Column("held-out", overflow="fold"), "MB", "created"
    )
    for model in models:
        for version, manifest in model.versions.items():
            table.add_row(
                f"{model.name}/{version}",
                f"{manifest['kind']}, {manifest['quantization']['weights']}"
                if manifest["quantization"]
                else manifest["kind"],
                ", ".join(model.aliases_of(version)),
                f"{manifest['run']['name']}, step {manifest['run']['step']}",
                _metrics(manifest, "\n", bundle.HEADLINES),
                f"{bundle.size(manifest) / 1e6:.1f}",
                manifest["created"][:16].replace("T", " "),
            )
    return table


def show(root: str, reference: str, console: Console) -> None:
    name, version, uri = registry.resolve(root, reference)
    manifest = bundle.read(uri)
    run, dataset, parity = manifest["run"], manifest["dataset"], manifest["parity"]
    table = Table.grid("", "", padding=(0, 2))
    for field, value in {
        "model": f"{name}/{version} ({manifest['kind']})",
        "aliases": ", ".join(
            alias for alias, target in registry.aliases(root, name).items() if target == version
        )
        or "none",
        "where": uri,
        "created": manifest["created"],
        "run": f"{run['name']}, step {run['step']}, in {run['storage']}",
        "commit": manifest["commit"] or "unknown",
        "data": f"{dataset['name']}, fingerprint {dataset['fingerprint']}",
        "metrics": _metrics(manifest, ", ") or "none",
        "parity": f"{parity['max_abs_diff']:.2g} at most from torch (allowed {parity['tolerance']:.2g}) in {len(parity['cases'])} cases",
        "weights": bundle.describe_weights(manifest),
        "shape": ", ".join(
            f"{key} {value}" for key, value in manifest["model"].items() if key != "class_names"
        ),
        "classes": ", ".join(manifest["model"].get("class_names", [])) or "none",
        "made with": ", ".join(
            f"{library} {number}" for library, number in manifest["libraries"].items()
        ),
        "files": "\n".join(
            f"{path}  {entry['bytes']:,} bytes" for path, entry in manifest["files"].items()
        ),
    }.items():
        table.add_row(field, value)
    console.print(table)


def verify(root: str, reference: str, console: Console) -> None:
    name, version, uri = registry.resolve(root, reference)
    manifest = bundle.verify(uri)
    console.print(
        f"{name}/{version}: {len(manifest['files'])} files, {bundle.size(manifest):,} bytes, all as published"
    )


def _metrics(
    manifest: bundle.Manifest, separator: str, wanted: tuple[str, ...] | None = None
) -> str:
    metrics = {
        name: value
        for name, value in manifest["metrics"].items()
        if wanted is None or name in wanted
    }
    return separator.join(
        f"{name.removeprefix('heldout_') if wanted else name} {value:.4g}"
        for name, value in metrics.items()
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
