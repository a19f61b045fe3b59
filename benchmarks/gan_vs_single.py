"""The demo's GAN on two Ray Train workers, compared with a plain WGAN-GP loop in one process.

    python -m benchmarks.gan_vs_single [--rounds 4] [--steps 350]

Both train gan-demo on the same images for the same number of generator steps, one after the other,
in one run: raykiln with two workers of one thread, the plain loop with a DataLoader and two torch
threads. Networks, losses, critic steps, batch size and optimizers are the same. Compared are images
per second once both run steadily, as a ratio per round (each round has a seed of its own), and the
final held-out metrics; both generators are averaged by the same rule and evaluated alike.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.runs import ROOT, median_and_range, parser, read_metrics, train
from cluster import cli
from models.nets.dcgan import Critic, Generator
from models.nets.losses import (
    gradient_penalty,
    interpolate,
    wasserstein_critic_loss,
    wasserstein_generator_loss,
)
from train.config import loader as configs
from train.data import images
from train.data.dataset import Dataset
from train.gan import extractor, extractor_file
from train.gan.config import GanConfig
from train.gan.evaluator import Evaluator
from train.gan.trainer import net_config

METRICS = {"frechet_distance": 3, "kid": 4, "recall": 2, "coverage": 2}  # with digits to print
# Generator steps before the clock starts: allocator, caches, the first all-reduce.
WARM_UP = 10
LOG_EVERY = 10


@dataclass(frozen=True)
class Trained:
    """What a training run achieved.

    Attributes:
        images_per_s: real images that the critic has seen per second.
        metrics: of the final generator on held-out data.
    """

    images_per_s: float
    metrics: dict[str, float]


def demo() -> GanConfig:
    config = configs.load("gan", "gan-demo")
    assert isinstance(config, GanConfig)
    return config


# ---- the plain loop


def single(prepared: Dataset, extractor_uri: str, seed: int, steps: int) -> Trained:
    """Train as tutorials do, on a prepared data set."""
    config = demo()
    torch.set_num_threads(config.parallel.workers)
    torch.manual_seed(seed)
    training, heldout = (
        images.Images(prepared, split, config.data.size) for split in ("train", "heldout")
    )
    assert training.labels is not None
    class_labels = training.labels
    dataset = TensorDataset(
        torch.from_numpy(training.centered(slice(None))), torch.from_numpy(np.array(class_labels))
    )
    loader = DataLoader(dataset, config.batch.global_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    sizes = net_config(config, prepared)
    generator, critic = Generator(sizes), Critic(sizes)
    optim = config.optim
    adam = partial(torch.optim.Adam, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)
    generator_optimizer, critic_optimizer = adam(generator.parameters()), adam(critic.parameters())
    average = AveragedModel(generator, avg_fn=partial(moving_average, config.model.ema_decay))

    for step in range(steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        for _ in range(config.gan.critic_steps):
            real, labels = next(batches)
            critic_step(
                generator, critic, critic_optimizer, real, labels, config.gan.penalty_weight
            )
        generator_step(generator, critic, generator_optimizer, config.batch.global_size)
        average.update_parameters(generator)
    seconds = time.perf_counter() - begin

    @torch.no_grad()
    def generate(indices: np.ndarray) -> Tensor:
        """Return images of the averaged generator with the classes of the real ones."""
        latents = torch.randn(len(indices), sizes.latent_dim)
        generated: Tensor = average(latents, torch.from_numpy(class_labels[indices]))
        return generated

    images_per_s = (steps - WARM_UP) * config.gan.critic_steps * config.batch.global_size / seconds
    net = extractor_file.load(extractor_uri, "cpu")
    evaluate = Evaluator(training, heldout, net, config.quality.samples, "cpu")
    return Trained(images_per_s, evaluate(generate))


def critic_step(
    generator: Generator,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    real: Tensor,
    labels: Tensor,
    penalty_weight: float,
) -> None:
    with torch.no_grad():
        fake = generator(torch.randn(len(real), generator.config.latent_dim), labels)
    penalty = gradient_penalty(
        partial(critic, labels=labels), interpolate(real, fake, torch.rand(len(real)))
    )
    loss = (
        wasserstein_critic_loss(critic(real, labels), critic(fake, labels))
        + penalty_weight * penalty
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def generator_step(
    generator: Generator, critic: Critic, optimizer: torch.optim.Optimizer, batch_size: int
) -> None:
    labels = torch.randint(generator.config.num_classes, (batch_size,))
    critic.requires_grad_(False)  # its gradients are not needed here
    loss = wasserstein_generator_loss(
        critic(generator(torch.randn(batch_size, generator.config.latent_dim), labels), labels)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    critic.requires_grad_(True)


def moving_average(decay: float, slow: Tensor, fast: Tensor, num_averaged: Tensor) -> Tensor:
    """Return the next average, as train/parallel/average.py does: the decay is smaller at first."""
    steps = int(num_averaged)
    return slow.lerp(fast, 1 - min(decay, (1 + steps) / (10 + steps)))


# ---- both, as commands


def train_single(folder: Path, extractor_uri: str, seed: int, steps: int) -> Trained:
    """Run `single` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gan_vs_single", "--single", str(folder)]
    command += ["--extractor", extractor_uri, "--seed", str(seed), "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Trained(**json.loads(done.stdout.splitlines()[-1]))


def train_raykiln(storage: Path, seed: int, steps: int) -> Trained:
    options = {"steps": steps, "run.seed": seed, "log.every": LOG_EVERY}
    options |= dict.fromkeys(("log.eval_every", "log.sample_every", "checkpoint.every"), steps)
    run = train("gan", "gan-demo", storage, f"seed-{seed}", options)
    steady = [
        row["images_per_s"]
        for row in read_metrics(run)
        if row["step"] > WARM_UP and "critic_loss" in row
    ]
    summary = json.loads((run / "summary.json").read_text())
    return Trained(statistics.harmonic_mean(steady), summary["metrics"])


# ---- the comparison


def row(pairs: list[tuple[Trained, Trained]], steps: int) -> str:
    """Return the row for BENCHMARKS.md from (raykiln, plain loop) of each round."""
    raykiln, plain = zip(*pairs, strict=True)
    ratios = [ours.images_per_s / theirs.images_per_s for ours, theirs in pairs]
    baseline = ", ".join(
        f"{name} {raykiln[0].metrics[f'heldout_{name}_baseline']:.{digits}f}"
        for name, digits in METRICS.items()
    )
    workers = demo().parallel.workers
    return (
        f"| train gan-demo, {workers} workers, {steps} steps (real images: {baseline}) "
        f"| {describe(raykiln)} | one process, {workers} threads: {describe(plain)} "
        f"| {median_and_range(ratios, 2)} |"
    )


def describe(runs: tuple[Trained, ...]) -> str:
    """Return the median speed of the runs, and each metric's median and range."""
    speed = statistics.median(run.images_per_s for run in runs)
    metrics = [
        f"{name} {median_and_range([run.metrics[f'heldout_{name}'] for run in runs], digits)}"
        for name, digits in METRICS.items()
    ]
    return f"{speed:,.0f} images/s, {', '.join(metrics)}"


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--steps", type=int, default=350, help="generator steps")
    options.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--extractor", help=argparse.SUPPRESS)
    options.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    steps = arguments.steps
    if steps <= WARM_UP or steps % LOG_EVERY:
        raise ValueError(f"--steps is {steps}: use a multiple of {LOG_EVERY} above {WARM_UP}")
    if arguments.single:
        trained = single(
            Dataset.open(str(arguments.single)), arguments.extractor, arguments.seed, steps
        )
        print(json.dumps(asdict(trained)))
        return 0
    config = demo()
    pairs: list[tuple[Trained, Trained]] = []
    with tempfile.TemporaryDirectory() as storage:
        dataset = images.prepare(config.data, storage, config.model.conditional)
        evaluated = extractor.prepare(config, dataset).extractor
        assert evaluated is not None
        for seed in range(arguments.rounds):
            raykiln = train_raykiln(Path(storage), seed, steps)
            plain = train_single(Path(dataset.uri), evaluated["uri"], seed, steps)
            pairs.append((raykiln, plain))
            print(f"round {seed}: raykiln {describe((raykiln,))}", flush=True)
            print(f"round {seed}: one process {describe((plain,))}", flush=True)
    print(row(pairs, steps))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
