"""The commands of `python -m models`: the registry's models and their aliases."""

import argparse
import sys

from rich.console import Console
from rich.table import Column, Table

from cluster import cli, storage
from models import bundle, registry


def main(argv: list[str]) -> int:
    return program().main(argv)


def program() -> cli.Program:
    models = cli.Program(
        "models", "List, inspect and verify the models of the registry.", epilog=cli.REFERENCE
    )
    models.command("list", list_models, "list every version of every model", prints_json=True)
    for name, function, text in (
        ("show", show, "show what a version is and where it comes from"),
        ("verify", verify, "check every file of a version against its hash"),
    ):
        models.command(name, function, text, prints_json=True, epilog=cli.REFERENCE).add_argument(
            "reference", metavar="REF"
        )
    command = models.command("alias", set_alias, "point an alias to a version")
    command.add_argument("name", metavar="NAME")
    command.add_argument("alias", metavar="ALIAS")
    command.add_argument("version", metavar="VERSION", type=int)
    return models


def list_models(arguments: argparse.Namespace) -> int:
    root = _root(arguments)
    models = registry.listing(root)
    if arguments.json:
        cli.print_json([_as_json(model) for model in models])
        return 0
    console = _console()
    if any(model.versions for model in models):
        console.print(_table(models))
    else:
        console.print(f"no models in {root} yet: export a run with `python -m train export RUN`")
    for model in models:
        for version in model.incomplete:
            console.print(f"{model.name}/{version} is damaged or incomplete, and is not served")
        for alias, target in model.aliases.items():
            if target is None:
                command = f"python -m models alias {model.name} {alias} VERSION"
                console.print(f"{model.name}@{alias} is damaged: set it again with `{command}`")
    return 0


def show(arguments: argparse.Namespace) -> int:
    root = _root(arguments)
    name, version, uri = registry.resolve(root, arguments.reference)
    manifest = bundle.read(uri)
    targets = registry.aliases(root, name)
    aliases = [alias for alias, target in targets.items() if target == version]
    if arguments.json:
        cli.print_json(
            {"name": name, "version": version, "aliases": aliases, "uri": uri, "manifest": manifest}
        )
        return 0
    run, dataset, parity = manifest["run"], manifest["dataset"], manifest["parity"]
    shape = {key: value for key, value in manifest["model"].items() if key != "class_names"}
    rows = {
        "model": f"{name}/{version} ({manifest['kind']})",
        "aliases": ", ".join(aliases) or "none",
        "uri": uri,
        "created": manifest["created"],
        "run": f"{run['name']}, step {run['step']}, in {run['storage']}",
        "commit": manifest["commit"] or "unknown",
        "data": f"{dataset['name']}, fingerprint {dataset['fingerprint']}",
        "metrics": ", ".join(_metrics(manifest)) or "none",
        "parity": f"at most {parity['max_abs_diff']:.2g} from torch "
        f"(allowed: {parity['tolerance']:.2g}) in {len(parity['cases'])} cases",
        "weights": bundle.describe_weights(manifest),
        "shape": ", ".join(f"{key} {value}" for key, value in shape.items()),
        "classes": ", ".join(manifest["model"].get("class_names", [])) or "none",
        "made with": ", ".join(f"{library} {v}" for library, v in manifest["libraries"].items()),
        "files": "\n".join(
            f"{path}  {entry['bytes']:,} bytes" for path, entry in manifest["files"].items()
        ),
    }
    table = Table.grid("", "", padding=(0, 2))
    for field, value in rows.items():
        table.add_row(field, value)
    _console().print(table)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    name, version, uri = registry.resolve(_root(arguments), arguments.reference)
    manifest = bundle.verify(uri)
    files, size = len(manifest["files"]), bundle.size(manifest)
    if arguments.json:
        cli.print_json({"name": name, "version": version, "files": files, "bytes": size})
    else:
        _console().print(f"{name}/{version}: {files} files, {size:,} bytes, all as published")
    return 0


def set_alias(arguments: argparse.Namespace) -> int:
    name, alias, version = arguments.name, arguments.alias, arguments.version
    registry.alias(_root(arguments), name, alias, version)
    _console().print(f"{name}@{alias} is now {name}/{version}")
    return 0


def _root(arguments: argparse.Namespace) -> str:
    return storage.join(cli.storage_of(arguments), "models")


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def _as_json(model: registry.Listed) -> dict[str, object]:
    return {
        "name": model.name,
        "versions": [
            {"version": version, "aliases": model.aliases_of(version), "manifest": manifest}
            for version, manifest in model.versions.items()
        ],
        "incomplete": model.incomplete,
        "aliases": model.aliases,
    }


def _table(models: list[registry.Listed]) -> Table:
    table = Table(
        "model", "kind", "aliases", "from run", Column("held-out", overflow="fold"), "MB", "created"
    )
    for model in models:
        for version, manifest in model.versions.items():
            kind, run, quantization = manifest["kind"], manifest["run"], manifest["quantization"]
            heldout = _metrics(manifest, bundle.HEADLINE_METRICS)
            table.add_row(
                f"{model.name}/{version}",
                f"{kind}, {quantization['weights']}" if quantization else kind,
                ", ".join(model.aliases_of(version)),
                f"{run['name']}, step {run['step']}",
                "\n".join(metric.removeprefix("heldout_") for metric in heldout),
                f"{bundle.size(manifest) / 1e6:.1f}",
                manifest["created"][:16].replace("T", " "),
            )
    return table


def _metrics(manifest: bundle.Manifest, wanted: tuple[str, ...] | None = None) -> list[str]:
    """Return "name value" of the manifest's metrics, or of those of them that are wanted."""
    return [
        f"{name} {value:.4g}"
        for name, value in manifest["metrics"].items()
        if wanted is None or name in wanted
    ]


if __name__ == "__main__":
    sys.exit(cli.run(main))
