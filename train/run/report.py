"""A run's report: report.md with its metrics, times, curves and samples."""

import io
import itertools
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # pyplot would look for a display
from matplotlib.lines import Line2D

from cluster import storage
from train.kinds import Kind
from train.run import records
from train.run.meter import TIMES
from train.run.panels import Panel, Scale
from train.run.summary import Summary

COLUMNS = 3  # panels side by side
# Peaks above this multiple of the median would flatten the rest on a linear scale.
PEAK_RATIO = 50.0
# Color and width of the lines of an alarm, by kind in alphabetical order; further kinds begin anew.
# At one step lines overlap, the narrower on top.
ALARM_LINES = (("tab:red", 4.0), ("tab:purple", 3.0), ("tab:brown", 2.0), ("tab:pink", 1.0))


def write(uri: str, summary: Summary, kind: Kind[Any]) -> None:
    """Write curves.png and report.md into the run's folder, with the files that its kind adds.

    Args:
        uri: the run's folder.
        summary: what `train.launch.fit` returns.
        kind: of the model.
    """
    alarms = records.alarms(uri) or []
    plots = curves(records.metrics(uri), kind.panels, summary["run"], alarms)
    storage.write_bytes(storage.join(uri, "curves.png"), plots)
    lines = [*_head(uri, summary), *kind.report(uri, summary["metrics"])]
    storage.write_bytes(storage.join(uri, "report.md"), "\n".join(lines).encode())


# ---- curves


def curves(
    rows: list[records.Row],
    panels: Sequence[Panel],
    title: str,
    alarms: Sequence[records.Alarm] = (),
) -> bytes:
    """Plot a run's metrics over its steps; a PNG.

    Baselines are dashed, alarms are vertical lines.
    """
    recorded = {name for row in rows for name in row}
    shown = [panel for panel in panels if recorded & set(panel.metrics)]
    columns = min(max(len(shown), 1), COLUMNS)
    height = max(math.ceil(len(shown) / COLUMNS), 1)
    kinds = sorted({alarm["kind"] for alarm in alarms})
    alarm_lines = dict(zip(kinds, itertools.cycle(ALARM_LINES), strict=False))
    figure = Figure(figsize=(5 * columns, 3.4 * height), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(shown, 1):
        axes = figure.add_subplot(height, columns, number)
        names = [name for name in panel.metrics if name in recorded]
        _plot(axes, rows, names, panel.scale)
        for alarm in alarms:
            color, width = alarm_lines[alarm["kind"]]
            axes.axvline(alarm["step"], color=color, linewidth=width, zorder=1 - width / 10)
        axes.set_xlabel("step")
        axes.set_title(panel.title, fontsize=10)
    if kinds:
        lines = [
            Line2D([], [], color=color, linewidth=width, label=f"alarm: {kind}")
            for kind, (color, width) in alarm_lines.items()
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _plot(axes: Axes, rows: list[records.Row], names: list[str], scale: Scale) -> None:
    """Plot metrics into one panel, each with its spread and its baseline where it has them."""
    for name in names:
        steps, values = _points(rows, name)
        marker = "." if len(steps) < 20 else None
        (line,) = axes.plot(steps, values, label=name, marker=marker, linewidth=1.2)
        color = line.get_color()
        if len(spread := _points(rows, f"{name}_spread")[1]) == len(values):
            axes.fill_between(
                steps, values - spread, values + spread, color=color, alpha=0.2, linewidth=0
            )
        if len((baseline := _points(rows, f"{name}_baseline"))[0]):
            label = "baseline" if name == names[0] else None
            axes.plot(*baseline, color=color, linestyle="--", linewidth=1, label=label)
    if scale is not Scale.LINEAR:
        values = np.concatenate([_points(rows, name)[1] for name in names])
        _set_scale(axes, values, scale is Scale.LOG)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)


def _points(rows: list[records.Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which a metric was recorded, and its values: (N) and (N)."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = [step for step, _ in found], [value for _, value in found]
    return np.array(steps), np.array(values, dtype=float)


def _set_scale(axes: Axes, values: np.ndarray, logarithmic: bool) -> None:
    sizes = np.abs(values[np.isfinite(values)])
    median = float(np.median(sizes)) if sizes.size else 0.0
    if logarithmic and sizes.size and values.min() > 0:
        axes.set_yscale("log")
    elif median > 0 and sizes.max() > PEAK_RATIO * median:
        axes.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(median)))
        # A SymmetricalLogLocator, which takes it.
        axes.yaxis.get_major_locator().set_params(numticks=7)  # type: ignore[call-arg]


# ---- report.md


def _head(uri: str, summary: Summary) -> list[str]:
    """Say what ran, from where it was resumed, and where its time went."""
    steps = f"{summary['steps']} steps on {summary['workers']} worker(s)"
    seconds = f"the last command took {summary['seconds']:,} s"
    title = [f"# Run {summary['run']}", ""]
    if "failed" in summary:
        missed = f"**It did not reach its {summary['steps']} steps.** {summary['failed']}."
        lines = [*title, missed, ""]
    else:
        lines = [*title, f"{steps}, data {summary['dataset']}; {seconds}.", ""]
    starts = records.starts(uri)
    lines += _resumes(starts)
    metrics = summary["metrics"]
    if spent := [
        f"{metrics[name]:,.1f} s {what}" for name, what in TIMES.items() if name in metrics
    ]:
        since = " since the last start" if len(starts) > 1 else ""
        lines += [f"Time{since}: {', '.join(spent)}.", ""]
    return lines


def _resumes(starts: list[records.Row]) -> list[str]:
    """List when and from which step the run was resumed."""
    if len(starts) < 2:
        return []
    lines = []
    for start in starts[1:]:
        when = datetime.fromtimestamp(start["time"], UTC)
        lines.append(f"- from step {start['step']:.0f} at {when:%Y-%m-%d %H:%M:%S} UTC")
    return [f"Resumed {len(lines)} time(s):", "", *lines, ""]
