"""A Ray cluster of several nodes on this machine, each of which can be lost at once.

    with nodes.cluster(3) as machines, machines.joined():
        ...  # a command that is started here has the cluster's RAY_ADDRESS
        machines.kill(machines.training()[0])

A node is `ray start --block` with a temp dir of its own. All its processes inherit its mark: to kill the node is to kill what
carries the mark, the raylet, its agents and its workers together, as when a machine loses power.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster import machine

MARK = "KILN_TEST_NODE"
START_LIMIT_S = 120
# A node that is silent for 3 s is given up; Ray's own limit would be most of a test. A timeout as long as that is for busy machines.
HEALTH = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head without CPUs, and nodes with one CPU each.

    Attributes:
        environment: what joins a process to the cluster.
        alive: the names of the nodes that have been started and not killed.
    """

    def __init__(self) -> None:
        self._id = secrets.token_hex(8)
        # Ray's sockets live below its temp dir, and a socket's path is limited to 107 bytes: keep it short.
        self._folder = Path(tempfile.mkdtemp(prefix="kiln-", dir="/tmp"))
        self._port = machine.free_port(None, 6479)
        self._parents: dict[str, subprocess.Popen[bytes]] = {}
        self.alive: list[str] = []
        self.environment = {
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Commands started meanwhile run on this cluster; what this process itself is connected to stays as it is."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def start_head(self) -> None:
        client = machine.free_port(None, 10101)
        what = [
            "--head",
            f"--port={self._port}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--ray-client-server-port={client}",
        ]
        self._start("head", *what, f"--system-config={json.dumps(HEALTH)}")
        self._wait("head")

    def add(self, count: int = 1) -> None:
        """Starts nodes and waits until they have joined."""
        new = [f"node{len(self._parents) + number}" for number in range(count)]
        for name in new:
            self.alive.append(name)
            self._start(name, f"--address=127.0.0.1:{self._port}", "--num-cpus=1")
        for name in new:
            self._wait(name)

    def kill(self, name: str) -> None:
        """kill -9 of everything on a node."""
        while processes := self._processes(name):  # the dying may still start others
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)
        self._parents[name].wait()
        if name in self.alive:
            self.alive.remove(name)

    def training(self) -> list[str]:
        """The nodes on which workers of Ray Train are."""
        return [
            name
            for name in self.alive
            if any("RayTrainWorker" in " ".join(one.cmdline()) for one in self._processes(name))
        ]

    def close(self) -> None:
        for name in list(self._parents):
            self.kill(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _processes(self, name: str) -> list[psutil.Process]:
        return machine.marked(MARK, f"{self._id}-{name}")

    def _start(self, name: str, *what: str) -> None:
        # Nodes that share a temp dir and start together take each other's sockets.
        own = [
            f"--temp-dir={self._folder}/{name}",
            "--object-store-memory=100000000",
            "--include-log-monitor=false",
        ]
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        with self._log(name).open("wb") as log:
            self._parents[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    *ports,
                    *own,
                    *what,
                ],
                env=self._environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _environment(self, name: str) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")
        }
        return {
            **inherited,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.environment["RAY_AUTH_TOKEN"],
            MARK: f"{self._id}-{name}",
            "SPT_NOENV": "1",  # Ray's processes write their titles over their environment otherwise, and the mark with it
            "RAY_TMPDIR": str(self._folder),
            # As cluster.connect sets them for a private cluster.
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _wait(self, name: str) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while "Ray runtime started" not in (said := self._log(name).read_text()):
            if time.monotonic() > limit or self._parents[name].poll() is not None:
                raise RuntimeError(f"{name} did not start: {said[-2000:]}")
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[Nodes]:
    """A head and `num_nodes` nodes, of which nothing is left afterwards."""
    machines = Nodes()
    try:
        machines.start_head()
        machines.add(num_nodes)
        yield machines
    finally:
        machines.close()
