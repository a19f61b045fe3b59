"""From a config to a finished run: data prepared, workers started by Ray Train, the summary written."""

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cluster import storage
from cluster.connect import connect
from train.config.sections import KINDS, Config, GanConfig, GptConfig, build
from train.parallel import backends
from train.parallel.state import Halt, State
from train.parallel.strategy import Strategy
from train.run import recorder as metrics
from train.run import report
from train.run import wandb_mirror as mirror
from train.run.checkpoint import Checkpointer
from train.run.folder import Run, open_run
from train.run.worker import Worker
from train.verify import faults


class TrainingFailed(RuntimeError):
    """Training can't go on, or the workers failed more often than run.max_failures allows; the message is one sentence."""


def fit(
    config: Config,
    root: str,
    stem: str | None = None,
    callbacks: list[Any] | None = None,
    quiet: bool = False,
    plan: list[faults.Fault] | None = None,
    sabotage: str | None = None,
) -> dict[str, Any]:
    """Trains (or goes on training) the run that `config` describes; returns its summary, also written as summary.json.

    Args:
        config: the resolved config.
        root: the storage, a folder or URI.
        stem: what an unnamed run's name begins with.
        callbacks: Ray Train callbacks, e.g. a search's.
        quiet: no progress on the terminal.
        plan: faults on purpose.
        sabotage: what each restore gets wrong on purpose, one of `faults.SABOTAGES`.

    Raises:
        ValueError: the run, the data or the plan is wrong; nothing was started.
        TrainingFailed: the workers died; the run goes on from its last checkpoint when it is started again.
    """
    root = storage.absolute(root)  # workers run in other folders, on other machines
    refuse_missing(config)
    with open_run(config, root, stem or config.kind) as run:
        say = (lambda *_: None) if quiet else print
        say(
            f"run {run.name}: "
            + (f"goes on from step {run.start}" if run.start else "starts")
            + f", in {run.uri}"
        )
        if summary := _complete(config, run):
            say(
                f"it has all its {config.steps} steps: nothing to do (more --steps, or another --run.name)"
            )
            return summary
        refuse_impossible(config, connect())
        begun = time.monotonic()
        dataset = prepare(config, root)
        say(f"data: {dataset} ({time.monotonic() - begun:.1f} s)")
        _refuse_misfit(config, dataset)
        lineage = _lineage(run, dataset)
        judge = judged_by(config, dataset, say)
        _describe(run, lineage, judge)
        begun = time.monotonic()
        try:
            with metrics.watch(run.name, config.steps, _SPEED[config.kind], quiet) as feed:
                final = _train(
                    config, run, dataset, judge, feed, callbacks or [], plan or [], sabotage
                )
        except TrainingFailed as failure:
            with suppress(OSError):  # it may be the disk that is full
                report.write(
                    run.uri, _summary(config, run, dataset, begun, {}) | {"failed": str(failure)}
                )
            raise
        summary = _summary(config, run, dataset, begun, final)
        storage.write_json(storage.join(run.uri, "summary.json"), summary)
        report.write(run.uri, summary)
        return summary


def _summary(
    config: Config, run: Run, dataset: str, begun: float, final: dict[str, Any]
) -> dict[str, Any]:
    """What there is to say of a run at its end, or where it failed: then perhaps before its workers had written a line."""
    starts = metrics.starts(run.uri)
    return {
        "run": run.name,
        "kind": config.kind,
        "steps": config.steps,
        "workers": config.parallel.workers,
        "seconds": round(time.monotonic() - begun, 1),
        "dataset": dataset.rsplit("/", 1)[-1],
        "resumed_from": int(starts[-1]["step"]) if starts else run.start,
        "metrics": final,
    }


def _complete(config: Config, run: Run) -> dict[str, Any] | None:
    """The summary of a run that is at its end with its data still there, so that nothing is left to do."""
    if run.start < config.steps or not storage.exists(storage.join(run.uri, "summary.json")):
        return None
    summary = storage.read_json(storage.join(run.uri, "summary.json"))
    dataset = storage.read_json(storage.join(run.uri, "lineage.json"))["dataset"]["uri"]
    return (
        summary
        if summary["steps"] == config.steps
        and storage.exists(storage.join(dataset, "dataset.json"))
        else None
    )


_SPEED = {"gpt": "tokens_per_s", "gan": "images_per_s"}


def prepare(config: Config, root: str) -> str:
    """The URI of the run's data set, prepared if it is not there yet."""
    if isinstance(config, GptConfig):
        from train.data import text

        return text.prepare(config.data, root)
    from train.data import images

    return images.prepare(config.data, root, config.model.conditional)


def refuse_missing(config: Config) -> None:
    """What a run needs beside its data and a cluster: a way to W&B, Inception's weights."""
    mirror.check_wandb(config.log.wandb)
    if isinstance(config, GanConfig) and config.quality.inception is not None:
        from train.gan import quality

        quality.inception(
            config.quality.inception, "cpu"
        )  # the workers load it late, at the first judgement


def refuse_impossible(config: Config, private: bool) -> None:
    """Ray would wait for ever for what the machine does not have; a real cluster may still grow, so there it waits aloud."""
    parallel, have = config.parallel, ray.cluster_resources()
    needs = {
        "CPU": parallel.workers * parallel.cpus_per_worker,
        "GPU": parallel.workers if parallel.gpu else 0,
    }
    for kind, amount in needs.items():
        if amount <= have.get(kind, 0):
            continue
        where = "this machine" if private else "the cluster"
        sentence = f"parallel.workers {parallel.workers} need {amount:g} {kind}s, and {where} has {have.get(kind, 0):g}"
        if private:
            raise ValueError(
                f"{sentence}: use fewer workers"
                + (
                    ", or parallel.gpu false"
                    if kind == "GPU"
                    else ", or a smaller parallel.cpus_per_worker"
                )
            )
        print(f"{sentence}: waiting for nodes to join", flush=True)


def judged_by(config: Config, dataset: str, say: Callable[..., None] = print) -> str:
    """The URI of what a GAN's pictures are judged by, trained if it is not there yet."""
    if isinstance(config, GptConfig):
        return ""
    from train.gan import extractor

    return extractor.prepare(config, dataset, say)


def _lineage(run: Run, dataset: str) -> dict[str, Any]:
    """What a bundle will tell of where it is from: the data set and the commit.

    Raises:
        ValueError: the run goes on, and its data are not those that it was begun with.
    """
    place = storage.join(run.uri, "lineage.json")
    facts = storage.read_json(storage.join(dataset, "dataset.json"))
    if not run.start or not storage.exists(place):
        return {
            "dataset": {"name": facts["name"], "fingerprint": facts["fingerprint"], "uri": dataset},
            "commit": _commit(),
        }
    lineage = storage.read_json(place)
    before = lineage["dataset"]["fingerprint"]
    if before != facts["fingerprint"]:
        raise ValueError(
            f"run {run.name} was begun on data {before}, and data.source now gives {facts['fingerprint']}: "
            "its files, or how they are prepared, have changed; restore them, or use another --run.name"
        )
    return lineage


def _describe(run: Run, lineage: dict[str, Any], judge: str) -> None:
    """Writes the lineage down, with what judges a GAN's pictures.

    Raises:
        ValueError: the run goes on, and its pictures were judged by something else.
    """
    if judge:
        from train.gan import extractor

        before, now = lineage.get("extractor"), extractor.facts(judge)
        if before is not None and before["sha256"] != now["sha256"]:
            raise ValueError(
                f"run {run.name} was judged by {before['uri']}, and now there is {judge}, whose figures don't compare with those: "
                "restore that file, or use another --run.name"
            )
        lineage = lineage | {"extractor": now}
    storage.write_json(storage.join(run.uri, "lineage.json"), lineage)


def _commit() -> str | None:
    """The checkout's commit; None where this is no checkout, as in a submitted job's copy."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run(
        [git, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return done.stdout.strip() or None


def _refuse_misfit(config: Config, dataset: str) -> None:
    """What a worker would stumble over, said here: on a worker it would cost its start, and the start of those that replace it."""
    if isinstance(config, GptConfig):
        from train.gpt import loop as gpt

        gpt.check(config, storage.read_json(storage.join(dataset, "dataset.json")))


def _train(
    config: Config,
    run: Run,
    dataset: str,
    judge: str,
    feed: Any,
    callbacks: list[Any],
    plan: list[faults.Fault],
    sabotage: str | None,
) -> dict[str, Any]:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    parallel = config.parallel
    # The controller looks at its workers this often; the default of 2 s would be the pace of every report().
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    payload = {
        "kind": config.kind,
        "config": config.model_dump(),
        "run": run.uri,
        "start": run.start,
        "token": run.token,
        "dataset": dataset,
        "extractor": judge,
        "feed": feed,
        "faults": [asdict(fault) for fault in plan],
        "sabotage": sabotage,
    }
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # may return a value since Ray 2.60; its annotation says None
        train_loop_config=payload,
        scaling_config=ray.train.ScalingConfig(
            num_workers=parallel.workers,
            use_gpu=parallel.gpu,
            resources_per_worker={
                "CPU": parallel.cpus_per_worker,
                **({"GPU": 1} if parallel.gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name="ray",  # Ray Train's own state; checkpoints are ours (train/run/checkpoint.py)
            storage_path=run.uri,
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            callbacks=callbacks,
        ),
    )
    go_on = f"--run.name {run.name} goes on from its newest checkpoint"
    try:
        final = trainer.fit().return_value  # type: ignore[attr-defined]  # new in Ray 2.60, not in its annotations yet
    except TrainingFailedError as error:
        raise TrainingFailed(
            f"run {run.name} failed: {_cause(error)}; what it has saved is in {run.uri}, and {go_on}"
        ) from error
    except (
        KeyboardInterrupt,
        SystemExit,
    ) as stop:  # Ray makes sys.exit(0) of Ctrl-C, as if the run were complete
        print(f"stopped: {go_on}", flush=True)
        raise KeyboardInterrupt from stop
    if "halted" in final:
        raise TrainingFailed(
            f"run {run.name} failed: {final['halted']}; what it has saved is in {run.uri}, and {go_on}"
        )
    return final


def _cause(error: Exception) -> str:
    """The workers' own last line, without the traceback around it."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in failures.items():
        return f"worker {rank}: {str(failure).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1]


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs: sets the stage, then the loop of its kind. Rank 0's result is the run's."""
    config = build(KINDS[payload["kind"]], payload["config"], "run.yaml")
    torch.set_num_threads(max(1, int(config.parallel.cpus_per_worker)))
    spread = backends.build(config, ray.train.torch.get_device() if config.parallel.gpu else None)
    reached = faults.build(payload["run"], spread.rank, payload["faults"])
    checkpoints = Checkpointer(
        payload["run"],
        {"kind": config.kind, **config.model_dump()},
        spread.name,
        config.checkpoint.keep_last,
        config.checkpoint.keep_best,
        payload["token"],
        reached,
    )
    logging.getLogger("train").addHandler(metrics.ToDriver(payload["feed"]))
    loop = _loop(payload["kind"])
    try:
        start = checkpoints.load()
        if start is None and payload["start"]:
            raise Halt(
                f"its checkpoint of step {payload['start']} can't be seen from the workers: put --storage where every machine sees it"
            )
        if start is not None and payload["sabotage"]:
            config, state = faults.sabotage(payload["sabotage"], config, start[1])
            start = start[0], state
        recorder = _recorder(payload, spread, start)
        try:
            return loop(
                Worker(
                    config,
                    spread,
                    checkpoints,
                    recorder,
                    payload["dataset"],
                    payload["extractor"],
                    reached,
                ),
                start,
            )
        finally:
            recorder.close()
    except Halt as sentence:
        with suppress(Halt):
            checkpoints.join()  # the one in flight is of before
        return {"halted": str(sentence)}  # Ray Train would start the workers again for an exception


def _recorder(
    payload: dict[str, Any], spread: Strategy, start: tuple[int, State] | None
) -> metrics.Silent:
    """What records on rank 0, a silent one elsewhere.

    Raises:
        Halt: rank 0 can't write to the run's folder: on every worker alike.
    """
    recorder, problem = metrics.Silent(), None
    if spread.rank == 0:
        log = payload["config"]["log"]
        name = payload["run"].rsplit("/", 1)[-1]
        copy = {
            "mode": log["wandb"],
            "project": log["wandb_project"],
            "name": name,
            "config": payload["config"],
        }
        try:
            recorder = metrics.Recorder(
                payload["run"],
                start[0] if start else 0,
                payload["feed"],
                copy if log["wandb"] != "off" else None,
            )
        except OSError as error:
            problem = error
    if spread.sum([float(problem is not None)])[0]:
        raise Halt(f"nothing can be written to {payload['run']} ({problem})")
    return recorder


def _loop(kind: str) -> Callable[..., dict[str, Any]]:
    if kind == "gpt":
        from train.gpt import loop as gpt

        return gpt.train
    from train.gan import loop as gan

    return gan.train
