"""Training processes without Ray: the loops as they run on its workers, for tests that need many short runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster import storage
from cluster.machine import free_port
from train import launch
from train.config import sections as configs
from train.gan import loop as gan
from train.gpt import loop as gpt
from train.parallel import backends
from train.run import recorder as metrics
from train.run.checkpoint import Checkpointer
from train.run.worker import Worker


class Alone(Worker):
    """A worker without Ray: its reports are kept."""

    def report(self, values: dict[str, float]) -> None:
        self.reports = [*getattr(self, "reports", []), values]


class Kept(metrics.Silent):
    """Keeps a run's figures."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.texts: list[str] = []
        self.alarms: list[tuple[int, str, str]] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def text(self, step: int, tag: str, content: str) -> None:
        self.texts.append(content)

    def alarm(self, step: int, kind: str, sentence: str) -> None:
        self.alarms.append((step, kind, sentence))


def spawn(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """`function(rank, *args)` in `world_size` processes that form a gloo group."""
    mp.spawn(_join, (world_size, free_port(), function, args), nprocs=world_size)


def _join(
    rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()


def run(config: configs.Config, dataset: str, run_uri: str | Path) -> Kept:
    """Trains on this process's share of the work, going on from the run's newest checkpoint; what was recorded."""
    spread = backends.build(config)
    checkpoints = Checkpointer(
        str(run_uri),
        config.model_dump(),
        spread.name,
        config.checkpoint.keep_last,
        config.checkpoint.keep_best,
    )
    recorder = Kept()
    loop = gpt.train if isinstance(config, configs.GptConfig) else gan.train
    judge = launch.judged_by(config, dataset, lambda line: None)
    loop(Alone(config, spread, checkpoints, recorder, dataset, judge), checkpoints.load())
    if spread.rank == 0:
        storage.write_json(storage.join(run_uri, "rows.json"), recorder.rows)
    return recorder
