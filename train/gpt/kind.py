"""The GPT as a kind of model (see `train.kinds`)."""

from pathlib import Path
from typing import TYPE_CHECKING

from cluster import cli, storage
from train.data.dataset import Dataset
from train.gpt.config import GptConfig
from train.run.meter import TIMES
from train.run.panels import Panel
from train.run.tables import metrics_table

if TYPE_CHECKING:
    from models.bundle import ModelEntries
    from train.parallel.state import State
    from train.run.worker import Worker


class Gpt:
    """A GPT on text. torch and transformers are imported when a method needs them."""

    name = "gpt"
    config = GptConfig
    best_metric = "heldout_bits_per_byte"
    speed = "tokens_per_s"
    progress_metrics = ("loss", "heldout_loss", "heldout_bits_per_byte")
    weights = ("fp32", "int8")
    panels = (
        Panel("loss, nats per token", ("loss", "heldout_loss")),
        Panel("held-out bits per byte", ("heldout_bits_per_byte",)),
        Panel("tokens per second", ("tokens_per_s",)),
        Panel("gradient norm", ("grad_norm",)),
        Panel("learning rate", ("lr",)),
    )

    def plan(self, config: GptConfig) -> str:
        """Return tokens, parameters, operations and checkpoint size of the run."""
        tokens, size = config.tokens_per_step * config.steps, config.model
        text = f"{config.tokens_per_step:,} tokens per step, {tokens:,} in all"
        if size.pretrained is not None:
            return text
        embeddings = (config.data.known_vocab_size + size.context) * size.width
        parameters = embeddings + 12 * size.layers * size.width**2
        pflop = 6e-15 * parameters * tokens  # 6 operations per parameter and token
        megabytes = parameters * 12 / 1e6  # each parameter and Adam's two moments in fp32
        return (
            f"{text}; about {parameters / 1e6:,.1f} M parameters, {pflop:,.3g} PFLOP, "
            f"checkpoints of {megabytes:,.0f} MB"
        )

    def check_environment(self, config: GptConfig) -> None:
        """Check nothing: a GPT needs only data and a cluster."""

    def prepare(self, config: GptConfig, storage_uri: str) -> Dataset:
        """Return the packed text; pack it where it is not on storage yet."""
        from train.data import text

        return text.prepare(config.data, storage_uri)

    def check(self, config: GptConfig, dataset: Dataset) -> None:
        """Check that the config fits the data set, without loading anything.

        Raises:
            ValueError: there are fewer tokens than one sample has, or the pretrained model has
                other sizes.
        """
        from train.data.text import meta_of

        sizes, meta = config.model, meta_of(dataset)
        tokens = meta["splits"]["train"]["tokens"]
        if tokens < 2 * sizes.context + 1:
            raise ValueError(
                f"the data have {tokens} tokens to train on, and model.context is "
                f"{sizes.context}: use a smaller context, or more text"
            )
        if sizes.pretrained is None:
            return
        # Only now, because transformers takes two seconds to import.
        from models.nets import gpt

        pretrained = gpt.read_config(sizes.pretrained)
        if pretrained.vocab_size != meta["vocab_size"]:
            raise ValueError(
                f"model.pretrained {sizes.pretrained} has {pretrained.vocab_size} tokens and the "
                f"tokenizer {meta['vocab_size']}: use the tokenizer it was trained with, e.g. "
                f"--data.tokenizer {sizes.pretrained}"
            )
        if pretrained.n_positions < sizes.context:
            raise ValueError(
                f"model.context is {sizes.context}, and model.pretrained {sizes.pretrained} "
                f"attends to {pretrained.n_positions} tokens at most"
            )

    def prepare_evaluation(self, config: GptConfig, dataset: Dataset, log: cli.Log) -> Dataset:
        """Return the data set: evaluation needs nothing else."""
        return dataset

    def train(
        self, worker: "Worker[GptConfig]", resumed: "tuple[int, State] | None"
    ) -> dict[str, float]:
        """Run the training loop on one worker."""
        from train.gpt import loop

        return loop.train(worker, resumed)

    def export(
        self, config: GptConfig, state: "State", dataset: Dataset, folder: Path, weights: str
    ) -> "ModelEntries":
        """Write a bundle's files, all but the manifest, into `folder`."""
        from train.gpt import export

        return export.export_checkpoint(config, state, dataset, folder, weights)

    def report(self, run_uri: str, metrics: dict[str, float]) -> list[str]:
        """Return the metrics and the newest sample of text."""
        lines = metrics_table(metrics)
        samples = storage.join(run_uri, "samples")
        if names := storage.names(samples):
            text = storage.read_bytes(storage.join(samples, names[-1])).decode()
            quoted = [f"    {line}" for line in text.splitlines()]
            lines += ["## Latest sample", "", *quoted, ""]
        return lines

    def is_headline(self, metric: str) -> bool:
        """Whether a final metric is in the one line that a finished run prints."""
        return metric not in TIMES
