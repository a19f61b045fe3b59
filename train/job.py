"""What each Ray Train worker runs."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray.train.torch
import torch
from ray.actor import ActorHandle

from train.config.sections import Config
from train.data.dataset import Dataset
from train.kinds import Kind
from train.parallel import backends
from train.parallel.state import Halt, State
from train.parallel.strategy import Strategy
from train.run.checkpoint import Checkpointer
from train.run.folder import Run
from train.run.hooks import Hooks
from train.run.progress import DriverHandler, Feed
from train.run.recorder import NullRecorder, Recorder, RunRecorder
from train.run.wandb_mirror import Options
from train.run.worker import Worker


@dataclass(frozen=True)
class Job:
    """What the driver sends to the workers of a run."""

    kind: Kind[Any]
    config: Config
    run: Run
    dataset: Dataset
    feed: "ActorHandle[Feed]"
    """The driver's (see `train.run.progress`)."""
    hooks: Hooks


def work(config: dict[str, Job]) -> dict[str, float] | dict[str, str]:
    """Run the training loop on this worker; Ray Train's `train_loop_per_worker`.

    Args:
        config: {"job": Job}.

    Returns:
        The run's final metrics, or {"halted": message}: Ray Train would restart the workers for an
        exception.
    """
    job = config["job"]
    torch.set_num_threads(max(1, int(job.config.parallel.cpus_per_worker)))
    device = ray.train.torch.get_device() if job.config.parallel.gpu else None
    strategy = backends.build(job.config, device)
    hooks = job.hooks.on_worker(job.run.uri, strategy.rank)
    checkpoints = Checkpointer(
        job.run.uri,
        {"kind": job.config.kind, **job.config.model_dump()},
        strategy.name,
        job.config.checkpoint.keep_last,
        job.config.checkpoint.keep_best,
        job.run.token,
        hooks,
    )
    logging.getLogger("train").addHandler(DriverHandler(job.feed))
    try:
        return _train(job, strategy, checkpoints, hooks)
    except Halt as halt:
        with suppress(Halt):
            checkpoints.join()  # the one in flight is older than the error
        return {"halted": str(halt)}


def _train(
    job: Job, strategy: Strategy, checkpoints: Checkpointer, hooks: Hooks
) -> dict[str, float]:
    resumed = checkpoints.load()
    if resumed is None and job.run.start:
        raise Halt(
            f"the workers cannot see its checkpoint of step {job.run.start}: put --storage where "
            "every machine can read it"
        )
    config = job.config
    if resumed is not None:
        config, state = hooks.restored(config, resumed[1])
        resumed = resumed[0], state
    recorder = _recorder(job, strategy, resumed)
    try:
        worker = Worker(config, strategy, checkpoints, recorder, job.dataset, hooks)
        return job.kind.train(worker, resumed)
    finally:
        recorder.close()


def _recorder(job: Job, strategy: Strategy, resumed: tuple[int, State] | None) -> Recorder:
    """Return what records on rank 0, and a `NullRecorder` elsewhere.

    Raises:
        Halt: rank 0 cannot write to the run's folder; raised on every worker.
    """
    recorder: Recorder = NullRecorder()
    problem = None
    if strategy.rank == 0:
        log = job.config.log
        wandb: Options | None = None
        if log.wandb != "off":
            wandb = {
                "mode": log.wandb,
                "project": log.wandb_project,
                "name": job.run.name,
                "config": job.config.model_dump(),
            }
        try:
            start = resumed[0] if resumed else 0
            recorder = RunRecorder(job.run.uri, start, job.feed, wandb)
        except OSError as error:
            problem = error
    (failed,) = strategy.sum([float(problem is not None)])
    if failed:
        raise Halt(f"nothing can be written to {job.run.uri} ({problem})")
    return recorder
