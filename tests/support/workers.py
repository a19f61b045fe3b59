"""Training loops in processes without Ray, for tests of many short runs."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from cluster import cli, storage
from cluster.machine import free_port
from train.config.sections import Config
from train.data.dataset import Dataset
from train.kinds import KINDS, Kind
from train.parallel import backends
from train.run.checkpoint import Checkpointer
from train.run.recorder import NullRecorder, Recorder
from train.run.worker import Worker


class LocalWorker(Worker[Any]):
    """A worker without Ray."""

    def report(self, values: dict[str, float]) -> None:
        """Do nothing."""


class MemoryRecorder(NullRecorder):
    """Keep what a run records."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.texts: list[str] = []
        self.alarms: list[tuple[int, str, str]] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def text(self, step: int, name: str, content: str) -> None:
        self.texts.append(content)

    def alarm(self, step: int, kind: str, message: str) -> None:
        self.alarms.append((step, kind, message))


def spawn(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """Run `function(rank, *args)` in `world_size` processes that form a gloo group.

    They are forked from a server that has imported the training loops, which takes most of the
    time of a short run.
    """
    multiprocessing.set_forkserver_preload(["tests.support.loops"])
    environment = {
        **os.environ,  # the server keeps the one that it was started with
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    start_processes(
        _join,
        (world_size, environment, function, args),
        nprocs=world_size,
        start_method="forkserver",
    )


def _join(
    rank: int,
    world_size: int,
    environment: dict[str, str],
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ |= {**environment, "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()


def prepare(config: Config, root: str | Path) -> Dataset:
    """Return the prepared data set of a config, with what evaluation needs."""
    kind = KINDS[config.kind]
    return kind.prepare_evaluation(config, kind.prepare(config, str(root)), cli.no_log)


def run(config: Config, dataset: Dataset, run_uri: str | Path) -> MemoryRecorder:
    """Train as one worker, resuming from the newest checkpoint; return what was recorded."""
    recorder = MemoryRecorder()
    train(config, dataset, run_uri, recorder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        storage.write_json(storage.join(run_uri, "rows.json"), recorder.rows)
    return recorder


def train(
    config: Config,
    dataset: Dataset,
    run_uri: str | Path,
    recorder: Recorder,
    kind: Kind[Any] | None = None,
) -> dict[str, float]:
    """Train as one worker, resuming from the newest checkpoint; return the final metrics."""
    kind = kind or KINDS[config.kind]
    strategy = backends.build(config)
    checkpoints = Checkpointer(
        str(run_uri),
        config.model_dump(),
        strategy.name,
        config.checkpoint.keep_last,
        config.checkpoint.keep_best,
    )
    dataset = kind.prepare_evaluation(config, dataset, cli.no_log)
    worker = LocalWorker(config, strategy, checkpoints, recorder, dataset)
    return kind.train(worker, checkpoints.load())
