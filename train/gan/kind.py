"""The GAN as a kind of model (see `train.kinds`)."""

from pathlib import Path
from typing import TYPE_CHECKING

from cluster import cli
from train.data.dataset import Dataset
from train.gan.config import GanConfig
from train.gan.metrics import BEST, HEADLINES, QUALITY_METRICS
from train.run.meter import TIMES
from train.run.panels import Panel, Scale

if TYPE_CHECKING:
    from models.bundle import ModelEntries
    from train.parallel.state import State
    from train.run.worker import Worker


class Gan:
    """A DCGAN on images. torch is imported when a method needs it."""

    name = "gan"
    config = GanConfig
    best_metric = BEST
    speed = "images_per_s"
    progress_metrics = ("critic_loss", "generator_loss")
    weights = ("fp32",)
    panels = tuple(
        Panel(title, metrics, Scale.FIT if scale is None else scale)
        for title, metrics, scale in (
            ("losses", ("critic_loss", "generator_loss"), None),
            ("Wasserstein estimate", ("wasserstein_distance",), None),
            ("gradient penalty", ("gradient_penalty",), None),
            ("the critic's mean scores", ("real_score", "fake_score"), None),
            # These fall by a factor of about 1,000 during a run.
            ("held-out FID", ("heldout_fid",), Scale.LOG),
            ("held-out Frechet distance", ("heldout_frechet_distance",), Scale.LOG),
            ("held-out KID and its spread", ("heldout_kid",), None),
            ("held-out precision and recall", ("heldout_precision", "heldout_recall"), None),
            ("held-out density and coverage", ("heldout_density", "heldout_coverage"), None),
            ("modes", ("heldout_modes",), None),
            ("KL of the modes' fractions, nats", ("heldout_mode_kl",), None),
            ("held-out sliced Wasserstein", ("heldout_sliced_wasserstein",), None),
            ("images per second", ("images_per_s",), None),
        )
    )

    def plan(self, config: GanConfig) -> str:
        """Return nothing beyond what every run's plan says."""
        return ""

    def check_environment(self, config: GanConfig) -> None:
        """Check the file with Inception's weights, which workers load late.

        Raises:
            ValueError: it or its package is missing.
        """
        if config.quality.inception is not None:
            from train.gan import inception

            inception.load(config.quality.inception, "cpu")

    def prepare(self, config: GanConfig, storage_uri: str) -> Dataset:
        """Return the decoded images; decode them where they are not on storage yet."""
        from train.data import images

        return images.prepare(config.data, storage_uri, config.model.conditional)

    def check(self, config: GanConfig, dataset: Dataset) -> None:
        """Check nothing: `prepare` has refused images that do not fit the config."""

    def prepare_evaluation(self, config: GanConfig, dataset: Dataset, log: cli.Log) -> Dataset:
        """Return the data set with its feature extractor; train one where there is none yet."""
        from train.gan import extractor

        return extractor.prepare(config, dataset, log)

    def train(
        self, worker: "Worker[GanConfig]", resumed: "tuple[int, State] | None"
    ) -> dict[str, float]:
        """Run the training loop on one worker."""
        from train.gan import loop

        return loop.train(worker, resumed)

    def export(
        self, config: GanConfig, state: "State", dataset: Dataset, folder: Path, weights: str
    ) -> "ModelEntries":
        """Write a bundle's files, all but the manifest, into `folder`."""
        from train.gan import export

        return export.export_checkpoint(config, state, dataset, folder)

    def report(self, run_uri: str, metrics: dict[str, float]) -> list[str]:
        """Return alarms, the film of the run, samples, quality and the other metrics."""
        from train.gan import report

        return report.sections(run_uri, metrics)

    def is_headline(self, metric: str) -> bool:
        """Whether a final metric belongs in the one line that a finished run prints: no times,
        baselines or spreads, nor what only the report explains."""
        return metric not in TIMES and (metric in HEADLINES or metric not in QUALITY_METRICS)
