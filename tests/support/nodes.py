"""A Ray cluster of several nodes on this machine, each of which can be killed as a whole.

    with nodes.cluster(3) as machines, machines.joined():
        ...  # a command that is started here has the cluster's RAY_ADDRESS
        machines.kill(machines.training()[0])

A node is a `ray start --block` with its own temp dir. All its processes inherit an id in their
environment. Killing a node kills every process with its id (the raylet, its agents and its workers)
at once, as when a machine loses power.
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

ID_VARIABLE = "KILN_TEST_NODE"
START_TIMEOUT_S = 120
# A node that is silent for 3 s counts as lost: Ray's default takes longer than most tests. A single
# check may take 10 s, since the machine may be busy.
HEALTH = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head without CPUs, and nodes with one CPU each.

    Attributes:
        environment: the variables with which a process joins the cluster.
        alive: the names of the nodes that were started and have not been killed.
    """

    def __init__(self) -> None:
        self._id = secrets.token_hex(8)
        # Ray's sockets are in its temp dir, and a socket's path is limited to 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="kiln-", dir="/tmp"))
        self._port = machine.free_port(6479)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.alive: list[str] = []
        self.environment = {
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Let commands that are started meanwhile join this cluster.

        This process's own connection to Ray does not change.
        """
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def start_head(self) -> None:
        with machine.starting_ray():
            self._start(
                "head",
                "--head",
                f"--port={self._port}",
                "--num-cpus=0",
                "--include-dashboard=false",
                f"--ray-client-server-port={machine.free_port(10101)}",
                f"--system-config={json.dumps(HEALTH)}",
            )
            self._wait("head")

    def add(self, count: int = 1) -> None:
        """Start nodes and wait until they have joined."""
        new = [f"node{len(self._processes) + number}" for number in range(count)]
        for name in new:
            self.alive.append(name)
            self._start(name, f"--address=127.0.0.1:{self._port}", "--num-cpus=1")
        for name in new:
            self._wait(name)

    def kill(self, name: str) -> None:
        """Send SIGKILL to every process of a node."""
        while processes := self._processes_of(name):  # one that ends may still start another
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)
        self._processes[name].wait()
        if name in self.alive:
            self.alive.remove(name)

    def training(self) -> list[str]:
        """Return the nodes on which workers of Ray Train run."""
        return [
            name
            for name in self.alive
            if any(
                "RayTrainWorker" in " ".join(process.cmdline())
                for process in self._processes_of(name)
            )
        ]

    def close(self) -> None:
        for name in list(self._processes):
            self.kill(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _processes_of(self, name: str) -> list[psutil.Process]:
        return machine.processes_with(ID_VARIABLE, f"{self._id}-{name}")

    def _start(self, name: str, *options: str) -> None:
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                    "--dashboard-agent-listen-port=0",
                    # Nodes that share a temp dir and start together take each other's sockets.
                    f"--temp-dir={self._folder}/{name}",
                    "--object-store-memory=100000000",
                    "--include-log-monitor=false",
                    *options,
                ],
                env=self._environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _environment(self, name: str) -> dict[str, str]:
        foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")
        inherited = {name: value for name, value in os.environ.items() if name not in foreign}
        return {
            **inherited,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.environment["RAY_AUTH_TOKEN"],
            ID_VARIABLE: f"{self._id}-{name}",
            # Otherwise Ray's processes overwrite their environment with their titles (ray::...).
            "SPT_NOENV": "1",
            "RAY_TMPDIR": str(self._folder),
            # As `cluster.connect` sets them for a private cluster.
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in (log := self._log(name).read_text()):
            if time.monotonic() > deadline or self._processes[name].poll() is not None:
                raise RuntimeError(f"{name} did not start: {log[-2000:]}")
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[Nodes]:
    """Start a head and `num_nodes` nodes; at the end, kill them and delete their files."""
    machines = Nodes()
    try:
        machines.start_head()
        machines.add(num_nodes)
        yield machines
    finally:
        machines.close()
