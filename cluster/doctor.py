"""Is every node fit for a run? Asked of the nodes themselves, before an hour of GPU time is spent on finding out.

python -m cluster doctor
"""

import platform
import secrets
import shutil
from importlib import metadata
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import storage
from cluster.connect import connect

PACKAGES = ("ray", "torch", "transformers", "onnxruntime")
MIN_FREE_BYTES = 10 * 2**30  # a checkpoint with its optimizer, twice, and Ray's spilled objects
PROBE_TIMEOUT_S = 120


def examine(storage_uri: str) -> int:
    """Prints what each node has and what is wrong with it; 1 if anything is, else 0."""
    connect()
    here = versions()
    probe_file = storage.join(storage_uri, "cluster", f"probe-{secrets.token_hex(8)}")
    storage.write_bytes(probe_file, b"raykiln")
    try:
        complaints = 0
        for node in ray.nodes():
            if node["Alive"]:
                complaints += _examine(node, here, probe_file)
    finally:
        storage.delete(probe_file)
    print("every node is fit" if not complaints else f"{complaints} findings")
    return 1 if complaints else 0


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in PACKAGES
    }


def probe(probe_file: str) -> dict[str, Any]:
    """Runs on a node: its versions, its free disk, whether it sees the storage that everyone writes to."""
    return {
        "versions": versions(),
        "free_bytes": shutil.disk_usage(ray.get_runtime_context().get_temp_dir()).free,
        "sees_storage": storage.exists(probe_file),
    }


def findings(found: dict[str, Any], here: dict[str, str], probe_file: str) -> list[str]:
    """What is wrong with a node that answered `found`, one sentence each."""
    wrong = [
        f"{package} {found['versions'].get(package)} here, {version} where this command runs: install both from requirements.lock"
        for package, version in here.items()
        if found["versions"].get(package) != version
    ]
    if found["free_bytes"] < MIN_FREE_BYTES:
        wrong.append(
            f"{found['free_bytes'] / 2**30:.1f} GiB of disk left where Ray spills, want {MIN_FREE_BYTES / 2**30:.0f}"
        )
    if not found["sees_storage"]:
        wrong.append(
            f"{probe_file} is not visible: set KILN_STORAGE to a place that all nodes share"
        )
    return wrong


def _examine(node: dict[str, Any], here: dict[str, str], probe_file: str) -> int:
    pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(probe).options(num_cpus=0, scheduling_strategy=pinned).remote(probe_file)
    has = node["Resources"]
    print(f"{node['NodeManagerAddress']}: {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs")
    try:
        wrong = findings(ray.get(task, timeout=PROBE_TIMEOUT_S), here, probe_file)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        wrong = [f"does not run a task: {error}"]
    for sentence in wrong:
        print(f"  WRONG: {sentence}")
    return len(wrong)
