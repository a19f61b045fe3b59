"""Train a run on a Ray cluster: prepare its data, start its workers, write its summary."""

import os
import sys
import time
from contextlib import suppress
from typing import Any

import ray
import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster import cli, storage
from cluster.connect import connect
from train.config.sections import Config
from train.data.dataset import Dataset
from train.job import Job, work
from train.kinds import KINDS, Kind
from train.run import lineage, progress, records, report, summary, wandb_mirror
from train.run.folder import Run, open_run
from train.run.hooks import Hooks
from train.run.summary import Summary


class TrainingFailed(RuntimeError):
    """Training cannot continue, or workers failed more often than run.max_failures allows.

    The message is one sentence.
    """


def fit(
    config: Config,
    root: str,
    stem: str | None = None,
    callbacks: list[UserCallback] | None = None,
    quiet: bool = False,
    hooks: Hooks | None = None,
    kind: Kind[Any] | None = None,
) -> Summary:
    """Train the run that `config` describes, or resume it.

    Args:
        config: the resolved config.
        root: the storage, a folder or URI.
        stem: what an unnamed run's name begins with.
        callbacks: Ray Train callbacks, e.g. a search's.
        quiet: print no progress.
        hooks: are called by the workers.
        kind: of the model; by default the one in `KINDS` that the config names.

    Returns:
        The run's summary, also written as summary.json.

    Raises:
        ValueError: the run, the data or the config is invalid; nothing was started.
        TrainingFailed: the workers failed; the run resumes from its last checkpoint when it is
            started again.
    """
    root = storage.absolute(root)  # workers run in other directories, on other machines
    kind = kind or KINDS[config.kind]
    log = cli.no_log if quiet else cli.log
    check_environment(kind, config)
    with open_run(config, root, stem or config.kind) as run:
        state = f"resumes from step {run.start}" if run.start else "starts"
        log(f"run {run.name} {state}, in {run.uri}")
        if completed := _completed(config, run):
            log(
                f"it has completed its {config.steps} steps: nothing to do (use more --steps, or "
                "another --run.name)"
            )
            return completed
        private = connect()
        check_resources(config, private)
        dataset = _prepare(kind, config, run, root, log)
        begin = time.monotonic()
        shown = progress.Shown(kind.progress_metrics, kind.speed)
        try:
            with progress.watch(run.name, config.steps, shown, quiet) as feed:
                job = Job(kind, config, run, dataset, feed, hooks or Hooks())
                final = _train(job, callbacks or [], private)
        except TrainingFailed as failure:
            failed = _summary(config, run, dataset, begin, {})
            failed["failed"] = str(failure)
            with suppress(OSError):  # the disk may be full
                report.write(run.uri, failed, kind)
            raise
        done = _summary(config, run, dataset, begin, final)
        summary.write(run.uri, done)
        report.write(run.uri, done, kind)
        return done


def check_environment(kind: Kind[Any], config: Config) -> None:
    """Check what a run needs besides its data and a cluster.

    Raises:
        ValueError: W&B cannot be reached, or a package or file is missing.
    """
    wandb_mirror.check_wandb(config.log.wandb)
    kind.check_environment(config)


def check_resources(config: Config, private: bool) -> None:
    """Check that the workers fit into the cluster; Ray would wait for them forever.

    A cluster that is not private may still grow: then a line on stderr says that the run waits.

    Raises:
        ValueError: they do not fit into this machine.
    """
    parallel, available = config.parallel, ray.cluster_resources()
    cpus = parallel.workers * parallel.cpus_per_worker
    gpus = parallel.workers if parallel.gpu else 0
    hints = {"CPU": "a smaller parallel.cpus_per_worker", "GPU": "parallel.gpu false"}
    for resource, amount in {"CPU": cpus, "GPU": gpus}.items():
        if amount <= available.get(resource, 0):
            continue
        where = "this machine" if private else "the cluster"
        sentence = (
            f"parallel.workers {parallel.workers} need {amount:g} {resource}s, and {where} has "
            f"{available.get(resource, 0):g}"
        )
        if private:
            raise ValueError(f"{sentence}: use fewer workers, or {hints[resource]}")
        print(f"{sentence}: waiting for nodes to join", file=sys.stderr, flush=True)


def _prepare(kind: Kind[Any], config: Config, run: Run, root: str, log: cli.Log) -> Dataset:
    """Return the run's data set with what evaluation needs, and write its lineage."""
    begin = time.monotonic()
    dataset = kind.prepare(config, root)
    log(f"data: {dataset.uri} ({time.monotonic() - begin:.1f} s)")
    # Before workers start: an error on a worker would be retried run.max_failures times.
    kind.check(config, dataset)
    origin = lineage.check_dataset(run, dataset)
    dataset = kind.prepare_evaluation(config, dataset, log)
    if dataset.extractor is not None:
        origin = lineage.check_extractor(run, origin, dataset.extractor)
    lineage.write(run, origin)
    return dataset


def _summary(
    config: Config, run: Run, dataset: Dataset, begin: float, final: dict[str, float]
) -> Summary:
    """Return the summary of a run that has ended, or failed before its workers wrote anything."""
    starts = records.starts(run.uri)
    return {
        "run": run.name,
        "kind": config.kind,
        "steps": config.steps,
        "workers": config.parallel.workers,
        "seconds": round(time.monotonic() - begin, 1),
        "dataset": dataset.uri.rsplit("/", 1)[-1],
        "resumed_from": int(starts[-1]["step"]) if starts else run.start,
        "metrics": final,
    }


def _completed(config: Config, run: Run) -> Summary | None:
    """Return the summary of a run that has completed its steps and whose data set still exists."""
    completed = summary.read(run.uri) if run.start >= config.steps else None
    if completed is None or completed["steps"] != config.steps:
        return None
    origin = lineage.read(run.uri)
    return completed if origin and Dataset.find(origin["dataset"]["uri"]) else None


def _train(job: Job, callbacks: list[UserCallback], private: bool) -> dict[str, float]:
    """Run the job's workers; return the run's final metrics."""
    parallel, run = job.config.parallel, job.run
    if private:
        # Nobody reads the metrics of a cluster that ends with this command, and no cloud takes its
        # machine away: without both, the workers start two seconds earlier.
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # The controller looks at its workers this often; the default of 2 s would delay each report().
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    gpus = {"GPU": 1} if parallel.gpu else {}
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # may return a value since Ray 2.60; its annotation says None
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=parallel.workers,
            use_gpu=parallel.gpu,
            resources_per_worker={"CPU": parallel.cpus_per_worker, **gpus},
        ),
        run_config=ray.train.RunConfig(
            name="ray",  # Ray Train's own state; checkpoints are ours (train/run/checkpoint.py)
            storage_path=run.uri,
            failure_config=ray.train.FailureConfig(max_failures=job.config.run.max_failures),
            callbacks=callbacks,  # type: ignore[arg-type]  # annotated with Tune's callbacks
        ),
    )
    hint = f"start --run.name {run.name} again to resume from its newest checkpoint"
    try:
        # return_value is new in Ray 2.60 and not in its annotations yet.
        final: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        raise TrainingFailed(
            f"run {run.name} failed: {_cause(error)}; its checkpoints are in {run.uri}: {hint}"
        ) from error
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ray turns Ctrl-C into sys.exit(0), as if the run were complete.
        print(f"stopped: {hint}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt from stop
    if "halted" in final:
        raise TrainingFailed(
            f"run {run.name} failed: {final['halted']}; its checkpoints are in {run.uri}: {hint}"
        )
    return final


def _cause(error: Exception) -> str:
    """Return a worker's last line of output, without the traceback around it."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in failures.items():
        return f"worker {rank}: {str(failure).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1]
