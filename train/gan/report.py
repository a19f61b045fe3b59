"""The GAN's own part of a run's report: alarms, the film of the run, samples, quality."""

import io

import numpy as np
import yaml
from PIL import Image

from cluster import storage
from train.data.dataset import Dataset
from train.data.images import meta_of
from train.gan import film
from train.gan.metrics import QUALITY, QUALITY_METRICS
from train.run import lineage, records
from train.run.tables import metrics_table, row

Samples = dict[str, dict[int, str]]  # name: {step: file}


def sections(run_uri: str, metrics: dict[str, float]) -> list[str]:
    """Return the lines of report.md, and write film.png into the run's folder.

    What a run lacks, as one of an older version may, is left out.
    """
    samples = _samples(run_uri)
    others = {name: value for name, value in metrics.items() if name not in QUALITY_METRICS}
    return [
        *_alarms(records.alarms(run_uri)),
        *_film(run_uri, samples),
        *_generated_and_real(samples),
        *_interpolation(samples),
        *_quality(run_uri, metrics),
        "## Curves and metrics",
        "",
        *metrics_table(others),
    ]


def _alarms(alarms: list[records.Alarm] | None) -> list[str]:
    if alarms is None:
        return []
    lines = [
        f"- step {alarm['step']:,}, **{alarm['kind']}**: {alarm['message']}" for alarm in alarms
    ]
    return ["## Alarms", "", *(lines or ["No alarms."]), ""]


def _samples(run_uri: str) -> Samples:
    """Return the run's sample images, e.g. {"images": {350: "images_000350.png"}}."""
    found: Samples = {}
    for name in storage.names(storage.join(run_uri, "samples")):
        if (sample := records.SAMPLE.fullmatch(name)) and sample["suffix"] == "png":
            found.setdefault(sample["name"], {})[int(sample["step"])] = name
    return found


def _film(run_uri: str, samples: Samples) -> list[str]:
    """Draw film.png."""
    frames, real = samples.get("images", {}), samples.get("real", {})
    if not frames:
        return []
    class_names = _class_names(run_uri)
    strip = film.film(
        [(step, _read_image(run_uri, frames[step])) for step in film.select_steps(list(frames))],
        class_names,
        _read_image(run_uri, real[max(real)]) if real else None,
    )
    storage.write_bytes(storage.join(run_uri, "film.png"), strip)
    if class_names is not None:
        what = "The same latent in every image, one class per column"
    else:
        what = "The same latents in every row"
    end = "; the last row is real." if real else "."
    return ["## The run as a film", "", what + end, "", "![film](film.png)", ""]


def _read_image(run_uri: str, name: str) -> np.ndarray:
    content = storage.read_bytes(storage.join(run_uri, "samples", name))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _class_names(run_uri: str) -> list[str] | None:
    """Return the names of a conditional generator's classes, [] where the data set is gone; None
    for an unconditional one."""
    uri = storage.join(run_uri, "run.yaml")
    if not storage.exists(uri):
        return None
    if not yaml.safe_load(storage.read_bytes(uri))["model"]["conditional"]:
        return None
    origin = lineage.read(run_uri)
    dataset = Dataset.find(origin["dataset"]["uri"]) if origin else None
    return meta_of(dataset)["classes"][: film.GRID_ROWS] if dataset else []


def _generated_and_real(samples: Samples) -> list[str]:
    """Show the latest generated images beside real ones."""
    if "images" not in samples:
        return []
    step = max(samples["images"])
    shown = {f"generated, step {step:,}": f"![generated]({_latest(samples, 'images')})"}
    if "real" in samples:
        shown["real"] = f"![real]({_latest(samples, 'real')})"
    rule = ["---"] * len(shown)
    return ["## Generated and real", "", row(*shown), row(*rule), row(*shown.values()), ""]


def _interpolation(samples: Samples) -> list[str]:
    """Show the latest interpolations between latents."""
    if "interpolation" not in samples:
        return []
    return [
        f"## Between latents, step {max(samples['interpolation']):,}",
        "",
        "Each row goes from one latent to the next along the great circle.",
        "",
        f"![interpolation]({_latest(samples, 'interpolation')})",
        "",
    ]


def _latest(samples: Samples, name: str) -> str:
    steps = samples[name]
    return f"samples/{steps[max(steps)]}"


def _quality(run_uri: str, metrics: dict[str, float]) -> list[str]:
    """Show each metric of image quality beside its baseline."""
    known = [name for name in QUALITY if name in metrics]
    if not known:
        return []
    count = f"{metrics['heldout_samples']:,.0f} " if "heldout_samples" in metrics else ""
    lines = [
        "## Quality",
        "",
        f"{count}generated images against as many held-out real ones. The baseline is what real "
        "training images score.",
        "",
        *_extractor(run_uri),
        row("metric", "value", "baseline", "better"),
        row("---", "---:", "---:", "---"),
    ]
    for metric in known:
        name, better = QUALITY[metric]
        value = f"{metrics[metric]:,.4g}"
        if (spread := metrics.get(f"{metric}_spread")) is not None:
            value += f" ± {spread:.2g}"
        baseline = metrics.get(f"{metric}_baseline")
        lines.append(row(name, value, "" if baseline is None else f"{baseline:,.4g}", better))
    return [*lines, ""]


def _extractor(run_uri: str) -> list[str]:
    """Say which extractor computed the features: metrics of different ones are not comparable."""
    origin = lineage.read(run_uri)
    if origin is None or "extractor" not in origin:
        return []
    extractor = origin["extractor"]
    accuracy = f"{extractor['accuracy']:.1%} of held-out images right"
    return [
        f"Features: from an extractor trained on {extractor['task']} ({accuracy}), sha256 "
        f"`{extractor['sha256']}`.",
        "",
    ]
