"""Publish a checkpoint of a run as a version in the registry.

`python -m train export RUN [--name NAME] [--checkpoint newest|best|STEP] [--weights fp32|int8]`
"""

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.cli import nearest
from models import bundle, registry
from train.config import loader
from train.data.dataset import Dataset
from train.kinds import KINDS, Kind
from train.run import checkpoint, lineage, summary
from train.run.meter import TIMES

LIBRARIES = ("torch", "onnx", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Exported:
    """A published version; `manifest` is its bundle's."""

    name: str
    version: int
    uri: str
    manifest: bundle.Manifest


def export(
    run: str,
    root: str,
    name: str | None = None,
    which: str = "newest",
    weights: str = "fp32",
) -> Exported:
    """Publish a complete checkpoint of a run, after its graph was compared with torch.

    Args:
        run: the run's name below `<root>/runs`.
        root: the storage, a folder or URI.
        name: the model's name in the registry; by default the kind's.
        which: "newest", "best" (of those evaluated on held-out data), or a step.
        weights: the number format of the graph's weights, e.g. "fp32" or "int8".

    Raises:
        ValueError: the run, a complete checkpoint or the data set is missing, the graph's outputs
            differ from the model's, or 8-bit weights cost too much; nothing is published.
    """
    if name is not None:
        registry.check_name("model name", name)
    run_uri = storage.join(root, "runs", run)
    saved = _choose(root, run, which)
    kind = KINDS[saved.config["kind"]]
    values = {key: value for key, value in saved.config.items() if key != "kind"}
    config = loader.build(kind.config, values, f"the checkpoint of run {run}")
    _check_weights(kind, run, weights)
    origin = lineage.read(run_uri)
    if origin is None:
        raise ValueError(
            f"run {run!r} has no lineage.json, so its data set is unknown: start the run again, "
            "which resumes it"
        )
    dataset = _dataset(root, run, origin)
    with tempfile.TemporaryDirectory(prefix="raykiln-export-") as scratch:
        folder = Path(scratch)
        state = checkpoint.read(run_uri, saved)
        entries = kind.export(config, state, dataset, folder, weights)
        bundle.write(folder, {**_origin_entries(root, run, saved.step, origin), **entries})
        models, name = storage.join(root, "models"), name or kind.name
        version = registry.publish(models, name, folder)
    uri = storage.join(models, name, str(version))
    return Exported(name, version, uri, bundle.read(uri))


def _check_weights(kind: Kind[Any], run: str, weights: str) -> None:
    known = sorted({name for one in KINDS.values() for name in one.weights})
    if weights not in known:
        raise ValueError(f"--weights {weights} is unknown: use {' or '.join(known)}")
    if weights not in kind.weights:
        raise ValueError(
            f"--weights {weights} is unsupported for run {run!r}, which is a {kind.name}: use "
            f"{' or '.join(kind.weights)}"
        )


def _choose(root: str, run: str, which: str) -> checkpoint.Manifest:
    """Return the checkpoint that `which` names."""
    runs = storage.join(root, "runs")
    known = storage.names(runs)
    if run not in known:
        others = f"; there are {', '.join(known)}" if known else "; there is none: train one first"
        raise ValueError(f"run {run!r} is not in {runs}{nearest(run, known) or others}")
    found = checkpoint.complete(storage.join(runs, run))
    if not found:
        raise ValueError(
            f"run {run!r} has no complete checkpoint yet: wait for its first one, or start it "
            "again, which resumes it"
        )
    if which == "newest":
        return found[0]
    if which == "best":
        best = checkpoint.best(found)
        if not best:
            raise ValueError(
                f"run {run!r} has no checkpoint that was evaluated on held-out data: train with "
                "--checkpoint.keep_best, or export the newest"
            )
        return best[0]
    for saved in found:
        if str(saved.step) == which:
            return saved
    steps = ", ".join(str(saved.step) for saved in found)
    raise ValueError(
        f"--checkpoint {which} is unknown: run {run!r} has newest, best, and steps {steps}"
    )


def _dataset(root: str, run: str, origin: lineage.Lineage) -> Dataset:
    """Return the run's data set, which lies below `root` wherever that has been moved to."""
    name = f"{origin['dataset']['name']}-{origin['dataset']['fingerprint']}"
    uri = storage.join(root, "data", name)
    dataset = Dataset.find(uri)
    if dataset is None:
        raise ValueError(
            f"the data set of run {run!r} is no longer at {uri}: start the run again, which "
            "prepares it"
        )
    return dataset


def _origin_entries(
    root: str, run: str, step: int, origin: lineage.Lineage
) -> bundle.OriginEntries:
    """Return the manifest's entries on where the bundle comes from."""
    done = summary.read(storage.join(root, "runs", run))
    # A run that has been resumed since, and has not ended, was evaluated with other weights.
    metrics = done["metrics"] if done and done["steps"] == step else {}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": {
            "name": run,
            "step": step,
            "storage": storage.without_secrets(storage.absolute(root)),
        },
        "commit": origin["commit"],
        "dataset": {
            "name": origin["dataset"]["name"],
            "fingerprint": origin["dataset"]["fingerprint"],
        },
        "metrics": {name: value for name, value in metrics.items() if name not in TIMES},
        "libraries": {library: metadata.version(library) for library in LIBRARIES},
    }
