"""The samples of a GAN's run: fixed latents, interpolations, and real images for comparison."""

import numpy as np
import torch

from train.data.images import Images
from train.data.order import rng
from train.gan.film import GRID_COLUMNS, GRID_ROWS, grid, interpolations
from train.gan.trainer import SAMPLES, GanTrainer
from train.run.recorder import Recorder


class Sampler:
    """Record samples: (H, W, 3) uint8 grids of `GRID_COLUMNS` columns.

    Args:
        trainer: its averaged generator makes the images.
        images: the real images to compare with.
    """

    def __init__(self, trainer: GanTrainer, images: Images) -> None:
        self.trainer, self.images = trainer, images
        self._recorded_real = False

    def record(self, recorder: Recorder, step: int) -> None:
        """Record images of latents that never change, interpolations between some of them and, the
        first time, real images."""
        recorder.image(step, "images", self.generated())
        recorder.image(step, "interpolation", self.interpolated())
        if not self._recorded_real:
            recorder.image(step, "real", self.real())
            self._recorded_real = True
        recorder.flush()

    def generated(self) -> np.ndarray:
        """Return generated images; of a conditional generator one class per row, one latent per
        column."""
        batch = self.trainer.noise(SAMPLES, np.arange(GRID_COLUMNS * GRID_ROWS))
        if num_classes := self.trainer.net_config.num_classes:
            rows = min(GRID_ROWS, num_classes)
            classes = torch.arange(rows, device=batch.latents.device)
            batch.labels = classes.repeat_interleave(GRID_COLUMNS)
            batch.latents = batch.latents[:GRID_COLUMNS].repeat(rows, 1)
        return grid(self.trainer.generate(batch), GRID_COLUMNS)

    def interpolated(self) -> np.ndarray:
        """Return interpolations: each row from one latent to the next, within one class."""
        batch = self.trainer.noise(SAMPLES, np.arange(GRID_ROWS))
        batch.latents = interpolations(batch.latents, GRID_COLUMNS)
        if num_classes := self.trainer.net_config.num_classes:
            classes = torch.arange(GRID_ROWS, device=batch.latents.device) % num_classes
            batch.labels = classes.repeat_interleave(GRID_COLUMNS)
        return grid(self.trainer.generate(batch), GRID_COLUMNS)

    def real(self) -> np.ndarray:
        """Return real images in the layout of `generated`."""
        images, num_classes = self.images, self.trainer.net_config.num_classes
        chosen = rng(self.trainer.config.run.seed, SAMPLES).permutation(len(images))
        if not num_classes or images.labels is None:
            shown = images.centered(chosen[: GRID_COLUMNS * GRID_ROWS])
            return grid(torch.from_numpy(shown), GRID_COLUMNS)
        rows = []
        for label in range(min(GRID_ROWS, num_classes)):
            shown = images.centered(chosen[images.labels[chosen] == label][:GRID_COLUMNS])
            # A rare class, or one that is only held out, fills no row.
            blank = np.zeros((GRID_COLUMNS - len(shown), *shown.shape[1:]), np.float32)
            rows.append(np.concatenate([shown, blank]))
        return grid(torch.from_numpy(np.concatenate(rows)), GRID_COLUMNS)
