"""From a run to a version in the registry: a checkpoint as a bundle, checked before it is published.

`python -m train export RUN [--name NAME] [--checkpoint newest|best|STEP] [--weights fp32|int8]`
"""

import difflib
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cluster.storage import absolute, exists, join, names, read_json, without_secrets
from models import bundle, registry
from models.nets import gpt
from models.nets.dcgan import Generator
from train.config import sections as config
from train.data import text
from train.data.dataset import fetch
from train.gan.export import export_gan
from train.gan.loop import shape
from train.gpt.export import WEIGHTS, export_gpt
from train.gpt.loop import build
from train.parallel.state import State
from train.run import checkpoint
from train.run.report import TIMES

LIBRARIES = ("torch", "onnx", "onnxruntime", "transformers")
HELDOUT_TOKENS = (
    8192  # what 8 bits cost is told to four digits by so many, both graphs being given the same
)


@dataclass(frozen=True)
class Exported:
    """A published version; `manifest` is its bundle's."""

    name: str
    version: int
    uri: str
    manifest: bundle.Manifest


def export(
    run: str, storage: str, name: str | None = None, which: str = "newest", weights: str = "fp32"
) -> Exported:
    """Publishes a complete checkpoint of a run.

    Args:
        run: the run's name below `<storage>/runs`.
        storage: a folder or URI.
        name: the model's name in the registry; by default "gpt" or "gan".
        which: "newest", "best" (of those judged on held-out data), or a step.
        weights: of a GPT's graph, "fp32" or "int8".

    Raises:
        ValueError: there is no such run, no complete checkpoint or no data set, the graph's answers are not the model's, or 8 bits
            cost too much; nothing is published.
    """
    if name is not None:
        registry.check_name("model name", name)
    saved = _choose(storage, run, which)
    settings = config.build(
        config.KINDS[saved.config["kind"]],
        _without_kind(saved.config),
        f"the checkpoint of run {run}",
    )
    if weights not in WEIGHTS:
        raise ValueError(f"--weights {weights}: use {' or '.join(WEIGHTS)}")
    if weights != "fp32" and settings.kind != "gpt":
        raise ValueError(
            f"--weights {weights} is for a GPT, and run {run!r} is a {settings.kind}: leave it out"
        )
    dataset, lineage = _dataset(storage, run)
    with tempfile.TemporaryDirectory(prefix="raykiln-export-") as scratch:
        files = Path(scratch)
        state = checkpoint.read(join(storage, "runs", run), saved)
        if isinstance(settings, config.GptConfig):
            made = _gpt_files(settings, state, dataset, files, weights)
        else:
            assert isinstance(settings, config.GanConfig)
            made = _gan_files(settings, state, dataset, files)
        bundle.write(files, _lineage(storage, run, saved.step, lineage) | made)
        root, name = join(storage, "models"), name or settings.kind
        version = registry.publish(root, name, files)
    uri = join(root, name, str(version))
    return Exported(name, version, uri, bundle.read(uri))


def _gpt_files(
    settings: config.GptConfig, state: State, dataset: str, folder: Path, weights: str
) -> dict[str, Any]:
    prepared = fetch(dataset)
    model = build(settings, read_json(prepared / "dataset.json"))
    gpt.restore(model, state["model_ema" if "model_ema" in state else "model"])
    heldout = _heldout(text.Tokens(prepared, "heldout", model.config.n_positions))
    return export_gpt(model, prepared / "tokenizer.json", heldout, folder, weights)


def _heldout(tokens: text.Tokens) -> np.ndarray:
    """About `HELDOUT_TOKENS` tokens: whole windows of the model's context, spread evenly over the held-out text."""
    stride = max(tokens.num_windows * tokens.context // HELDOUT_TOKENS, 1)
    return np.concatenate(
        [inputs[targets >= 0] for inputs, targets in tokens.every_window(0, stride)]
    )


def _gan_files(
    settings: config.GanConfig, state: State, dataset: str, folder: Path
) -> dict[str, Any]:
    facts = read_json(join(dataset, "dataset.json"))
    generator = Generator(shape(settings, facts))
    generator.load_state_dict(dict(state["generator_ema"]))
    return export_gan(generator, facts["classes"], folder)


# ---------------------------------------------------------------- what the run left


def _choose(storage: str, run: str, which: str) -> checkpoint.Manifest:
    known = names(join(storage, "runs"))
    if run not in known:
        close = difflib.get_close_matches(run, known, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"there are {', '.join(known)}"
            if known
            else "there is none; train one first"
        )
        raise ValueError(f"run {run!r} is not in {join(storage, 'runs')}: {hint}")
    found = checkpoint.complete(join(storage, "runs", run))
    if not found:
        raise ValueError(
            f"run {run!r} has no complete checkpoint yet: wait for its first one, or start it again so that it goes on"
        )
    if which == "newest":
        return found[0]
    if which == "best":
        best = checkpoint.best(found)
        if not best:
            raise ValueError(
                f"run {run!r} has no checkpoint that was judged on held-out data: train with --checkpoint.keep_best, or export the newest"
            )
        return best[0]
    for saved in found:
        if str(saved.step) == which:
            return saved
    raise ValueError(
        f"--checkpoint {which}: run {run!r} has newest, best, and steps {', '.join(str(saved.step) for saved in found)}"
    )


def _dataset(storage: str, run: str) -> tuple[str, dict[str, Any]]:
    """The URI of the run's data set, and the run's lineage.json."""
    place = join(storage, "runs", run, "lineage.json")
    if not exists(place):
        raise ValueError(
            f"run {run!r} has no lineage.json, so its data set is not known: start it again so that it goes on"
        )
    lineage = read_json(place)
    uri = join(storage, "data", f"{lineage['dataset']['name']}-{lineage['dataset']['fingerprint']}")
    if not exists(join(uri, "dataset.json")):
        raise ValueError(
            f"the data set of run {run!r} is not at {uri} any more: start the run again, which prepares it"
        )
    return uri, lineage


def _lineage(storage: str, run: str, step: int, lineage: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entries on where the bundle comes from."""
    place = join(storage, "runs", run, "summary.json")
    summary = read_json(place) if exists(place) else {}
    # The summary of a run that has since gone on, and not yet ended, judges other weights.
    judged = summary["metrics"] if summary.get("steps") == step else {}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": {"name": run, "step": step, "storage": without_secrets(absolute(storage))},
        "commit": lineage["commit"],
        "dataset": {key: lineage["dataset"][key] for key in ("name", "fingerprint")},
        "metrics": {tag: value for tag, value in judged.items() if tag not in TIMES},
        "libraries": {library: metadata.version(library) for library in LIBRARIES},
    }


def _without_kind(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "kind"}
