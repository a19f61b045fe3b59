"""From a search space to the config of its best trial: Ray Tune over runs of Ray Train, losers stopped early.

A trial is a driver that waits for the run it started, so it reserves no CPU itself; a run takes its workers all at once
or waits. No trial can therefore hold a part of what it needs while it waits for the rest.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from cluster import storage
from cluster.connect import connect
from train import launch
from train.config import loader as configs
from train.config.sections import Config
from train.kinds import KINDS
from train.run import records
from tune import results
from tune import space as spaces
from tune.table import Progress

METRICS = {
    "gpt": "heldout_bits_per_byte",
    "gan": "heldout_frechet_distance",
}  # both: the smaller the better
DRIVER = {
    "node:__internal_head__": 0.001
}  # on the head, which outlives spot nodes; Tune wants some resource to be named
JUDGEMENTS = 8  # a trial's results; after 1, 2 and 4 of them the worse half is stopped


class SearchFailed(RuntimeError):
    """No trial came to a result; the message is one sentence."""


@dataclass(frozen=True)
class Plan:
    """What is to be searched, checked.

    Attributes:
        kind: gpt or gan.
        base: the nested values that every trial starts from, as given (not yet a config).
        space: what is drawn.
        num_samples: draws (of each combination of grids).
        name: the search's folder below searches/; its trials are runs <name>-00000, ...
        max_concurrent: trials at once; by default as many as the cluster's nodes hold.
    """

    kind: str
    base: dict[str, Any]
    space: spaces.Space
    num_samples: int
    name: str
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"--num-samples is {self.num_samples}: a search takes at least one")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(
                f"--max-concurrent is {self.max_concurrent}: a search runs at least one trial at a time"
            )
        if self.steps < 2:
            raise ValueError(
                f"steps is {self.steps}: a search takes at least two, the first to tell which trials go on"
            )
        self.config({}, run=f"{self.name}-00000")
        spaces.check(self.space, self.kind, self.base)

    def config(self, values: dict[str, Any], run: str | None = None) -> Config:
        """The config with `values` (dotted keys) drawn; as a trial's, named and judged often, where `run` is given."""
        drawn = configs.merge(self.base, configs.nested(values))
        if run is not None:
            drawn = configs.merge(
                drawn, configs.nested({"run.name": run, "log.eval_every": self.rung})
            )
        return configs.build(KINDS[self.kind].config, drawn, f"search {self.name}")

    @property
    def steps(self) -> int:
        return configs.build(KINDS[self.kind].config, self.base, f"search {self.name}").steps

    @property
    def rung(self) -> int:
        """Steps between a trial's judgements."""
        return max(1, self.steps // JUDGEMENTS)

    @property
    def metric(self) -> str:
        return METRICS[self.kind]

    def record(self) -> dict[str, Any]:
        """What must be the same for a search to be resumed, as JSON."""
        space = {
            key: {distribution.name: list(distribution.values)}
            for key, distribution in self.space.items()
        }
        return {
            "kind": self.kind,
            "config": self.config({}).model_dump(mode="json"),
            "space": space,
            "num_samples": self.num_samples,
        }


def search(plan: Plan, root: str) -> dict[str, Any]:
    """Runs (or goes on with) a search; its summary. Writes trials.csv and best.yaml into <root>/searches/<name>.

    Args:
        root: the storage, a folder or URI.

    Raises:
        ValueError: the search was begun with another plan, or no trial fits into this machine. Nothing was started.
        SearchFailed: every trial failed.
    """
    root = storage.absolute(root)  # trials run in other processes' working directories
    uri = storage.join(root, "searches", plan.name)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = (
        "1"  # Ctrl-C interrupts; Tune's handler would call what it has a result
    )
    _refuse_another_plan(plan, uri)
    launch.refuse_missing(plan.config({}))
    with _cluster() as private:
        num_trials = at_once(plan, ray.nodes(), private)
        # Once, before trials would race for it.
        launch.judged_by(plan.config({}), launch.prepare(plan.config({}), root))
        storage.write_json(storage.join(uri, "search.json"), plan.record())
        tuner = _tuner(plan, root, uri, num_trials)
        try:
            grid = tuner.fit()
        finally:
            Progress.stop()
        return _conclude(plan, grid, root, uri)


def at_once(plan: Plan, nodes: list[dict[str, Any]], private: bool) -> int:
    """How many of the plan's trials run side by side on `nodes` (`ray.nodes()`).

    Only a machine is what it is: a cluster may still grow, so there a trial that does not fit yet waits, aloud.

    Raises:
        ValueError: not one fits into a private cluster.
    """
    fit = fitting(plan.config({}), nodes)
    if private and fit == 0:
        raise ValueError(
            f"{_misfit(plan.config({}), nodes)}: use fewer workers, or a larger cluster"
        )
    if private:
        return min(plan.max_concurrent or fit, fit)
    if fit == 0:
        print(f"{_misfit(plan.config({}), nodes)}: waiting for nodes to join", flush=True)
    return plan.max_concurrent or max(fit, 1)


def fitting(config: Config, nodes: list[dict[str, Any]]) -> int:
    """How many of a config's runs the nodes (`ray.nodes()`) hold side by side; a worker is never split over two nodes."""
    parallel = config.parallel
    slots = 0
    for node in nodes:
        if node["Alive"]:
            fit = node["Resources"].get("CPU", 0) / parallel.cpus_per_worker
            slots += int(min(fit, node["Resources"].get("GPU", 0)) if parallel.gpu else fit)
    return slots // parallel.workers


def run_trial(values: dict[str, Any], plan: Plan, root: str) -> None:
    """What Tune calls for each trial: a run of Ray Train that tells Tune its results."""
    name = ray.tune.get_context().get_trial_name()
    if results.summary(
        root, name
    ):  # complete in a search that was killed before Tune wrote that down
        # Each judgement at its own step: the last one alone would be held against other trials' early ones.
        for row in records.metrics(storage.join(root, "runs", name)):
            if plan.metric in row:
                ray.tune.report(row)
        return
    launch.fit(plan.config(values, run=name), root, callbacks=[TuneReportCallback()], quiet=True)


def _misfit(config: Config, nodes: list[dict[str, Any]]) -> str:
    parallel = config.parallel
    have = {
        kind: sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"])
        for kind in ("CPU", "GPU")
    }
    gpus = f" and {parallel.workers} GPUs" if parallel.gpu else ""
    return (
        f"one trial needs {parallel.workers * parallel.cpus_per_worker:g} CPUs{gpus} (parallel.workers {parallel.workers}), and the cluster has "
        f"{have['CPU']:g} CPUs and {have['GPU']:g} GPUs"
    )


def _refuse_another_plan(plan: Plan, uri: str) -> None:
    path = storage.join(uri, "search.json")
    if not storage.exists(path):
        return
    before, now = storage.read_json(path), plan.record()
    for part in now:
        if before[part] != now[part]:
            raise ValueError(
                f"search {plan.name} was begun with another {part}: give it the old one to go on, or use another --name"
            )


# ---------------------------------------------------------------- the cluster


@contextmanager
def _cluster() -> Iterator[bool]:
    """A cluster in which Train can free the workers of a trial that was stopped; True where it is this search's own.

    Its cleaner asks the dashboard whether the trial still lives, and finds the dashboard through the address file below
    RAY_TMPDIR, without which it would give up on a machine with two Ray clusters; the search would then hang on workers
    that nobody uses.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        connect()
        if not ray._private.worker.get_dashboard_url():
            raise ValueError(
                "the cluster at RAY_ADDRESS has no dashboard, which frees the workers of stopped trials: start one with `python -m cluster up`, or unset RAY_ADDRESS"
            )
        yield False
        return
    # Not below TMPDIR: Ray's sockets lie here and a socket's path is limited to 107 bytes.
    folder = tempfile.mkdtemp(prefix="kiln-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    try:
        connect(include_dashboard=True, _temp_dir=f"{folder}/ray")
        Path(folder, "ray", "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        yield True
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- Ray Tune


def _tuner(plan: Plan, root: str, uri: str, num_trials: int) -> ray.tune.Tuner:
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, plan=plan, root=root), DRIVER
    )
    if ray.tune.Tuner.can_restore(uri):
        ignored = (
            ""
            if plan.max_concurrent is None
            else " (--max-concurrent counts only where a search begins)"
        )
        print(
            f"search {plan.name} goes on in {uri}, as many trials at once as when it began{ignored}",
            flush=True,
        )
        return ray.tune.Tuner.restore(uri, trainable, resume_unfinished=True, resume_errored=True)
    print(
        f"search {plan.name}: {spaces.size(plan.space, plan.num_samples)} trials, {num_trials} at once, in {uri}",
        flush=True,
    )
    return ray.tune.Tuner(
        trainable,
        param_space=spaces.domains(plan.space),
        tune_config=ray.tune.TuneConfig(
            metric=plan.metric,
            mode="min",
            num_samples=plan.num_samples,
            search_alg=BasicVariantGenerator(
                max_concurrent=num_trials, random_state=plan.config({}).run.seed
            ),
            scheduler=_halving(plan),
            trial_name_creator=run_name,
            trial_dirname_creator=run_name,
        ),
        run_config=ray.tune.RunConfig(
            name=plan.name,
            storage_path=storage.join(root, "searches"),
            callbacks=[Progress(plan.metric, list(plan.space), plan.steps)],
            verbose=0,
        ),
    )


def _halving(plan: Plan) -> ASHAScheduler:
    """Asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning").

    No trial is stopped at its last result: its run still has its checkpoint and summary to write. So the scheduler does
    not end trials at max_t, and max_t is one short, which keeps a rung off the last step.
    """
    return ASHAScheduler(
        time_attr="step",
        max_t=plan.steps - 1,
        grace_period=plan.rung,
        reduction_factor=2,
        stop_last_trials=False,
    )


def run_name(trial: Trial) -> str:
    """The run of a trial: the search's name and the trial's number."""
    return f"{trial.experiment_dir_name}-{trial.trial_id.rsplit('_', 1)[-1]}"


def _conclude(plan: Plan, grid: ray.tune.ResultGrid, root: str, uri: str) -> dict[str, Any]:
    """Writes down what the trials came to; the search's summary."""
    trials = results.outcomes(grid, plan.metric, root)
    storage.write_bytes(
        storage.join(uri, "trials.csv"),
        results.to_csv(trials, plan.metric, list(plan.space)).encode(),
    )
    best = results.best(trials)
    if best is None:
        cause = (
            str(grid.errors[0]).strip().splitlines()[-1] if grid.errors else "no trial was judged"
        )
        raise SearchFailed(
            f"search {plan.name} has no result: {cause}; its trials are in {uri}/trials.csv"
        )
    header = f"# The best of search {plan.name}: run {best.run}, {plan.metric} {best.score:.4f} at step {best.step}.\n"
    storage.write_bytes(
        storage.join(uri, "best.yaml"), (header + configs.dump(plan.config(best.values))).encode()
    )
    failed = sum(trial.status == "failed" for trial in trials)
    return {
        "search": plan.name,
        "uri": uri,
        "trials": len(trials),
        "failed": failed,
        "metric": plan.metric,
        "best": asdict(best),
    }
