"""A Ray head on this machine: started in the background, found again, and ended completely.

    python -m cluster up
    source kiln/cluster/env
    python -m cluster down

Every process of the cluster inherits the environment variable KILN_CLUSTER_ID from its head. `down`
ends the processes with this cluster's id and no others, so it cannot end the process that a process
id has been reused for, or another Ray cluster. `ray stop` is not used: it ends every Ray process on
the machine.
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock

from cluster import cli, machine, storage
from cluster.dashboard import Dashboard

ID_VARIABLE = "KILN_CLUSTER_ID"
START_TIMEOUT_S = 120
STOP_GRACE_S = 15  # how long a job's driver may clean up before it is killed

# Where Ray's servers listen, unless these ports are taken.
GCS_PORT, DASHBOARD_PORT, CLIENT_PORT, AGENT_PORT = 6379, 8265, 10001, 52365


@dataclass(frozen=True)
class Head:
    """A Ray head, as `up` writes it to `<storage>/cluster/state.json`."""

    id: str  # the value of ID_VARIABLE
    host: str  # the machine's name: several machines may share the storage
    pid: int  # 0 until the process has started
    started: float  # seconds since the epoch; identifies the process together with `pid`
    port: int
    dashboard_port: int
    temp_dir: str
    storage: str  # absolute: a job runs in a copy of its directory, where ./kiln would be lost

    @property
    def folder(self) -> Path:
        return state_folder(self.storage)

    @property
    def address(self) -> str:
        """host:port for RAY_ADDRESS, which Ray writes to a file once the head runs."""
        return self._address_file.read_text().strip()

    @property
    def _address_file(self) -> Path:
        return Path(self.temp_dir) / "ray" / "ray_current_cluster"

    def _agent_is_ready(self) -> bool:
        """Return whether the node's agent, which starts jobs, has written its port.

        On a busy machine this happens seconds after the dashboard is ready, and a request to
        start a job waits at most 10 s for the agent.
        """
        session = Path(self.temp_dir) / "ray" / "session_latest"
        return any(session.glob("dashboard_agent_listen_port_*"))

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(
            f"http://127.0.0.1:{self.dashboard_port}", (self.folder / "token").read_text()
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables with which a process joins this cluster."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard.url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "KILN_STORAGE": self.storage,
        }

    def join(self, environment: MutableMapping[str, str]) -> None:
        """Update an environment so that its processes join this cluster."""
        environment.pop("RAY_AUTH_TOKEN", None)  # Ray prefers it to RAY_AUTH_TOKEN_PATH
        environment.update(self.variables)

    def is_running(self) -> bool:
        return machine.is_same_process(self.pid, self.started)


def state_folder(storage_uri: str) -> Path:
    """Return the folder of the head's state: <storage>/cluster, for remote storage ./kiln/cluster.

    The folder is always on this machine.
    """
    return (storage.local_path(storage_uri) or Path(cli.DEFAULT_STORAGE).absolute()) / "cluster"


def find(storage_uri: str) -> Head | None:
    """Return the head that runs on this machine for `storage_uri`, or None."""
    head = _read_state(storage_uri)
    return head if head and head.is_running() else None


def up(
    storage_uri: str,
    port: int | None = None,
    dashboard_port: int | None = None,
    num_cpus: int | None = None,
) -> tuple[Head, bool]:
    """Start a head for `storage_uri`, unless one runs already, and wait until it accepts jobs.

    Args:
        storage_uri: where jobs store their files.
        port: of Ray's control service; default: 6379, or a free port if that is taken.
        dashboard_port: of the dashboard and the jobs API, on 127.0.0.1; default: 8265, or a free
            port if that is taken.
        num_cpus: logical CPUs; default: the machine's.

    Returns:
        The head, and whether this call started it.

    Raises:
        ValueError: `port` or `dashboard_port` is taken, or Ray did not start (the message ends
            with the last lines of its log).
    """
    with _locked(storage_uri):
        head = find(storage_uri)
        if head:
            _wait_until_ready(head)
            return head, False
        _end_and_remove(storage_uri)  # what a crashed cluster left behind
        with machine.starting_ray():
            planned = _plan(storage_uri, port, dashboard_port)
            try:
                return _start(planned, num_cpus), True
            except ValueError:
                chosen = ((port, planned.port), (dashboard_port, planned.dashboard_port))
                if all(wanted is not None or machine.is_free(found) for wanted, found in chosen):
                    raise
            # Another process took a port after it was chosen.
            return _start(_plan(storage_uri, port, dashboard_port), num_cpus), True


def down(storage_uri: str) -> int:
    """End the cluster of `storage_uri` and all its jobs.

    Returns:
        The number of processes that were ended.

    Raises:
        ValueError: the state file is invalid or belongs to another machine, or a process survived
            SIGKILL.
    """
    if not state_folder(storage_uri).is_dir():
        return 0
    with _locked(storage_uri):
        return _end_and_remove(storage_uri)


@contextlib.contextmanager
def _locked(storage_uri: str) -> Iterator[None]:
    """Run one `up` or `down` at a time: the state file can name only one head."""
    folder = state_folder(storage_uri)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield


def _end_and_remove(storage_uri: str) -> int:
    """End the processes of the recorded head and remove its files; return how many were ended."""
    head = _read_state(storage_uri)
    if head is None:
        return 0
    ended = machine.end_processes(ID_VARIABLE, head.id, STOP_GRACE_S)
    if left := [process.pid for process in machine.processes_with(ID_VARIABLE, head.id)]:
        raise ValueError(
            f"processes {left} of the cluster in {head.folder} do not end: end them yourself, then "
            "run `python -m cluster down`"
        )
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    # The state file comes last: as long as it exists, another `down` can finish the work.
    for name in ("env", "token", "state.json"):
        (head.folder / name).unlink(missing_ok=True)
    return ended


def _read_state(storage_uri: str) -> Head | None:
    path = state_folder(storage_uri) / "state.json"
    if not path.exists():
        return None
    try:
        head = Head(**storage.read_json(path))
    except TypeError as error:
        raise ValueError(
            f"{path} was not written by this version of raykiln ({error}): end the processes whose "
            "ids it names yourself, then delete the file"
        ) from error
    # `down` ends every process with this id and deletes this folder: accept only what `up` writes.
    for field, form in (("id", r"[0-9a-f]{32}"), ("temp_dir", r"/tmp/kiln-\w+")):
        if not re.fullmatch(form, str(value := getattr(head, field))):
            raise ValueError(
                f"{path}: {field} is {value!r}, which `up` never writes: end process {head.pid} "
                "yourself, then delete the file"
            )
    if head.host != socket.gethostname():
        raise ValueError(
            f"{path} belongs to a head on machine {head.host!r}: run the command there, or use a "
            "--storage of its own on this machine; if that machine no longer exists or was "
            "renamed, delete the file"
        )
    return head


def _plan(storage_uri: str, port: int | None, dashboard_port: int | None) -> Head:
    """Choose the ports and record the head, so that `down` can end an interrupted start."""
    return _write_plan(
        storage_uri,
        machine.choose_port("--port", port, GCS_PORT),
        machine.choose_port("--dashboard-port", dashboard_port, DASHBOARD_PORT),
    )


def _start(planned: Head, num_cpus: int | None) -> Head:
    """Start a head and wait until it accepts jobs; leave nothing of one that fails."""
    try:
        head = _launch(planned, num_cpus)
        _wait_until_ready(head)
        _write_private(head.folder / "env", _env_file(head))
    except BaseException:
        _end_and_remove(planned.storage)
        raise
    return head


def _write_plan(storage_uri: str, port: int, dashboard_port: int) -> Head:
    """Record the head before it starts: if the start is interrupted, `down` knows the id."""
    folder = state_folder(storage_uri)
    _write_private(folder / "token", secrets.token_hex(32))
    head = Head(
        id=secrets.token_hex(16),
        host=socket.gethostname(),
        pid=0,
        started=0.0,
        port=port,
        dashboard_port=dashboard_port,
        # Ray's sockets are in its temp dir, and a socket's path is limited to 107 bytes: the
        # path of the storage may be too long.
        temp_dir=tempfile.mkdtemp(prefix="kiln-", dir="/tmp"),
        storage=storage.absolute(storage_uri),
    )
    storage.write_json(folder / "state.json", asdict(head))
    return head


def _launch(planned: Head, num_cpus: int | None) -> Head:
    with open(planned.folder / "head.log", "wb") as log:
        process = subprocess.Popen(
            _start_command(planned.port, planned.dashboard_port, planned.temp_dir, num_cpus),
            env=_environment(planned),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal that ran `up` must not end the cluster
        )
    head = replace(planned, pid=process.pid, started=psutil.Process(process.pid).create_time())
    storage.write_json(head.folder / "state.json", asdict(head))
    return head


def _start_command(
    port: int, dashboard_port: int, temp_dir: str, num_cpus: int | None
) -> list[str]:
    """Return the command of the head.

    With --block `ray start` stays the parent of all processes of the head, and ends them if one of
    them dies.
    """
    options = {
        "--port": port,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": dashboard_port,
        "--ray-client-server-port": machine.free_port(CLIENT_PORT),
        "--dashboard-agent-listen-port": machine.free_port(AGENT_PORT),
        # Processes with RAY_TMPDIR look here for the address of their own cluster.
        "--temp-dir": f"{temp_dir}/ray",
    }
    if num_cpus is not None:
        options["--num-cpus"] = num_cpus
    # -P: Ray must not import modules from the working directory, in which workers start.
    ray = [sys.executable, "-P", "-m", "ray.scripts.scripts"]
    return [
        *ray,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *(str(part) for option in options.items() for part in option),
    ]


def _environment(head: Head) -> dict[str, str]:
    """Return the environment of the head, which every worker and job inherits."""
    # Variables of another cluster, which this shell may have joined.
    foreign = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"}
    inherited = {name: value for name, value in os.environ.items() if name not in foreign}
    return inherited | {
        ID_VARIABLE: head.id,
        # Otherwise Ray's processes overwrite their environment with their titles (ray::...).
        "SPT_NOENV": "1",
        "KILN_STORAGE": head.storage,
        # This interpreter's folder first: `python` and `ray` in a job are those that ran `up`.
        "PATH": os.pathsep.join([_bin_folder(), os.environ.get("PATH", os.defpath)]),
        "RAY_TMPDIR": head.temp_dir,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(head.folder / "token"),
        # As `cluster.connect` sets them for a private cluster.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The default of `ray job stop` is 3 s, less than writing a checkpoint takes.
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
        # `down` signals every process itself: draining the node would only delay it.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def _bin_folder() -> str:
    return str(Path(sys.executable).parent)


def _env_file(head: Head) -> str:
    """Return the shell script with which a terminal joins the cluster."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in head.variables.items()]
    lines.append(f'export PATH={shlex.quote(_bin_folder())}:"$PATH"')
    lines.append("unset RAY_AUTH_TOKEN  # Ray prefers it to RAY_AUTH_TOKEN_PATH")
    return "\n".join(lines) + "\n"


def _wait_until_ready(head: Head) -> None:
    """Wait until the head has written its address, its jobs API answers and its agent is ready."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.is_running() and time.monotonic() < deadline:
        if head._address_file.exists() and head._agent_is_ready():
            with contextlib.suppress(ValueError):
                head.dashboard.jobs()
                return
        time.sleep(0.2)
    log = head.folder / "head.log"
    last_lines = " | ".join(log.read_text(errors="replace").split("\n")[-6:])
    running = head.is_running()
    reason = f"did not answer within {START_TIMEOUT_S} s" if running else "ended while it started"
    raise ValueError(f"the Ray head {reason}; {log} ends with: {last_lines}")


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
