"""report.md of a run: its text, its curves and its images."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cluster import storage
from train.gan import film
from train.kinds import KINDS
from train.run import records, report
from train.run.panels import Scale
from train.run.recorder import RunRecorder
from train.run.summary import Summary

CLASSES = ["Ankle boot", "Bag"]
QUALITY = {
    "heldout_frechet_distance": 1.25,
    "heldout_frechet_distance_baseline": 0.014,
    "heldout_kid": 0.0301,
    "heldout_kid_baseline": -0.0003,
    "heldout_kid_spread": 0.002,
    "heldout_precision": 0.88,
    "heldout_precision_baseline": 0.955,
    "heldout_recall": 0.51,
    "heldout_recall_baseline": 0.96,
    "heldout_density": 0.9,
    "heldout_density_baseline": 1.015,
    "heldout_coverage": 0.8,
    "heldout_coverage_baseline": 0.97,
    "heldout_modes": 9.0,
    "heldout_modes_baseline": 10.0,
    "heldout_mode_kl": 0.04,
    "heldout_mode_kl_baseline": 0.004,
    "heldout_sliced_wasserstein": 0.04,
    "heldout_sliced_wasserstein_baseline": 0.03,
    "heldout_samples": 1000.0,
}


def summary_of(kind: str, **metrics: float) -> Summary:
    return {
        "run": "watched",
        "kind": kind,
        "steps": 400,
        "workers": 2,
        "seconds": 9.9,
        "dataset": "d",
        "resumed_from": 0,
        "metrics": {"critic_loss": -1.5, "train_s": 8.0, **metrics},
    }


def sheet(level: int) -> np.ndarray:
    """Return a grid of two classes, a row each: gray of `level` and of `level` + 50."""
    rows = [level + 50 * row for row in range(2) for _ in range(film.GRID_COLUMNS)]
    levels = torch.tensor(rows) / 127.5 - 1
    return film.grid(levels.view(-1, 1, 1, 1).expand(-1, 1, 28, 28), film.GRID_COLUMNS)


def record(run: str, dataset: Path, steps: tuple[int, ...] = (100, 200, 400)) -> RunRecorder:
    """Record a GAN's run up to its summary."""
    recorder = RunRecorder(run)
    for step in steps:
        recorder.metrics(
            step,
            {
                "critic_loss": -100 / step,
                "generator_loss": 2.0,
                "wasserstein_distance": 1.0,
                "gradient_penalty": 0.1,
            },
        )
        recorder.metrics(step, {**QUALITY, "heldout_recall": step / 800})
        recorder.image(step, "images", sheet(step // 8))
        recorder.image(step, "interpolation", sheet(0))
    recorder.image(steps[0], "real", sheet(180))
    storage.write_bytes(
        storage.join(run, "run.yaml"), yaml.safe_dump({"model": {"conditional": True}}).encode()
    )
    storage.write_json(dataset / "dataset.json", {"classes": CLASSES})
    extractor = {"sha256": "ab" * 32, "accuracy": 0.913, "task": "classes", "uri": "there"}
    storage.write_json(
        storage.join(run, "lineage.json"),
        {"dataset": {"uri": str(dataset)}, "extractor": extractor},
    )
    return recorder


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def levels_of(film_pixels: np.ndarray) -> list[list[int]]:
    """Return the levels of each column of a film of two classes at 28 pixels, top to bottom."""
    pitch = 2 * 28 + film.GUTTER
    columns = [film_pixels[:, film.MARGIN + number * pitch + pitch // 2, 0] for number in range(2)]
    return [
        [
            int(level)
            for level, count in zip(*np.unique(column, return_counts=True), strict=True)
            if count == 56
        ]
        for column in columns
    ]


# ---- a GAN's report


@pytest.mark.parametrize("remote", [False, True])
def test_gan_report_shows_all_that_was_recorded(
    tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if remote:
        monkeypatch.setattr(storage, "local_path", lambda uri: None)
    folder = tmp_path / "run"
    run = f"file://{folder}" if remote else str(folder)
    recorder = record(run, tmp_path / "data")
    recorder.alarm(200, "collapse", "heldout_recall fell from 0.5 to 0.1")
    recorder.close()
    report.write(run, summary_of("gan", **QUALITY), KINDS["gan"])
    page = (folder / "report.md").read_text()
    assert "- step 200, **collapse**: heldout_recall fell from 0.5 to 0.1" in page
    assert "No alarms." not in page
    assert "1,000 generated images against as many held-out real ones" in page
    assert (
        f"an extractor trained on classes (91.3% of held-out images right), sha256 `{'ab' * 32}`"
        in page
    )
    for line in (
        "| Frechet distance | 1.25 | 0.014 | lower |",
        "| KID | 0.0301 ± 0.002 | -0.0003 | lower |",
        "| recall | 0.51 | 0.96 | higher |",
        "| coverage | 0.8 | 0.97 | higher |",
        "| modes | 9 | 10 | higher |",
        "| critic_loss | -1.5 |",
    ):
        assert line in page.splitlines(), line
    assert "heldout_" not in page.split("## Curves")[1], (
        "the table above has them under other names"
    )
    assert "| generated, step 400 | real |" in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert set(links) == {
        f"samples/{name}"
        for name in ("images_000400.png", "real_000100.png", "interpolation_000400.png")
    } | {
        "film.png",
        "curves.png",
    }
    assert not [link for link in links if not (folder / link).is_file()]
    assert levels_of(pixels(folder / "film.png")) == [[12, 25, 50, 180], [62, 75, 100, 230]]


def test_report_says_no_alarms_only_if_the_run_has_an_alarms_file(tmp_path: Path) -> None:
    record(str(tmp_path / "run"), tmp_path / "data").close()
    report.write(str(tmp_path / "run"), summary_of("gan"), KINDS["gan"])
    assert "## Alarms\n\nNo alarms.\n" in (tmp_path / "run" / "report.md").read_text()
    (tmp_path / "run" / "alarms.jsonl").unlink()
    report.write(str(tmp_path / "run"), summary_of("gan"), KINDS["gan"])
    assert "larms" not in (tmp_path / "run" / "report.md").read_text()


def test_report_of_an_older_run_omits_what_it_lacks(tmp_path: Path) -> None:
    """It has one grid and one metric, and no real images, interpolations, extractor, class names or
    data set."""
    recorder = RunRecorder(str(tmp_path))
    recorder.metrics(400, {"critic_loss": -1.5, "heldout_sliced_wasserstein": 0.04})
    recorder.image(400, "images", sheet(100))
    recorder.close()
    for name in ("alarms.jsonl", "starts.jsonl"):
        (tmp_path / name).unlink()
    old = summary_of("gan", heldout_sliced_wasserstein=0.04)
    for lineage, config in [
        (None, None),
        (
            {"dataset": {"uri": str(tmp_path / "gone")}, "commit": None},
            {"model": {"conditional": True}},
        ),
    ]:
        if lineage and config:
            storage.write_json(tmp_path / "lineage.json", lineage)
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        report.write(str(tmp_path), old, KINDS["gan"])
        page = (tmp_path / "report.md").read_text()
        assert "![film](film.png)" in page
        assert "| sliced Wasserstein distance of the pixels | 0.04 |  | lower |" in page
        assert "| generated, step 400 |\n" in page
        assert not [
            word
            for word in ("real.", "| real |", "latents, step", "extractor", "larms")
            if word in page
        ]
    assert levels_of(pixels(tmp_path / "film.png")) == [[100], [150]], (
        "one column per class, without names"
    )


def test_run_without_images_has_a_report_without_a_film(tmp_path: Path) -> None:
    recorder = RunRecorder(str(tmp_path))
    recorder.metrics(1, {"critic_loss": 1.0})
    recorder.close()
    report.write(str(tmp_path), summary_of("gan"), KINDS["gan"])
    assert not (tmp_path / "film.png").exists()
    assert "film" not in (tmp_path / "report.md").read_text()


# ---- curves


def reddish(png: bytes) -> int:
    """Count the pixels in which red dominates."""
    red, *others = (
        np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int).transpose(2, 0, 1)
    )
    return int((red - np.maximum(*others) > 60).sum())


def test_alarms_are_lines_in_every_panel() -> None:
    rows = [
        {"step": step, "critic_loss": 1.0 / step, "wasserstein_distance": 1.0}
        for step in range(1, 40)
    ]
    alarm: records.Alarm = {"step": 20, "kind": "collapse", "message": "of recall"}
    later: records.Alarm = {"step": 30, "kind": "collapse", "message": "of recall"}
    without, one, two = (
        reddish(report.curves(rows, KINDS["gan"].panels, "r", alarms))
        for alarms in ([], [alarm], [alarm, later])
    )
    assert without == 0
    assert one > 2 * 100, "at least a hundred pixels in each of two panels"
    assert two > 1.5 * one


def test_baseline_is_dashed_and_spread_is_a_band() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    rows = [
        {
            "step": step,
            "heldout_kid": 1.0 / step,
            "heldout_kid_baseline": 0.1,
            "heldout_kid_spread": 0.5,
        }
        for step in (1, 2, 3)
    ]
    report._plot(axes, rows, ["heldout_kid"], Scale.FIT)
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert axes.lines[0].get_color() == axes.lines[1].get_color()
    assert np.allclose(axes.lines[1].get_ydata(), 0.1)
    (band,) = axes.collections
    heights = np.array(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1 / 3 - 0.5, 1.5))


def test_scale_is_symlog_where_peaks_would_flatten_the_rest() -> None:
    """A diverged run is plotted too, with 2e9 beside 3, and NaN."""
    from matplotlib.figure import Figure

    diverged = [3.0, -2.0, 4.0, 2e9, float("nan"), 5.0]
    axes = Figure().add_subplot()
    report._plot(
        axes,
        [{"step": step, "critic_loss": value} for step, value in enumerate(diverged)],
        ["critic_loss"],
        Scale.FIT,
    )
    assert axes.get_yscale() == "symlog"
    report.curves([{"step": 1, "critic_loss": float("nan")}], KINDS["gan"].panels, "only NaN")
    calm = Figure().add_subplot()
    report._plot(
        calm,
        [
            {"step": step, "critic_loss": value}
            for step, value in enumerate([-15.0, -3.0, -2.0, -1.0])
        ],
        ["critic_loss"],
        Scale.FIT,
    )
    assert calm.get_yscale() == "linear"


# ---- a GPT's report, and what every report has


def test_report_shows_where_time_went_and_each_resume(tmp_path: Path) -> None:
    for start, stop in [(0, 4), (2, 6)]:
        recorder = RunRecorder(str(tmp_path), start)
        for step in range(start + 1, stop + 1):
            recorder.metrics(
                step, {"loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 5.0}
            )
        recorder.text(stop, "text", f"written at step {stop}")
        recorder.close()
    spent = {"train_s": 1234.56, "data_s": 2.5, "eval_s": 3.0, "checkpoint_s": 0.25}
    summary: Summary = {
        "run": "watched",
        "kind": "gpt",
        "steps": 6,
        "workers": 1,
        "seconds": 9.9,
        "dataset": "d",
        "resumed_from": 2,
        "metrics": {"loss": 1 / 6, "mfu": 0.4, **spent},
    }
    report.write(str(tmp_path), summary, KINDS["gpt"])
    page = (tmp_path / "report.md").read_text()
    spent_line = (
        "Time since the last start: 1,234.6 s training, 2.5 s of it waiting for data, "
        "3.0 s evaluation, 0.2 s blocked by checkpoints."
    )
    assert spent_line in page
    assert "Resumed 1 time(s):\n\n- from step 2 at 2" in page
    assert "| mfu | 0.4 |" in page
    assert "| train_s" not in page
    assert "written at step 6" in page
    assert "larms" not in page

    summary["metrics"] = {"loss": 1 / 6}
    storage.delete(str(tmp_path / "starts.jsonl"))  # a run of an older version
    report.write(str(tmp_path), summary, KINDS["gpt"])
    page = (tmp_path / "report.md").read_text()
    assert "Time:" not in page
    assert "Resumed" not in page


def test_panels_are_in_rows_of_three(tmp_path: Path) -> None:
    panels = KINDS["gpt"].panels
    rows = [
        {"step": step, "loss": 1.0, "tokens_per_s": 5.0, "grad_norm": 1.0, "lr": 0.1}
        for step in range(1, 4)
    ]
    (tmp_path / "four.png").write_bytes(report.curves(rows, panels, "four panels"))
    (tmp_path / "one.png").write_bytes(
        report.curves([{"step": 1, "loss": 1.0}], panels, "one panel")
    )
    four, one = Image.open(tmp_path / "four.png"), Image.open(tmp_path / "one.png")
    assert (four.width, four.height) == (3 * one.width, pytest.approx(2 * one.height, abs=2))
