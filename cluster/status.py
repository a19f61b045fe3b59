"""The nodes, resources and jobs of a cluster, for `python -m cluster status`."""

import time
from typing import TypedDict

from rich.console import Console
from rich.table import Column, Table

from cluster.dashboard import Dashboard, Job, Node

GIB = 2**30


class Usage(TypedDict):
    """How much of a resource is in use; memory in bytes."""

    used: float
    total: float


class Status(TypedDict):
    """The state of a cluster."""

    url: str
    nodes: list[Node]
    resources: dict[str, Usage]
    jobs: list[Job]  # oldest first


def read(dashboard: Dashboard) -> Status:
    """Ask a cluster for its state."""
    return {
        "url": dashboard.url,
        "nodes": dashboard.nodes(),
        "resources": {
            name: {"used": used, "total": total}
            for name, (used, total) in sorted(dashboard.usage().items())
            # Ray uses these to pin tasks to a node; they show no load.
            if not name.startswith("node:")
        },
        "jobs": sorted(dashboard.jobs(), key=lambda job: job["start_time"] or 0),
    }


def show(status: Status) -> None:
    """Print the state of a cluster as tables."""
    console = Console()
    console.print(f"Ray at {status['url']}", highlight=False)
    console.print(_node_table(status["nodes"]))
    console.print(_resource_table(status["resources"]))
    console.print(_job_table(status["jobs"]))


def _node_table(nodes: list[Node]) -> Table:
    table = Table(
        "node", "role", "state", "CPUs", "GPUs", "memory GiB", title="Nodes", title_justify="left"
    )
    for node in nodes:
        resources = node["resources_total"]
        table.add_row(
            node["node_ip"],
            "head" if node["is_head_node"] else "worker",
            node["state"],
            f"{resources.get('CPU', 0):g}",
            f"{resources.get('GPU', 0):g}",
            f"{resources.get('memory', 0) / GIB:.1f}",
        )
    return table


def _resource_table(resources: dict[str, Usage]) -> Table:
    table = Table("resource", "used", "total", title="Resources", title_justify="left")
    for name, usage in resources.items():
        unit, suffix = (GIB, " GiB") if "memory" in name.lower() else (1, "")
        used, total = usage["used"] / unit, usage["total"] / unit
        table.add_row(name, f"{used:.3g}{suffix}", f"{total:.3g}{suffix}")
    return table


def _job_table(jobs: list[Job]) -> Table:
    table = Table(
        *(Column(name, no_wrap=True) for name in ("job", "status", "started")),
        "command",
        title="Jobs",
        title_justify="left",
    )
    for job in jobs:
        start_ms = job["start_time"]
        started = time.strftime("%H:%M:%S", time.localtime(start_ms / 1000)) if start_ms else ""
        table.add_row(
            job["submission_id"] or job["job_id"],
            job["status"],
            started,
            job["entrypoint"].splitlines()[0],
        )
    return table
