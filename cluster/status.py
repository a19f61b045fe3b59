"""What a cluster consists of and what it is doing, for a terminal."""

import time

from rich.console import Console
from rich.table import Column, Table

from cluster.dashboard import Dashboard

GIB = 2**30


def show(dashboard: Dashboard) -> None:
    """Prints nodes, resources in use and jobs."""
    console = Console()
    console.print(f"Ray at {dashboard.url}", highlight=False)
    console.print(_nodes(dashboard))
    console.print(_resources(dashboard))
    console.print(_jobs(dashboard))


def _nodes(dashboard: Dashboard) -> Table:
    table = Table(
        "node", "role", "state", "CPUs", "GPUs", "memory GiB", title="Nodes", title_justify="left"
    )
    for node in dashboard.nodes():
        has = node["resources_total"]
        role = "head" if node["is_head_node"] else "worker"
        table.add_row(
            node["node_ip"],
            role,
            node["state"],
            f"{has.get('CPU', 0):g}",
            f"{has.get('GPU', 0):g}",
            f"{has.get('memory', 0) / GIB:.1f}",
        )
    return table


def _resources(dashboard: Dashboard) -> Table:
    table = Table("resource", "used", "total", title="Resources", title_justify="left")
    for name, (used, total) in sorted(dashboard.usage().items()):
        if name.startswith("node:"):  # Ray's way to pin a task to a node, nothing that runs out
            continue
        unit, suffix = (GIB, " GiB") if "memory" in name.lower() else (1, "")
        table.add_row(name, f"{used / unit:.3g}{suffix}", f"{total / unit:.3g}{suffix}")
    return table


def _jobs(dashboard: Dashboard) -> Table:
    table = Table(
        *(Column(name, no_wrap=True) for name in ("job", "status", "started")),
        "command",
        title="Jobs",
        title_justify="left",
    )
    for job in sorted(dashboard.jobs(), key=lambda job: job["start_time"] or 0):
        started = (
            time.strftime("%H:%M:%S", time.localtime(job["start_time"] / 1000))
            if job["start_time"]
            else ""
        )
        table.add_row(
            job["submission_id"] or job["job_id"],
            job["status"],
            started,
            job["entrypoint"].splitlines()[0],
        )
    return table
