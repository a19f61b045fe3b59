"""Run a search: Ray Tune over Ray Train runs, with early stopping.

A trial's driver only waits for the run that it started, so it reserves no CPU. A run gets all its
workers at once or waits, so no trial holds some of its workers while it waits for the others.
"""

import os

import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from cluster import storage
from train import launch
from train.config.sections import Values
from train.kinds import KINDS
from train.run import records, summary
from tune import resources, results
from tune import space as spaces
from tune.plan import Plan
from tune.results import Summary
from tune.table import Progress

# Tune requires some resource per driver. The head node outlives spot nodes.
DRIVER_RESOURCES = {"node:__internal_head__": 0.001}


class SearchFailed(RuntimeError):
    """No trial has a result; the message is one sentence."""


def search(plan: Plan, root: str) -> Summary:
    """Run or resume a search; write trials.csv and best.yaml into <root>/searches/<name>.

    Args:
        plan: what to search.
        root: the storage, a folder or URI.

    Raises:
        ValueError: the search was started with another plan, or no trial fits into this machine.
            Nothing was started.
        SearchFailed: every trial failed.
    """
    root = storage.absolute(root)  # trials run in the working directories of other processes
    uri = storage.join(root, "searches", plan.name)
    # Tune's own SIGINT handler would end the search as if it were complete.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    _check_same_plan(plan, uri)
    config = plan.config()
    kind = KINDS[plan.kind]
    launch.check_environment(kind, config)
    with resources.search_cluster() as private:
        num_concurrent = resources.concurrent_trials(plan, ray.nodes(), private)
        # Prepared once here; trials would each prepare it at the same time.
        kind.prepare_evaluation(config, kind.prepare(config, root), print)
        storage.write_json(storage.join(uri, "search.json"), plan.record())
        tuner = _tuner(plan, root, uri, num_concurrent)
        try:
            result_grid = tuner.fit()
        finally:
            Progress.stop()
        return _write_results(plan, result_grid, root, uri)


def run_trial(values: Values, plan: Plan, root: str) -> None:
    """Train a trial's run and report its metrics to Tune, which calls this function.

    Args:
        values: drawn from the space, by dotted key.
        plan: the search's.
        root: the storage.
    """
    run = ray.tune.get_context().get_trial_name()
    # A run that was completed just before the search was killed, so Tune did not record it.
    uri = storage.join(root, "runs", run)
    if summary.read(uri):
        # The scheduler compares trials at equal steps, so each evaluation is reported, not only
        # the last.
        for row in records.metrics(uri):
            if plan.metric in row:
                ray.tune.report(row)
        return
    config = plan.trial_config(run, values)
    launch.fit(config, root, callbacks=[TuneReportCallback()], quiet=True)


def scheduler(plan: Plan) -> ASHAScheduler:
    """Return the scheduler that stops the worse half of the trials at each rung.

    ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"). No trial is
    stopped at its last step, because its run still has to write its checkpoint and summary:
    `stop_last_trials` is off, and `max_t` is one less than the steps, so that no rung falls on the
    last step.
    """
    return ASHAScheduler(
        time_attr="step",
        max_t=plan.steps - 1,
        grace_period=plan.rung,
        reduction_factor=2,
        stop_last_trials=False,
    )


def trial_name(trial: Trial) -> str:
    """Return the name of a trial and its run: the search's name and the trial's number."""
    return f"{trial.experiment_dir_name}-{trial.trial_id.rsplit('_', 1)[-1]}"


def _check_same_plan(plan: Plan, uri: str) -> None:
    path = storage.join(uri, "search.json")
    if not storage.exists(path):
        return
    before, now = storage.read_json(path), plan.record()
    for part in now:
        if before[part] != now[part]:
            raise ValueError(
                f"search {plan.name} was started with another {part}: resume it with the same "
                f"{part}, or use another --name"
            )


def _tuner(plan: Plan, root: str, uri: str, num_concurrent: int) -> ray.tune.Tuner:
    """Return a new search's tuner, or one restored from `uri`."""
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, plan=plan, root=root), DRIVER_RESOURCES
    )
    if ray.tune.Tuner.can_restore(uri):
        _print_resumed(plan, uri)
        return ray.tune.Tuner.restore(uri, trainable, resume_unfinished=True, resume_errored=True)
    print(
        f"search {plan.name}: {plan.num_trials} trials, {num_concurrent} at once, in {uri}",
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
                max_concurrent=num_concurrent, random_state=plan.config().run.seed
            ),
            scheduler=scheduler(plan),
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=plan.name,
            storage_path=storage.join(root, "searches"),
            callbacks=[Progress(plan.metric, list(plan.space), plan.steps)],
            verbose=0,
        ),
    )


def _print_resumed(plan: Plan, uri: str) -> None:
    line = f"search {plan.name} resumes in {uri}, with as many trials at once as when it started"
    if plan.max_concurrent is not None:
        line += " (--max-concurrent applies only to a new search)"
    print(line, flush=True)


def _write_results(plan: Plan, result_grid: ray.tune.ResultGrid, root: str, uri: str) -> Summary:
    """Write trials.csv and best.yaml."""
    trials = results.outcomes(result_grid, plan.metric, root)
    table = results.to_csv(trials, plan.metric, list(plan.space))
    storage.write_bytes(storage.join(uri, "trials.csv"), table.encode())
    best = results.best(trials)
    if best is None:
        errors = result_grid.errors
        cause = str(errors[0]).strip().splitlines()[-1] if errors else "no trial was evaluated"
        raise SearchFailed(
            f"search {plan.name} has no result: {cause}; its trials are in {uri}/trials.csv"
        )
    header = (
        f"# The best trial of search {plan.name}: run {best.run}, "
        f"{plan.metric} {best.score:.4f} at step {best.step}.\n"
    )
    config = header + plan.config(best.values).to_yaml()
    storage.write_bytes(storage.join(uri, "best.yaml"), config.encode())
    failed = sum(trial.status == "failed" for trial in trials)
    return Summary(plan.name, uri, len(trials), failed, plan.metric, best)
