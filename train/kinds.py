"""The kinds of models that can be trained, each as one object.

To add a kind, write a folder like `train/gpt/` and add its object to `KINDS`. Nothing else asks
which kind a run is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cluster import cli
from train.config.sections import Config
from train.data.dataset import Dataset
from train.gan.kind import Gan
from train.gpt.kind import Gpt
from train.run.panels import Panel

if TYPE_CHECKING:
    from models.bundle import ModelEntries
    from train.parallel.state import State
    from train.run.worker import Worker

C = TypeVar("C", bound=Config)


class Kind(Protocol[C]):
    """What differs between kinds of models."""

    @property
    def name(self) -> str:
        """The word on the command line, in presets and in bundles."""

    @property
    def config(self) -> type[Config]:
        """The config of a run of this kind."""

    @property
    def best_metric(self) -> str:
        """The metric that ranks checkpoints and trials; smaller is better."""

    @property
    def speed(self) -> str:
        """The metric of training speed."""

    @property
    def progress_metrics(self) -> Sequence[str]:
        """The metrics that the terminal shows while a run trains, besides the speed."""

    @property
    def weights(self) -> Sequence[str]:
        """The number formats of weights that the export offers, the default first."""

    @property
    def panels(self) -> Sequence[Panel]:
        """What the report plots."""

    def plan(self, config: C) -> str:
        """Return what --dry-run says beyond steps, batches and workers; "" for nothing."""

    def check_environment(self, config: C) -> None:
        """Check what the run needs besides data and a cluster.

        Raises:
            ValueError: a package or a file is missing.
        """

    def prepare(self, config: C, storage_uri: str) -> Dataset:
        """Return the run's data set; prepare it where it is not on storage yet."""

    def check(self, config: C, dataset: Dataset) -> None:
        """Check the config against the data set, without loading either.

        Raises:
            ValueError: they do not fit together.
        """

    def prepare_evaluation(self, config: C, dataset: Dataset, log: cli.Log) -> Dataset:
        """Return the data set together with what evaluation needs; make that where it is missing.

        Args:
            config: the run's.
            dataset: the prepared data set.
            log: called with each progress message.
        """

    def train(self, worker: "Worker[C]", resumed: "tuple[int, State] | None") -> dict[str, float]:
        """Run the training loop on one worker.

        Args:
            worker: this worker.
            resumed: (step, state) of the checkpoint to resume from, or None.

        Returns:
            The run's final metrics, the same on every worker.
        """

    def export(
        self, config: C, state: "State", dataset: Dataset, folder: Path, weights: str
    ) -> "ModelEntries":
        """Write a bundle's files, all but the manifest, into `folder`.

        Args:
            config: of the run.
            state: of the checkpoint.
            dataset: the run's.
            folder: exists and is empty.
            weights: one of `weights`.

        Returns:
            The manifest's entries about the model.

        Raises:
            ValueError: the model cannot be exported, or the graph's outputs differ from torch's.
        """

    def report(self, run_uri: str, metrics: dict[str, float]) -> list[str]:
        """Return the kind's own part of report.md, as lines."""

    def is_headline(self, metric: str) -> bool:
        """Whether a final metric is in the one line that a finished run prints."""


KINDS: dict[str, Kind[Any]] = {kind.name: kind for kind in (Gpt(), Gan())}
