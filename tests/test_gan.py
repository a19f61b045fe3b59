"""GAN training is the same at any number of workers, resumes to the bit, and runs on Ray."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import free_port
from PIL import Image
from torch import Tensor

from models import storage
from train import gan, images, metrics
from train.checkpoint import Checkpointer, complete, newest
from train.config import GanConfig, load
from train.gan import Gan, shape
from train.launch import Worker, fit
from train.strategy import Ddp

STEPS = 3
SMALL = {
    "run.seed": 5,
    "batch.global_size": 16,
    "batch.micro_size": 16,
    "data.size": 28,
    "data.random_crop": True,
    "model.width": 4,
    "model.latent_dim": 8,
    "model.ema_decay": 0.5,
    "gan.critic_steps": 2,
    "optim.lr": 1e-3,
    "steps": STEPS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "conditional": {"model.conditional": True},
    "accumulated": {"batch.micro_size": 4},
    "colour": {"data.size": 32, "data.channels": 3},
}


def config_of(variant: str, source: Path, **more: Any) -> GanConfig:
    folder = source / ("colour" if variant == "colour" else "grey")
    config = load("gan", None, {**SMALL, "data.source": [str(folder)], **VARIANTS[variant], **more})
    assert isinstance(config, GanConfig)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures in two classes, grey and in colour."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for kind, channels in (("grey", 1), ("colour", 3)):
        for index in range(40):
            folder = root / kind / ("bright" if index % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(128 * (index % 2), 128 + 127 * (index % 2), (40, 36, channels), np.uint8)
            Image.fromarray(pixels.squeeze()).save(folder / f"{index}.png")
    return root


def parameters_after_training(config: GanConfig, dataset: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter and the averaged generator after STEPS generator steps, on this process's share of the work."""
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    try:
        pictures = images.Pictures(Path(dataset), "train", config.data.size, config.data.horizontal_flip)
        trained = Gan(config, shape(config, pictures.meta), Ddp())
        for step in range(STEPS):
            for turn in range(config.gan.critic_steps):
                trained.update_critic(trained.critic_batches(step * config.gan.critic_steps + turn, pictures))
            trained.update_generator(trained.generator_batches(step))
            trained.update_average(step)
        state = trained.state()
        return {f"{part}.{name}": value.clone() for part in ("generator", "generator_ema", "critic") for name, value in state[part].items()}
    finally:
        torch.set_default_dtype(torch.float32)


def worker_process(rank: int, port: int, source: Path, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for variant in VARIANTS:
        config = config_of(variant, source, **{"parallel.workers": 2})
        dataset = images.prepare(config.data, str(folder))
        for dtype in (torch.float32, torch.float64):
            found[f"{variant} {dtype}"] = parameters_after_training(config, dataset, dtype)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two DDP processes holds after training every variant in both precisions."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker_process, (free_port(), source, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_workers_end_where_one_does(
    variant: str, dtype: torch.dtype, tolerance: float, source: Path, two_workers: list[dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config = config_of(variant, source)
    alone = parameters_after_training(config, images.prepare(config.data, str(tmp_path)), dtype)
    before = Gan(config, shape(config, {"classes": ["a", "b"]}), Ddp()).state()
    moved = max(float((alone[f"{part}.{name}"] - value).abs().max()) for part in ("generator", "critic") for name, value in before[part].items())
    assert moved > 1e-3, "nothing was learned, so nothing was compared"
    for rank, held in enumerate(two_workers):
        for name, value in alone.items():
            difference = float((held[f"{variant} {dtype}"][name] - value).abs().max())
            assert difference < tolerance, (rank, name, difference)
