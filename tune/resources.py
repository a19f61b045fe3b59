"""The cluster of a search, and how many trials run on it at once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import ray

from cluster.connect import connect
from train.config.sections import Config
from tune.plan import Plan


class Node(TypedDict):
    """The part of an entry of `ray.nodes()` that counts here."""

    Alive: bool
    Resources: dict[str, float]


@contextmanager
def search_cluster() -> Iterator[bool]:
    """Connect to a cluster on which Ray Train can free the workers of a stopped trial.

    Ray Train asks the dashboard whether a trial is still alive, and finds the dashboard through
    the address file below RAY_TMPDIR. On a machine with two Ray clusters it finds none without
    that file: stopped trials would keep their workers, and the search would hang.

    Yields:
        Whether the cluster is private to this search.

    Raises:
        ValueError: the cluster at RAY_ADDRESS has no dashboard.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        connect()
        if not ray._private.worker.get_dashboard_url():
            raise ValueError(
                "the cluster at RAY_ADDRESS has no dashboard, which frees the workers of stopped "
                "trials: start one with `python -m cluster up`, or unset RAY_ADDRESS"
            )
        yield False
        return
    # Not below TMPDIR: Ray puts its sockets here, and a socket's path is limited to 107 bytes.
    folder = tempfile.mkdtemp(prefix="kiln-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    try:
        connect(include_dashboard=True, _temp_dir=f"{folder}/ray")
        Path(folder, "ray", "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        yield True
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def concurrent_trials(plan: Plan, nodes: list[Node], private: bool) -> int:
    """Return how many of the plan's trials run at once on `nodes` (`ray.nodes()`).

    A private cluster has a fixed size. Any other may still grow: a trial that does not fit yet
    waits for nodes, and a line is printed.

    Raises:
        ValueError: no trial fits into the private cluster.
    """
    config = plan.config()
    fit = fitting_runs(config, nodes)
    if private and fit == 0:
        raise ValueError(f"{_shortage(config, nodes)}: use fewer workers, or a larger cluster")
    if private:
        return min(plan.max_concurrent or fit, fit)
    if fit == 0:
        print(f"{_shortage(config, nodes)}: waiting for nodes to join", flush=True)
    return plan.max_concurrent or max(fit, 1)


def fitting_runs(config: Config, nodes: list[Node]) -> int:
    """Return how many runs of `config` the nodes hold at once.

    A worker needs all its CPUs, and its GPU, on one node.
    """
    parallel = config.parallel
    workers = 0
    for node in nodes:
        if node["Alive"]:
            fit = node["Resources"].get("CPU", 0) / parallel.cpus_per_worker
            workers += int(min(fit, node["Resources"].get("GPU", 0)) if parallel.gpu else fit)
    return workers // parallel.workers


def _shortage(config: Config, nodes: list[Node]) -> str:
    """Return what a trial needs and what the cluster has, as the start of a message."""
    parallel = config.parallel
    cpus, gpus = (
        sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"])
        for kind in ("CPU", "GPU")
    )
    needed = f"{parallel.workers * parallel.cpus_per_worker:g} CPUs"
    if parallel.gpu:
        needed += f" and {parallel.workers} GPUs"
    return (
        f"one trial needs {needed} (parallel.workers {parallel.workers}), and the cluster has "
        f"{cpus:g} CPUs and {gpus:g} GPUs"
    )
