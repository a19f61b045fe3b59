"""Checks of every node before a run: package versions, free disk, access to the storage.

python -m cluster doctor
"""

import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import storage
from cluster.connect import connect

PACKAGES = ("ray", "torch", "transformers", "onnxruntime")
# Two checkpoints with their optimizer states, and Ray's spilled objects.
MIN_FREE_BYTES = 10 * 2**30
PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Probe:
    """What a node reports about itself."""

    versions: dict[str, str]
    free_bytes: int  # of the disk where Ray spills objects
    sees_storage: bool


@dataclass(frozen=True)
class NodeReport:
    """A node and what is wrong with it."""

    address: str
    cpus: float
    gpus: float
    findings: list[str]  # one sentence each; empty: the node is healthy


def examine(storage_uri: str) -> Iterator[NodeReport]:
    """Connect to the cluster and yield a report of each of its nodes.

    Args:
        storage_uri: an absolute path or a URI, which every node should be able to read.
    """
    connect()
    here = versions()
    probe_file = storage.join(storage_uri, "cluster", f"probe-{secrets.token_hex(8)}")
    storage.write_bytes(probe_file, b"raykiln")
    list_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes  # which has no annotations
    try:
        for node in list_nodes():
            if node["Alive"]:
                yield _examine(node, here, probe_file)
    finally:
        storage.delete(probe_file)


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES` in this environment."""
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in PACKAGES
    }


def probe(probe_file: str) -> Probe:
    """Examine the node on which this function runs.

    Args:
        probe_file: the URI of a file that another node has written.
    """
    return Probe(
        versions=versions(),
        free_bytes=shutil.disk_usage(ray.get_runtime_context().get_temp_dir()).free,
        sees_storage=storage.exists(probe_file),
    )


def findings(found: Probe, here: dict[str, str], probe_file: str) -> list[str]:
    """Return what is wrong with a node, one sentence each.

    Args:
        found: what the node reports.
        here: the versions on the machine where the command runs.
        probe_file: the URI that the node was asked to read.
    """
    wrong = [
        f"{package} {found.versions.get(package)} here, {version} where this command runs: "
        "install both from requirements.lock"
        for package, version in here.items()
        if found.versions.get(package) != version
    ]
    if found.free_bytes < MIN_FREE_BYTES:
        free, needed = found.free_bytes / 2**30, MIN_FREE_BYTES / 2**30
        wrong.append(
            f"{free:.1f} GiB of disk left where Ray spills objects: free up to {needed:.0f} GiB"
        )
    if not found.sees_storage:
        wrong.append(
            f"{probe_file} is not visible: set KILN_STORAGE to a folder or URI that all nodes share"
        )
    return wrong


def _examine(node: dict[str, Any], here: dict[str, str], probe_file: str) -> NodeReport:
    on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(probe).options(num_cpus=0, scheduling_strategy=on_node).remote(probe_file)
    try:
        wrong = findings(ray.get(task, timeout=PROBE_TIMEOUT_S), here, probe_file)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        wrong = [f"does not run a task: {error}"]
    resources = node["Resources"]
    return NodeReport(
        address=node["NodeManagerAddress"],
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        findings=wrong,
    )
