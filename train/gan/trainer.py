"""Generator and critic under training, on one worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from models.nets.dcgan import Critic, DcganConfig, Generator
from models.nets.losses import OBJECTIVES
from train.data.dataset import Dataset
from train.data.images import Images, meta_of
from train.data.order import Order, positions, rng
from train.gan.config import GanConfig
from train.parallel.average import Average
from train.parallel.state import State
from train.parallel.strategy import Learner, Strategy

# Purposes of random draws, which set their keys apart.
CRITIC, GENERATOR, SAMPLES, EVALUATION = 2, 3, 4, 5


def net_config(config: GanConfig, dataset: Dataset) -> DcganConfig:
    """Return the shape of both networks for a run's config and data set."""
    classes = meta_of(dataset)["classes"]
    assert classes or not config.model.conditional, "images.prepare refuses this"
    return DcganConfig(
        image_size=config.data.size,
        channels=config.data.channels,
        latent_dim=config.model.latent_dim,
        width=config.model.width,
        num_classes=len(classes) if config.model.conditional else 0,
        norm=config.model.norm,
        critic_norm=config.model.critic_norm,
    )


@dataclass
class Batch:
    """The inputs of one update, on the worker's device."""

    latents: Tensor  # (B, latent_dim)
    labels: Tensor | None  # (B) int64
    real: Tensor | None = None  # (B, C, H, W) in [-1, 1]
    mix: Tensor | None = None  # (B) in [0, 1): where between fake and real the penalty is taken


class GanTrainer:
    """Generator, critic, the generator's moving average, and both optimizers on one worker.

    The updates leave the same parameters at any number of workers: losses are means over the
    global batch, and every draw is a function of (seed, global position, purpose).

    Args:
        config: of the run.
        net_config: the shape of both networks.
        strategy: distributes them.
        saved: the state of a checkpoint to resume from.

    Attributes:
        critic_updates: the critic's updates so far; the next one's real images follow from it.
        critic_updates_in_step: those since the generator's last update.
    """

    def __init__(
        self,
        config: GanConfig,
        net_config: DcganConfig,
        strategy: Strategy,
        saved: State | None = None,
    ) -> None:
        self.config, self.net_config, self.strategy = config, net_config, strategy
        self.objective = OBJECTIVES[config.gan.objective]
        torch.manual_seed(config.run.seed)
        generator, critic = Generator(net_config), Critic(net_config)
        critic_lr = config.optim.critic_lr or config.optim.lr
        self.generator = self._learner("generator", generator, config.optim.lr, saved)
        self.critic = self._learner("critic", critic, critic_lr, saved)
        self.average = Average(self.generator, config.model.ema_decay, saved)
        self.critic_updates, self.critic_updates_in_step = 0, 0
        if saved is not None:
            cadence = saved["gan_cadence"]
            self.critic_updates = cadence["critic_updates"]
            self.critic_updates_in_step = cadence["critic_updates_in_step"]

    def _learner(self, name: str, net: nn.Module, lr: float, saved: State | None) -> Learner:
        net.to(self.strategy.device)
        if saved is not None:
            net.load_state_dict(dict(saved[name]))  # before DeepSpeed takes its copies
        betas = (self.config.optim.beta1, self.config.optim.beta2)
        optimizer = torch.optim.Adam(net.parameters(), lr, betas, fused=True)
        return self.strategy.learner(name, net, optimizer, saved=saved)

    # ---- updates

    def update_critic(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Update the critic once from this worker's micro-batches.

        Returns:
            The means of its loss, of its scores and of the penalty.
        """
        self.critic.model.requires_grad_(True)
        found = []
        for number, batch in enumerate(batches):
            with self.critic.accumulating(number, len(batches)):
                loss, metrics = self._critic_loss(batch)
                self.critic.backward(loss)
            found.append({"critic_loss": loss, **metrics})
        self.critic.step()
        self.critic_updates += 1
        self.critic_updates_in_step += 1
        return {
            name: torch.stack([metrics[name].detach() for metrics in found]).mean()
            for name in found[0]
        }

    def update_generator(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Update the generator once from this worker's micro-batches; return its mean loss."""
        self.critic.model.requires_grad_(False)
        losses = []
        for number, batch in enumerate(batches):
            with self.generator.accumulating(number, len(batches)):
                loss = self._generator_loss(batch)
                self.generator.backward(loss)
            losses.append(loss.detach())
        self.generator.step()
        self.critic_updates_in_step = 0
        return {"generator_loss": torch.stack(losses).mean()}

    def warm_up(self, images: Images) -> None:
        """Warm up both networks before a process's first step (see `Learner.warm_up`).

        It leaves everything unchanged, running statistics included.
        """
        batch = self.critic_batches(0, images)[0]
        buffers = [
            (buffer, buffer.clone())
            for learner in (self.generator, self.critic)
            for buffer in learner.model.buffers()
        ]
        self.critic.warm_up(lambda: self._critic_loss(batch)[0])
        self.critic.model.requires_grad_(False)
        self.generator.warm_up(lambda: self._generator_loss(batch))
        for buffer, value in buffers:
            buffer.copy_(value)

    def _critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the critic's loss over a micro-batch, penalty included, and its parts."""
        assert batch.real is not None
        assert batch.mix is not None
        dtype = batch.real.dtype
        # Three forwards and one backward: DDP exchanges the gradients once, after all three.
        with self.strategy.autocast():
            with torch.no_grad():
                fake = self.generator.model(batch.latents, batch.labels).to(dtype)
            real_scores = self.critic(batch.real, batch.labels).to(dtype)
            fake_scores = self.critic(fake, batch.labels).to(dtype)
        loss = self.objective.critic_loss(real_scores, fake_scores)
        metrics = {"real_score": real_scores.mean(), "fake_score": fake_scores.mean()}
        if self.config.gan.objective == "wgan-gp":
            metrics["wasserstein_distance"] = metrics["real_score"] - metrics["fake_score"]
        if self.config.gan.penalty_weight:
            # Not through the wrapper: DeepSpeed's hooks would take the inner differentiation for
            # the backward.
            critic = partial(self.critic.model, labels=batch.labels)
            penalty = self.objective.penalty(critic, batch.real, fake, batch.mix)
            metrics["gradient_penalty"] = penalty
            loss = loss + self.config.gan.penalty_weight * penalty
        return loss, metrics

    def _generator_loss(self, batch: Batch) -> Tensor:
        with self.strategy.autocast():
            fake = self.generator(batch.latents, batch.labels)
            scores = self.critic.model(fake, batch.labels)
        return self.objective.generator_loss(scores.to(batch.latents.dtype))

    # ---- batches, by position

    def critic_batches(self, update: int, images: Images) -> list[Batch]:
        """Return this worker's micro-batches of the run's critic update `update` (from 0)."""
        order = Order(len(images), self.config.run.seed)
        batches = []
        for micro_batch in self._positions(update):
            real, labels = images.batch(order, micro_batch)
            batch = self.noise(CRITIC, micro_batch)
            batch.real = self._tensor(real)
            if batch.labels is not None and labels is not None:
                batch.labels = torch.from_numpy(labels).to(self.strategy.device)
            batches.append(batch)
        return batches

    def generator_batches(self, step: int) -> list[Batch]:
        """Return this worker's micro-batches of generator step `step`, classes drawn uniformly."""
        return [self.noise(GENERATOR, micro_batch) for micro_batch in self._positions(step)]

    def noise(self, purpose: int, at: np.ndarray) -> Batch:
        """Return latents and, of a conditional generator, classes for the global positions `at`."""
        draws = [rng(self.config.run.seed, int(position), purpose) for position in at]
        dim, num_classes = self.net_config.latent_dim, self.net_config.num_classes
        latents = np.stack([draw.standard_normal(dim, dtype=np.float32) for draw in draws])
        mix = np.array([draw.random(dtype=np.float32) for draw in draws])
        labels = None
        if num_classes:
            classes = [int(draw.integers(num_classes)) for draw in draws]
            labels = torch.tensor(classes, device=self.strategy.device)
        return Batch(self._tensor(latents), labels, mix=self._tensor(mix))

    def _positions(self, update: int) -> list[np.ndarray]:
        return positions(
            update,
            self.config.batch.global_size,
            self.config.micro_size,
            self.strategy.rank,
            self.strategy.world_size,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.strategy.device, torch.get_default_dtype())

    # ---- the averaged generator

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Return the averaged generator's images (B, C, H, W) of a batch's latents and labels."""
        with self.average.applied():
            self.generator.model.eval()
            images: Tensor = self.generator.model(batch.latents, batch.labels)
            self.generator.model.train()
        return images

    def generate_like(self, images: Images, indices: np.ndarray) -> Tensor:
        """Return generated images (B, C, H, W), as many as `indices` (B) and of the same classes
        as those real images."""
        batch = self.noise(EVALUATION, indices)
        if batch.labels is not None and images.labels is not None:
            batch.labels = torch.from_numpy(images.labels[indices]).to(self.strategy.device)
        return self.generate(batch)

    # ---- checkpoints

    def state(self) -> State:
        """Return all that a resumed run needs, as the constructor takes it, after any update."""
        cadence = {
            "critic_updates": self.critic_updates,
            "critic_updates_in_step": self.critic_updates_in_step,
        }
        return {
            **self.generator.state(),
            **self.average.state(),
            **self.critic.state(),
            "gan_cadence": cadence,
        }
