"""What two workers gain a GAN beside what one would write by hand: a WGAN-GP loop in one process, with a DataLoader.

    python -m benchmarks.gan_vs_single [--rounds 4] [--steps 350]

Both train the demo's GAN (gan-demo) on the same pictures for as many generator steps, in turn, in one run: ours on Ray with two
workers of one thread, the other with two threads of torch. Nets, losses, critic steps, batch size and optimizers are the same.
The figure is images a second once both run steadily, ours over theirs, round by round (each with a seed of its own), and how good
the pictures of both are at the end, of generators averaged by the same rule and judged alike.
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

from benchmarks.runs import ROOT, spread, train
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

SHOWN = {
    "frechet_distance": 3,
    "kid": 4,
    "recall": 2,
    "coverage": 2,
}  # of the figures of quality, with so many digits
LOG_EVERY = WARM_UP = (
    10  # generator steps; the clock counts after WARM_UP: allocator, caches, the first exchange of gradients
)


@dataclass(frozen=True)
class Trained:
    images_per_s: float  # real pictures that the critic has seen
    quality: dict[str, float]  # what `train.gan.evaluator.Evaluator` finds


def demo() -> GanConfig:
    config = configs.load("gan", "gan-demo")
    assert isinstance(config, GanConfig)
    return config


# ---- one process


def single(folder: Path, judged_by: str, seed: int, steps: int) -> Trained:
    """The loop as the tutorials have it, on the data set prepared in `folder`."""
    config = demo()
    torch.set_num_threads(config.parallel.workers)
    torch.manual_seed(seed)
    prepared = Dataset.open(str(folder))
    pictures, heldout = (
        images.Images(prepared, split, config.data.size) for split in ("train", "heldout")
    )
    assert pictures.labels is not None
    loaded = TensorDataset(
        torch.from_numpy(pictures.centered(slice(None))),
        torch.from_numpy(np.array(pictures.labels)),
    )
    loader = DataLoader(loaded, config.batch.global_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    sizes = net_config(config, prepared)
    generator, critic = Generator(sizes), Critic(sizes)
    optim = config.optim
    adam = partial(torch.optim.Adam, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)
    generator_optimizer, critic_optimizer = adam(generator.parameters()), adam(critic.parameters())
    average = AveragedModel(generator, avg_fn=partial(moved, config.model.ema_decay))

    for step in range(steps):
        if step == WARM_UP:
            begun = time.perf_counter()
        for _ in range(config.gan.critic_steps):
            real, labels = next(batches)
            critic_step(
                generator, critic, critic_optimizer, real, labels, config.gan.penalty_weight
            )
        generator_step(generator, critic, generator_optimizer, config.batch.global_size)
        average.update_parameters(generator)
    seconds = time.perf_counter() - begun

    @torch.no_grad()
    def like(indices: np.ndarray) -> Tensor:
        """Pictures of the averaged generator, of the classes that the real ones with `indices` have."""
        assert pictures.labels is not None
        return average(
            torch.randn(len(indices), sizes.latent_dim), torch.from_numpy(pictures.labels[indices])
        )

    images_per_s = (steps - WARM_UP) * config.gan.critic_steps * config.batch.global_size / seconds
    net = extractor_file.load(judged_by, "cpu")
    evaluate = Evaluator(pictures, heldout, net, config.quality.samples, "cpu")
    return Trained(images_per_s, evaluate(like))


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
    critic.requires_grad_(False)  # its own gradients are of no use here
    loss = wasserstein_generator_loss(
        critic(generator(torch.randn(batch_size, generator.config.latent_dim), labels), labels)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    critic.requires_grad_(True)


def moved(decay: float, slow: Tensor, fast: Tensor, num_averaged: Tensor) -> Tensor:
    """train/parallel/average.py's moving average, which forgets faster at first."""
    steps = int(num_averaged)
    return slow.lerp(fast, 1 - min(decay, (1 + steps) / (10 + steps)))


# ---- both, as commands


def by_single(folder: Path, judged_by: str, seed: int, steps: int) -> Trained:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gan_vs_single",
        "--single",
        str(folder),
        "--extractor",
        judged_by,
        "--seed",
        str(seed),
        "--steps",
        str(steps),
    ]
    printed = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return Trained(**json.loads(printed.splitlines()[-1]))


def by_us(storage: Path, seed: int, steps: int) -> Trained:
    name = f"seed-{seed}"
    options = {"steps": steps, "run.seed": seed, "log.every": LOG_EVERY}
    options |= dict.fromkeys(("log.eval_every", "log.sample_every", "checkpoint.every"), steps)
    run = train("gan", "gan-demo", storage, name, options)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steady = [row["images_per_s"] for row in rows if row["step"] > WARM_UP and "critic_loss" in row]
    summary = json.loads((run / "summary.json").read_text())
    return Trained(statistics.harmonic_mean(steady), summary["metrics"])


# ---- the comparison


def row(pairs: list[tuple[Trained, Trained]], steps: int) -> str:
    """The row for BENCHMARKS.md, from (ours, theirs) of each round."""
    ratios = [ours.images_per_s / theirs.images_per_s for ours, theirs in pairs]
    ours, theirs = (
        f"{statistics.median(side.images_per_s for side in column):,.0f} images/s, {figures([side.quality for side in column])}"
        for column in zip(*pairs, strict=True)
    )
    floor = ", ".join(
        f"{name} {pairs[0][0].quality[f'heldout_{name}_baseline']:.{digits}f}"
        for name, digits in SHOWN.items()
    )
    workers = demo().parallel.workers
    name = f"train gan-demo, {workers} workers, {steps} steps (real pictures: {floor})"
    return f"| {name} | {ours} | one process, {workers} threads: {theirs} | {spread(ratios, 2)} |"


def figures(judged: list[dict[str, float]]) -> str:
    return ", ".join(
        f"{name} {spread([one[f'heldout_{name}'] for one in judged], digits)}"
        for name, digits in SHOWN.items()
    )


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--steps", type=int, default=350, help="generator steps")
    options.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--extractor", help=argparse.SUPPRESS)
    options.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.steps <= WARM_UP or given.steps % LOG_EVERY:
        raise ValueError(f"--steps is {given.steps}: use a multiple of {LOG_EVERY} above {WARM_UP}")
    if given.single:
        print(json.dumps(asdict(single(given.single, given.extractor, given.seed, given.steps))))
        return 0
    config, pairs = demo(), []
    with tempfile.TemporaryDirectory() as storage:
        dataset = images.prepare(config.data, storage, config.model.conditional)
        entry = extractor.prepare(config, dataset).extractor
        assert entry is not None
        folder, judged_by = Path(dataset.uri), entry["uri"]
        for seed in range(given.rounds):
            pairs.append(
                (
                    by_us(Path(storage), seed, given.steps),
                    by_single(folder, judged_by, seed, given.steps),
                )
            )
            for who, side in zip(("raykiln", "one process"), pairs[-1], strict=True):
                print(
                    f"round {seed}: {who} {side.images_per_s:,.0f} images/s, {figures([side.quality])}",
                    flush=True,
                )
    print(row(pairs, given.steps))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
