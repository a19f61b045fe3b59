"""A run on one page: `report.md` with its figures, where its time went, its curves and what it makes.

A GAN's page shows its training as a film, generated pictures beside real ones, how good they are beside the floor that
real ones have, and its alarms. Whatever a run lacks, an older version's for one, is left out.
"""

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml
from PIL import Image

from cluster import storage
from train.gan import pictures
from train.run import recorder as metrics
from train.run.wandb_mirror import SAMPLE

# What is drawn, one panel a row of tags: a panel is there where a run recorded one of them. Floors come along, dashed.
PANELS = {
    "gpt": [
        ("loss, nats a token", ["loss", "heldout_loss"]),
        ("held-out bits per byte", ["heldout_bits_per_byte"]),
        ("tokens per second", ["tokens_per_s"]),
        ("gradient norm", ["grad_norm"]),
        ("learning rate", ["lr"]),
    ],
    "gan": [
        ("losses", ["critic_loss", "generator_loss"]),
        ("Wasserstein estimate", ["wasserstein_distance"]),
        ("gradient penalty", ["gradient_penalty"]),
        ("the critic's mean scores", ["real_score", "fake_score"]),
        ("held-out FID", ["heldout_fid"]),
        ("held-out Frechet distance", ["heldout_frechet_distance"]),
        ("held-out KID and its spread", ["heldout_kid"]),
        ("held-out precision and recall", ["heldout_precision", "heldout_recall"]),
        ("held-out density and coverage", ["heldout_density", "heldout_coverage"]),
        ("modes", ["heldout_modes"]),
        ("KL of the modes' shares, nats", ["heldout_mode_kl"]),
        ("held-out sliced Wasserstein", ["heldout_sliced_wasserstein"]),
        ("pictures per second", ["images_per_s"]),
    ],
}  # fmt: skip
COLUMNS = 3  # panels side by side
LOGARITHMIC = {
    "heldout_fid",
    "heldout_frechet_distance",
}  # from first blots to the floor they fall a thousandfold
WILD = 50.0  # a peak of so many times the median would leave nothing to see of the rest on a linear scale
# Colour and width: those of one step lie upon each other, the narrower above.
ALARMS = {
    "collapse": ("tab:red", 4.0),
    "divergence": ("tab:purple", 2.5),
    "critic has won": ("tab:brown", 1.5),
    "critic has given up": ("tab:pink", 1.5),
}

# Seconds that a loop's meter counted, and what they were spent on. In training's time it may wait for data.
TIMES = {
    "train_s": "training",
    "data_s": "of it waiting for data",
    "eval_s": "evaluation",
    "sample_s": "samples",
    "checkpoint_s": "blocked by checkpoints",
}

# How good generated pictures are: the figure's name, and which way is better.
QUALITY = {
    "heldout_fid": ("FID", "lower"),
    "heldout_frechet_distance": ("Frechet distance", "lower"),
    "heldout_kid": ("KID", "lower"),
    "heldout_precision": ("precision", "higher"),
    "heldout_recall": ("recall", "higher"),
    "heldout_density": ("density", "higher"),
    "heldout_coverage": ("coverage", "higher"),
    "heldout_modes": ("modes", "higher"),
    "heldout_mode_kl": ("KL of the modes' shares, nats", "lower"),
    "heldout_sliced_wasserstein": ("sliced Wasserstein distance of the pixels", "lower"),
}


def is_headline(tag: str) -> bool:
    """Whether a figure belongs into a line on the terminal: no seconds, floors or spreads, nor what only the report explains."""
    quality = {"heldout_frechet_distance", "heldout_recall", "heldout_coverage", "heldout_fid"}
    of_a_gan = {
        name for figure in QUALITY for name in (figure, f"{figure}_floor", f"{figure}_spread")
    } | {"heldout_samples"}
    return tag not in TIMES and (tag in quality or tag not in of_a_gan)


def write(uri: str, summary: dict[str, Any]) -> None:
    """Writes curves.png, a GAN's film.png, and report.md into the run's folder.

    Args:
        uri: the run's folder.
        summary: what `train.launch.fit` returns.
    """
    kind = summary["kind"]
    alarms = metrics.alarms(uri) if kind == "gan" else None
    storage.write_bytes(
        storage.join(uri, "curves.png"),
        curves(metrics.read(uri), kind, summary["run"], alarms or []),
    )
    page = [
        *_head(uri, summary),
        *(
            _gan(uri, summary["metrics"], alarms)
            if kind == "gan"
            else _gpt(uri, summary["metrics"])
        ),
    ]
    storage.write_bytes(storage.join(uri, "report.md"), "\n".join(page).encode())


# ---------------------------------------------------------------- curves


def curves(
    rows: list[dict[str, float]], kind: str, title: str, alarms: Sequence[dict[str, Any]] = ()
) -> bytes:
    """The run's curves over its steps, as a PNG: floors are dashed, alarms vertical lines."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    from matplotlib.lines import Line2D

    panels = [
        (label, found)
        for label, tags in PANELS[kind]
        if (found := [tag for tag in tags if any(tag in row for row in rows)])
    ]
    rows_of_panels = max(math.ceil(len(panels) / COLUMNS), 1)
    figure = Figure(
        figsize=(5 * min(max(len(panels), 1), COLUMNS), 3.4 * rows_of_panels), layout="constrained"
    )
    figure.suptitle(title)
    for place, (label, tags) in enumerate(panels, 1):
        axes = figure.add_subplot(rows_of_panels, min(len(panels), COLUMNS), place)
        _panel(axes, rows, tags, fit=kind == "gan")
        for alarm in alarms:
            colour, width = ALARMS[alarm["kind"]]
            axes.axvline(alarm["step"], color=colour, linewidth=width, zorder=1 - width / 10)
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
    if kinds := {alarm["kind"] for alarm in alarms}:
        lines = [
            Line2D([], [], color=ALARMS[kind][0], linewidth=ALARMS[kind][1], label=f"alarm: {kind}")
            for kind in sorted(kinds)
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _panel(axes: Any, rows: list[dict[str, float]], tags: list[str], fit: bool) -> None:
    """Some figures in one panel, each with its spread and its floor where it has them; `fit`: on a scale that shows them."""
    for tag in tags:
        steps, values = _points(rows, tag)
        (line,) = axes.plot(
            steps, values, label=tag, marker="." if len(steps) < 20 else None, linewidth=1.2
        )
        if len(spread := _points(rows, f"{tag}_spread")[1]) == len(values):
            axes.fill_between(
                steps,
                values - spread,
                values + spread,
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
        if len((floor := _points(rows, f"{tag}_floor"))[0]):
            axes.plot(
                *floor,
                color=line.get_color(),
                linestyle="--",
                linewidth=1,
                label=None if tag != tags[0] else "floor: real pictures",
            )
    if fit:
        _fit(
            axes, np.concatenate([_points(rows, tag)[1] for tag in tags]), set(tags) <= LOGARITHMIC
        )
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)


def _points(rows: list[dict[str, float]], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a figure was recorded and its values, (N) and (N)."""
    found = [(row["step"], row[tag]) for row in rows if tag in row]
    return np.array([step for step, _ in found]), np.array(
        [value for _, value in found], dtype=float
    )


def _fit(axes: Any, values: np.ndarray, logarithmic: bool) -> None:
    sizes = np.abs(values[np.isfinite(values)])
    middle = float(np.median(sizes)) if sizes.size else 0.0
    if logarithmic and sizes.size and values.min() > 0:
        axes.set_yscale("log")
    elif middle > 0 and sizes.max() > WILD * middle:
        axes.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(middle)))
        axes.yaxis.get_major_locator().set_params(numticks=7)


# ---------------------------------------------------------------- the page


def _head(uri: str, summary: dict[str, Any]) -> list[str]:
    """What ran, how often it was started again, and where its time went."""
    steps = f"{summary['steps']} steps on {summary['workers']} worker(s)"
    lines = [
        f"# Run {summary['run']}",
        "",
        f"{steps}, data {summary['dataset']}; the last command took {summary['seconds']:,} s.",
        "",
    ]
    if "failed" in summary:
        lines = [
            *lines[:2],
            f"**It did not reach its {summary['steps']} steps.** {summary['failed']}.",
            "",
        ]
    starts = metrics.starts(uri)
    lines += _starts(starts)
    if spent := [
        f"{summary['metrics'][tag]:,.1f} s {what}"
        for tag, what in TIMES.items()
        if tag in summary["metrics"]
    ]:
        lines += [
            f"Time{' since the last start' if len(starts) > 1 else ''}: {', '.join(spent)}.",
            "",
        ]
    return lines


def _starts(starts: list[dict[str, float]]) -> list[str]:
    """How often the run was started again, and from where."""
    if len(starts) < 2:
        return []
    again = [
        f"- from step {start['step']:.0f} at {datetime.fromtimestamp(start['time'], UTC):%Y-%m-%d %H:%M:%S} UTC"
        for start in starts[1:]
    ]
    return [f"Resumed {len(again)} time(s):", "", *again, ""]


def _figures(figures: dict[str, float]) -> list[str]:
    """A table of the figures that no other part of the page has, the curves, and where all of it is from."""
    rest = [f"| {tag} | {value:,.4g} |" for tag, value in figures.items() if tag not in TIMES]
    sources = (
        "The config is in `run.yaml`, every measurement in `metrics.jsonl` and `tensorboard/`."
    )
    return [
        "| figure | value |",
        "| --- | ---: |",
        *rest,
        "",
        "![curves](curves.png)",
        "",
        sources,
        "",
    ]


def _gpt(uri: str, figures: dict[str, float]) -> list[str]:
    lines = _figures(figures)
    if samples := storage.names(storage.join(uri, "samples")):
        text = storage.read_bytes(storage.join(uri, "samples", samples[-1])).decode()
        lines += ["## Latest sample", "", *(f"    {line}" for line in text.splitlines()), ""]
    return lines


def _gan(uri: str, figures: dict[str, float], alarms: list[dict[str, Any]] | None) -> list[str]:
    samples = _samples(uri)
    quality = {name for tag in QUALITY for name in (tag, f"{tag}_floor", f"{tag}_spread")} | {
        "heldout_samples"
    }
    return [
        *_alarms(alarms),
        *_film(uri, samples),
        *_beside(samples),
        *_quality(uri, figures),
        "## Curves and figures",
        "",
        *_figures({tag: value for tag, value in figures.items() if tag not in quality}),
    ]


# ---------------------------------------------------------------- a GAN's parts of it


def _alarms(alarms: list[dict[str, Any]] | None) -> list[str]:
    if alarms is None:
        return []
    said = [
        f"- step {alarm['step']:,}, **{alarm['kind']}**: {alarm['sentence']}" for alarm in alarms
    ] or ["No alarms."]
    return ["## Alarms", "", *said, ""]


def _samples(uri: str) -> dict[str, dict[int, str]]:
    """{tag: {step: file}} of the run's pictures, e.g. {"pictures": {350: "pictures_000350.png"}}."""
    found: dict[str, dict[int, str]] = {}
    for name in storage.names(storage.join(uri, "samples")):
        if (sample := SAMPLE.fullmatch(name)) and sample["kind"] == "png":
            found.setdefault(sample["tag"], {})[int(sample["step"])] = name
    return found


def _film(uri: str, samples: dict[str, dict[int, str]]) -> list[str]:
    """Draws film.png."""
    frames = samples.get("pictures", {})
    if not frames:
        return []
    names = _class_names(uri)
    real = samples.get("real", {})
    strip = pictures.film(
        [(step, _picture(uri, frames[step])) for step in pictures.spread(list(frames))],
        names,
        _picture(uri, real[max(real)]) if real else None,
    )
    storage.write_bytes(storage.join(uri, "film.png"), strip)
    what = (
        "The same latent in every picture, one class a column"
        if names is not None
        else "The same latents in every row"
    )
    return [
        "## The training as a film",
        "",
        what + ("; the last row is real." if real else "."),
        "",
        "![film](film.png)",
        "",
    ]


def _picture(uri: str, name: str) -> np.ndarray:
    return np.asarray(
        Image.open(io.BytesIO(storage.read_bytes(storage.join(uri, "samples", name)))).convert(
            "RGB"
        )
    )


def _class_names(uri: str) -> list[str] | None:
    """What the rows of a conditional generator's grids are, [] where nobody knows any more; None of an unconditional one."""
    place = storage.join(uri, "run.yaml")
    if (
        not storage.exists(place)
        or not yaml.safe_load(storage.read_bytes(place))["model"]["conditional"]
    ):
        return None
    dataset = storage.join(
        storage.read_json(storage.join(uri, "lineage.json"))["dataset"]["uri"], "dataset.json"
    )
    return (
        storage.read_json(dataset)["classes"][: pictures.GRID_ROWS]
        if storage.exists(dataset)
        else []
    )


def _beside(samples: dict[str, dict[int, str]]) -> list[str]:
    """The latest grid beside the real one, and the latest walks between latents."""
    lines = []
    latest = {tag: (max(steps), f"samples/{steps[max(steps)]}") for tag, steps in samples.items()}
    if "pictures" in latest:
        step, made = latest["pictures"]
        shown = {f"generated, step {step:,}": f"![generated]({made})"} | (
            {"real": f"![real]({latest['real'][1]})"} if "real" in latest else {}
        )
        lines += [
            "## Generated and real",
            "",
            *_row(list(shown)),
            *_row(["---"] * len(shown)),
            *_row(list(shown.values())),
            "",
        ]
    if "interpolation" in latest:
        step, made = latest["interpolation"]
        lines += [
            f"## Between latents, step {step:,}",
            "",
            "Each row goes from one latent to the next along the great circle.",
            "",
        ]
        lines += [f"![interpolation]({made})", ""]
    return lines


def _quality(uri: str, figures: dict[str, float]) -> list[str]:
    """How good the pictures are, each figure beside its floor."""
    known = [tag for tag in QUALITY if tag in figures]
    if not known:
        return []
    count = f"{figures['heldout_samples']:,.0f} " if "heldout_samples" in figures else ""
    lines = ["## Quality", ""]
    lines += [
        f"{count}generated pictures against as many held-out real ones; the floor is what real training pictures come to.",
        "",
    ]
    lines += _extractor(uri)
    lines += [*_row(["figure", "value", "floor", "better"]), *_row(["---", "---:", "---:", "---"])]
    for tag in known:
        name, better = QUALITY[tag]
        spread = f" ± {figures[f'{tag}_spread']:.2g}" if f"{tag}_spread" in figures else ""
        floor = f"{figures[f'{tag}_floor']:,.4g}" if f"{tag}_floor" in figures else ""
        lines += _row([name, f"{figures[tag]:,.4g}{spread}", floor, better])
    return [*lines, ""]


def _extractor(uri: str) -> list[str]:
    """What saw the features that the figures are about: another one's figures are not comparable."""
    place = storage.join(uri, "lineage.json")
    extractor = storage.read_json(place).get("extractor") if storage.exists(place) else None
    if extractor is None:
        return []
    right = f"{extractor['accuracy']:.1%} of held-out pictures right"
    return [
        f"Features: those of an extractor trained on {extractor['task']} ({right}), sha256 `{extractor['sha256']}`.",
        "",
    ]


def _row(cells: list[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]
