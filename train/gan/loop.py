"""Trains a DCGAN with Ray Train, as a WGAN-GP or by another objective: `python -m train gan --config gan-tiny`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.nets.dcgan import Critic, DcganConfig, Generator
from models.nets.losses import OBJECTIVES
from train.config.sections import GanConfig
from train.data import images
from train.data.dataset import fetch
from train.data.order import Order, positions, rng
from train.gan import extractor
from train.gan.alarms import Alarm, Alarms
from train.gan.pictures import GRID_COLUMNS, GRID_ROWS, grid, interpolations
from train.gan.quality import Judge
from train.parallel.average import Average
from train.parallel.state import Halt, State
from train.parallel.strategy import Learner, Strategy
from train.run.recorder import Meter, Silent, finite
from train.run.worker import Worker

CRITIC, GENERATOR, SAMPLES, JUDGED = (
    2,
    3,
    4,
    5,
)  # purposes of random draws: what sets their keys apart
BEST = "heldout_frechet_distance"  # what tells one checkpoint's pictures from another's: the smaller the better


def train(worker: Worker, start: tuple[int, State] | None) -> dict[str, Any]:
    """The loop of one worker; returns the run's final metrics (the same on every worker)."""
    config, strategy, recorder = worker.config, worker.strategy, worker.recorder
    folder = fetch(worker.dataset)
    pictures = images.Pictures(folder, "train", config.data.size, config.data.horizontal_flip)
    step, saved = start or (0, None)
    gan = Gan(config, shape(config, pictures.meta), strategy, saved)
    alarms = Alarms(config.gan.objective, saved["alarms"] if saved else None)
    judge = _judge(worker, gan, pictures, folder)

    gan.rehearse(pictures)
    meter = Meter("images_per_s", config.gan.critic_steps * config.batch.global_size)
    final: dict[str, Any] = {}
    figures: dict[str, Tensor] = {}
    while step < config.steps:
        while gan.turn < config.gan.critic_steps:
            with meter.waiting("data"):
                batches = gan.critic_batches(gan.critic_updates, pictures)
            figures |= gan.update_critic(batches)
        worker.reached("update", step + 1)
        figures |= gan.update_generator(gan.generator_batches(step))
        gan.average.update(step)
        step += 1
        meter.count()

        last = step == config.steps
        if worker.measures_at(step):
            measured = strategy.mean({tag: float(value) for tag, value in figures.items()})
            _say(worker, alarms.measured(step, measured))
            recorder.scalars(step, {**finite(measured, step), **meter.read()})
        with meter.paused():
            judged: dict[str, float] = {}
            seen: list[Alarm] = []
            if step % config.log.eval_every == 0 or last:
                with meter.waiting("eval"):
                    judged = strategy.of_first(judge)
                seen = alarms.judged(step, judged)
                _say(worker, seen)
                recorder.scalars(step, finite(judged, step))
                final = {**judged, **measured}
                worker.report({"step": step, **final, **meter.total()})
            if strategy.rank == 0 and (step % config.log.sample_every == 0 or last):
                with meter.waiting("sample"):
                    gan.draw(recorder, step, pictures)
            _stop_at_collapse(config, seen)
            if worker.saves_at(step, bool(judged)):
                recorder.flush()  # a run resumed from here has its curves up to here
                with meter.waiting("checkpoint"):
                    worker.checkpoints.save(
                        step, gan.state() | {"alarms": alarms.state()}, judged.get(BEST)
                    )
    with meter.waiting("checkpoint"):
        worker.checkpoints.join()
    strategy.barrier()
    # Interrupted between its last checkpoint and its end: nothing is left to train, and still to be judged.
    return (final or strategy.of_first(judge)) | meter.total()


def _judge(
    worker: Worker, gan: "Gan", pictures: images.Pictures, folder: Path
) -> Callable[[], dict[str, float]]:
    """What judges the averaged generator, on rank 0."""
    config, device = worker.config, worker.strategy.device
    heldout = images.Pictures(folder, "heldout", config.data.size)

    @functools.cache
    def judge() -> Judge:
        return Judge(
            pictures,
            heldout,
            extractor.load(worker.extractor, device),
            config.quality.samples,
            device,
            config.quality.inception,
        )

    return lambda: judge()(partial(gan.like, pictures))


def _say(worker: Worker, alarms: list[Alarm]) -> None:
    for alarm in alarms:
        worker.recorder.alarm(alarm.step, alarm.kind, alarm.sentence)


def _stop_at_collapse(config: GanConfig, alarms: list[Alarm]) -> None:
    """Once all is put down that was seen.

    Raises:
        Halt: the generator collapses, and the run is to end then.
    """
    for alarm in alarms:
        if alarm.kind == "collapse" and config.gan.on_collapse == "stop":
            raise Halt(f"collapse at step {alarm.step} (gan.on_collapse is stop): {alarm.sentence}")


def shape(config: GanConfig, dataset: dict[str, Any]) -> DcganConfig:
    """The nets' shape for a config over a data set (its dataset.json)."""
    assert dataset["classes"] or not config.model.conditional, "images.prepare refuses this"
    return DcganConfig(
        image_size=config.data.size,
        channels=config.data.channels,
        latent_dim=config.model.latent_dim,
        width=config.model.width,
        num_classes=len(dataset["classes"]) if config.model.conditional else 0,
        norm=config.model.norm,
        critic_norm=config.model.critic_norm,
    )


@dataclass
class Batch:
    """What one update takes, on the worker's device."""

    latents: Tensor  # (B, latent_dim)
    labels: Tensor | None  # (B) int64
    real: Tensor | None = None  # (B, C, H, W) in [-1, 1]
    mix: Tensor | None = None  # (B) in [0, 1): where between fake and real the penalty looks


class Gan:
    """Generator, critic, the generator's moving average, and both optimizers of one worker.

    Critic and generator updates leave the same parameters at any number of workers: losses are means over the
    global batch, and every draw is a function of (seed, global position, purpose).

    Args:
        saved: the state of a checkpoint to go on from.

    Attributes:
        critic_updates: how many there have been; the next one's real pictures follow from it.
        turn: how many of them since the generator's last update: where in the cadence the run is.
    """

    def __init__(
        self, config: GanConfig, shape: DcganConfig, strategy: Strategy, saved: State | None = None
    ) -> None:
        self.config, self.shape, self.strategy = config, shape, strategy
        self.objective = OBJECTIVES[config.gan.objective]
        torch.manual_seed(config.run.seed)
        generator, critic = Generator(shape), Critic(shape)
        self.generator = self._learner("generator", generator, config.optim.lr, saved)
        self.critic = self._learner(
            "critic", critic, config.optim.critic_lr or config.optim.lr, saved
        )
        self.average = Average(self.generator, config.model.ema_decay, saved)
        progress = saved["gan_progress"] if saved is not None else {"critic_updates": 0, "turn": 0}
        self.critic_updates, self.turn = progress["critic_updates"], progress["turn"]
        self.real_drawn = False  # by this process

    def _learner(self, name: str, net: nn.Module, lr: float, saved: State | None) -> Learner:
        net.to(self.strategy.device)
        if saved is not None:
            net.load_state_dict(dict(saved[name]))  # before DeepSpeed takes its copies
        optimizer = torch.optim.Adam(
            net.parameters(), lr, (self.config.optim.beta1, self.config.optim.beta2), fused=True
        )
        return self.strategy.learner(name, net, optimizer, saved=saved)

    # ------------------------------------------------------------ updates

    def update_critic(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One step of the critic over this worker's micro-batches; the means of what it minimises and of its scores."""
        self.critic.core.requires_grad_(True)
        found = []
        for number, batch in enumerate(batches):
            with self.critic.accumulating(number, len(batches)):
                loss, figures = self._critic_loss(batch)
                self.critic.backward(loss)
            found.append({"critic_loss": loss, **figures})
        self.critic.step()
        self.critic_updates += 1
        self.turn += 1
        return {
            tag: torch.stack([figures[tag].detach() for figures in found]).mean()
            for tag in found[0]
        }

    def update_generator(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One step of the generator over this worker's micro-batches; the mean of their losses."""
        self.critic.core.requires_grad_(False)
        losses = []
        for number, batch in enumerate(batches):
            with self.generator.accumulating(number, len(batches)):
                loss = self._generator_loss(batch)
                self.generator.backward(loss)
            losses.append(loss.detach())
        self.generator.step()
        self.turn = 0
        return {"generator_loss": torch.stack(losses).mean()}

    def rehearse(self, pictures: images.Pictures) -> None:
        """What a process does before its first step: see `Learner.rehearse`. Nothing is left of it, of running statistics neither."""
        batch = self.critic_batches(0, pictures)[0]
        kept = [
            (buffer, buffer.clone())
            for learner in (self.generator, self.critic)
            for buffer in learner.core.buffers()
        ]
        self.critic.rehearse(lambda: self._critic_loss(batch)[0])
        self.critic.core.requires_grad_(False)
        self.generator.rehearse(lambda: self._generator_loss(batch))
        for buffer, value in kept:
            buffer.copy_(value)

    def _critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critic minimises over a micro-batch, penalty included, and the figures behind it."""
        assert batch.real is not None
        assert batch.mix is not None
        # Three forwards and one backward: DDP exchanges gradients once, when all of them have come together.
        with self.strategy.autocast():
            with torch.no_grad():
                fake = self.generator.core(batch.latents, batch.labels).to(batch.real.dtype)
            real_scores, fake_scores = (
                self.critic(pictures, batch.labels).to(batch.real.dtype)
                for pictures in (batch.real, fake)
            )
        loss = self.objective.critic_loss(real_scores, fake_scores)
        figures = {"real_score": real_scores.mean(), "fake_score": fake_scores.mean()}
        if self.config.gan.objective == "wgan-gp":
            figures["wasserstein_distance"] = figures["real_score"] - figures["fake_score"]
        if self.config.gan.penalty_weight:
            # Past the wrapper, whose hooks (DeepSpeed's) would take the inner differentiation for the backward.
            critic = partial(self.critic.core, labels=batch.labels)
            figures["gradient_penalty"] = self.objective.penalty(
                critic, batch.real, fake, batch.mix
            )
            loss = loss + self.config.gan.penalty_weight * figures["gradient_penalty"]
        return loss, figures

    def _generator_loss(self, batch: Batch) -> Tensor:
        with self.strategy.autocast():
            scores = self.critic.core(self.generator(batch.latents, batch.labels), batch.labels)
        return self.objective.generator_loss(scores.to(batch.latents.dtype))

    # ------------------------------------------------------------ batches, by position

    def critic_batches(self, update: int, pictures: images.Pictures) -> list[Batch]:
        """This worker's micro-batches of the run's critic update number `update`: real pictures and the noise beside them."""
        order = Order(len(pictures), self.config.run.seed)
        found = []
        for places in self._places(update):
            real, labels = pictures.batch(order, places)
            batch = self._noise(CRITIC, places)
            batch.real = self._tensor(real)
            if batch.labels is not None and labels is not None:
                batch.labels = torch.from_numpy(labels).to(self.strategy.device)
            found.append(batch)
        return found

    def generator_batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches of noise, and of classes drawn evenly, of generator step `step`."""
        return [self._noise(GENERATOR, places) for places in self._places(step)]

    def _places(self, update: int) -> list[np.ndarray]:
        return positions(
            update,
            self.config.batch.global_size,
            self.config.micro_size,
            self.strategy.rank,
            self.strategy.world_size,
        )

    def _noise(self, purpose: int, places: np.ndarray) -> Batch:
        draws = [rng(self.config.run.seed, int(place), purpose) for place in places]
        latents = np.stack(
            [draw.standard_normal(self.shape.latent_dim, dtype=np.float32) for draw in draws]
        )
        mix = np.array([draw.random(dtype=np.float32) for draw in draws])
        labels = None
        if self.shape.num_classes:
            labels = torch.tensor(
                [int(draw.integers(self.shape.num_classes)) for draw in draws],
                device=self.strategy.device,
            )
        return Batch(self._tensor(latents), labels, mix=self._tensor(mix))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.strategy.device, torch.get_default_dtype())

    # ------------------------------------------------------------ pictures

    @torch.no_grad()
    def like(self, pictures: images.Pictures, indices: np.ndarray) -> Tensor:
        """Pictures of the averaged generator, as many as `indices` and of the same classes as those real ones."""
        batch = self._noise(JUDGED, indices)
        if batch.labels is not None and pictures.labels is not None:
            batch.labels = torch.from_numpy(pictures.labels[indices]).to(self.strategy.device)
        return self._averaged(batch)

    def draw(self, recorder: Silent, step: int, pictures: images.Pictures) -> None:
        """What the averaged generator makes of latents that never change, walks between some of them, and real pictures once."""
        recorder.image(step, "pictures", self.grid())
        recorder.image(step, "interpolation", self.walks())
        if not self.real_drawn:
            recorder.image(step, "real", self.real(pictures))
            self.real_drawn = True
        recorder.flush()

    @torch.no_grad()
    def grid(self) -> np.ndarray:
        """(H, W, 3) uint8; a conditional generator makes one row a class, one latent a column."""
        batch = self._noise(SAMPLES, np.arange(GRID_COLUMNS * GRID_ROWS))
        if self.shape.num_classes:
            batch.labels = torch.arange(
                min(GRID_ROWS, self.shape.num_classes), device=self.strategy.device
            ).repeat_interleave(GRID_COLUMNS)
            batch.latents = batch.latents[:GRID_COLUMNS].repeat(
                len(batch.labels) // GRID_COLUMNS, 1
            )
        return grid(self._averaged(batch), GRID_COLUMNS)

    @torch.no_grad()
    def walks(self) -> np.ndarray:
        """(H, W, 3) uint8: each row from one latent to the next, of one class where there are classes."""
        batch = self._noise(SAMPLES, np.arange(GRID_ROWS))
        batch.latents = interpolations(batch.latents, GRID_COLUMNS)
        if self.shape.num_classes:
            classes = torch.arange(GRID_ROWS, device=self.strategy.device) % self.shape.num_classes
            batch.labels = classes.repeat_interleave(GRID_COLUMNS)
        return grid(self._averaged(batch), GRID_COLUMNS)

    def real(self, pictures: images.Pictures) -> np.ndarray:
        """(H, W, 3) uint8: real pictures, laid out as `grid`'s."""
        chosen = rng(self.config.run.seed, SAMPLES).permutation(len(pictures))
        if not self.shape.num_classes or pictures.labels is None:
            return grid(
                torch.from_numpy(pictures.centred(chosen[: GRID_COLUMNS * GRID_ROWS])), GRID_COLUMNS
            )
        rows = []
        for label in range(min(GRID_ROWS, self.shape.num_classes)):
            shown = pictures.centred(chosen[pictures.labels[chosen] == label][:GRID_COLUMNS])
            blank = np.zeros(
                (GRID_COLUMNS - len(shown), *shown.shape[1:]), np.float32
            )  # a rare class, or one that is only held out
            rows.append(np.concatenate([shown, blank]))
        return grid(torch.from_numpy(np.concatenate(rows)), GRID_COLUMNS)

    def _averaged(self, batch: Batch) -> Tensor:
        with self.average.applied():
            self.generator.core.eval()
            pictures = self.generator.core(batch.latents, batch.labels)
            self.generator.core.train()
        return pictures

    # ------------------------------------------------------------ checkpoints

    def state(self) -> State:
        """All that a resumed run needs, as the constructor takes it, after any update of either net."""
        cadence = {"gan_progress": {"critic_updates": self.critic_updates, "turn": self.turn}}
        return {**self.generator.state(), **self.average.state(), **self.critic.state(), **cadence}
