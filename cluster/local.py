"""A Ray head on this machine that is ours alone: started in the background, found again, ended without a trace.

    python -m cluster up
    source kiln/cluster/env
    python -m cluster down

Every process of the cluster inherits KILN_CLUSTER_ID from its head. That mark says what is ours: `down` ends the
processes that carry it and no others, so neither a recycled process id nor another Ray cluster is ever hit. (A bare
`ray stop` ends every Ray process of the machine, which is why nothing here calls it.)
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

MARK = "KILN_CLUSTER_ID"
START_TIMEOUT_S = 120
STOP_GRACE_S = 15  # a job's driver may finish its clean-up before it is killed

# Where Ray's servers listen unless something else does already.
GCS_PORT, DASHBOARD_PORT, CLIENT_PORT, AGENT_PORT = 6379, 8265, 10001, 52365


@dataclass(frozen=True)
class Head:
    """What `up` writes down about the head it started (`<storage>/cluster/state.json`)."""

    id: str
    host: str  # the machine, since storage may be shared between several
    pid: int  # 0 until it runs
    started: float  # the process's start, in seconds since the epoch: with `pid` it names one process for ever
    port: int
    dashboard_port: int
    temp_dir: str
    storage: (
        str  # absolute: a job runs in a copy of its working directory, where ./kiln would be lost
    )

    @property
    def home(self) -> Path:
        return folder(self.storage)

    @property
    def address(self) -> str:
        """host:port for RAY_ADDRESS, as Ray itself publishes it once the head is up."""
        return self._address_file.read_text().strip()

    @property
    def _address_file(self) -> Path:
        return Path(self.temp_dir) / "ray" / "ray_current_cluster"

    def _agent_serves(self) -> bool:
        """Whether the node's agent has written its port: on a busy machine seconds after the dashboard, which waits 10 s for it at most."""
        session = Path(self.temp_dir) / "ray" / "session_latest"
        return any(session.glob("dashboard_agent_listen_port_*"))

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(
            f"http://127.0.0.1:{self.dashboard_port}", (self.home / "token").read_text()
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment that joins a process to this cluster."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard.url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "token"),
            "KILN_STORAGE": self.storage,
        }

    def join(self, environment: MutableMapping[str, str]) -> None:
        """Puts `variables` into an environment, and takes a token of the user's own out: Ray would prefer it to the file."""
        environment.pop("RAY_AUTH_TOKEN", None)
        environment.update(self.variables)

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # The kernel counts in ticks since boot: the same start is read back only to within a fraction of a second.
            return machine.running(process) and abs(process.create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


def folder(storage_uri: str) -> Path:
    """Where the state of this machine's head lies: <storage>/cluster, or ./kiln/cluster where storage is remote."""
    return (storage.local_path(storage_uri) or Path(cli.DEFAULT_STORAGE).absolute()) / "cluster"


def find(storage_uri: str) -> Head | None:
    """The head that runs for `storage_uri` on this machine, None where there is none."""
    head = _recorded(storage_uri)
    return head if head and head.alive() else None


def up(
    storage_uri: str,
    port: int | None = None,
    dashboard_port: int | None = None,
    num_cpus: int | None = None,
) -> tuple[Head, bool]:
    """Starts a head for `storage_uri` and waits until it takes jobs; the head, and False where it ran already.

    Args:
        port: of Ray's control service; 6379, or a free one where that is taken.
        dashboard_port: of the dashboard and the jobs API, on 127.0.0.1; 8265, or a free one.
        num_cpus: logical CPUs; by default the machine's.

    Raises:
        ValueError: a port that was asked for is taken, or Ray did not come up (with the end of its log).
    """
    with _alone(storage_uri):
        head = find(storage_uri)
        if head:
            _wait_until_ready(head)
            return head, False
        _clear(storage_uri)  # what a crash left
        port = machine.free_port(port, GCS_PORT, "--port")
        dashboard_port = machine.free_port(dashboard_port, DASHBOARD_PORT, "--dashboard-port")
        planned = _plan(storage_uri, port, dashboard_port)
        try:
            head = _launch(planned, num_cpus)
            _wait_until_ready(head)
            _write_private(head.home / "env", _exports(head))
        except BaseException:
            _clear(storage_uri)
            raise
        return head, True


def down(storage_uri: str) -> int:
    """Ends the cluster of `storage_uri` with all its jobs; the number of processes that ran.

    Raises:
        ValueError: the state file is not ours to believe, or a process survived SIGKILL.
    """
    if not folder(storage_uri).is_dir():
        return 0
    with _alone(storage_uri):
        return _clear(storage_uri)


@contextlib.contextmanager
def _alone(storage_uri: str) -> Iterator[None]:
    """One `up` or `down` at a time: of two heads, the state file could name only one."""
    home = folder(storage_uri)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        yield


def _clear(storage_uri: str) -> int:
    head = _recorded(storage_uri)
    if head is None:
        return 0
    ended = machine.end(MARK, head.id, STOP_GRACE_S)
    if left := [process.pid for process in machine.marked(MARK, head.id)]:
        raise ValueError(
            f"processes {left} of the cluster in {head.home} do not end: end them yourself, then run `python -m cluster down`"
        )
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    for name in (
        "env",
        "token",
        "state.json",
    ):  # the state last: until then a second `down` can finish the work
        (head.home / name).unlink(missing_ok=True)
    return ended


def _recorded(storage_uri: str) -> Head | None:
    path = folder(storage_uri) / "state.json"
    if not path.exists():
        return None
    try:
        head = Head(**storage.read_json(path))
    except TypeError as error:
        raise ValueError(
            f"{path} was not written by this version ({error}): end process ids it names yourself, then delete it"
        ) from error
    # An empty mark would be every process's, and the folder is going to be removed.
    for field, form in (("id", r"[0-9a-f]{32}"), ("temp_dir", r"/tmp/kiln-\w+")):
        if not re.fullmatch(form, str(value := getattr(head, field))):
            raise ValueError(
                f"{path}: {field} is {value!r}, which `up` never writes: end process {head.pid} yourself, then delete the file"
            )
    if head.host != socket.gethostname():
        raise ValueError(
            f"{path} belongs to a head on machine {head.host!r}: go there, or give this machine a --storage of its own; "
            "where that machine is gone or has another name now, delete the file"
        )
    return head


def _plan(storage_uri: str, port: int, dashboard_port: int) -> Head:
    """Writes down what is about to be started: whatever interrupts the start, `down` knows the mark to look for."""
    home = folder(storage_uri)
    _write_private(home / "token", secrets.token_hex(32))
    # Ray's sockets live below its temp dir and a socket's path is limited to 107 bytes: storage may lie too deep.
    temp_dir = tempfile.mkdtemp(prefix="kiln-", dir="/tmp")
    mark, host = secrets.token_hex(16), socket.gethostname()
    head = Head(mark, host, 0, 0.0, port, dashboard_port, temp_dir, storage.absolute(storage_uri))
    storage.write_json(home / "state.json", asdict(head))
    return head


def _launch(planned: Head, num_cpus: int | None) -> Head:
    with open(planned.home / "head.log", "wb") as log:
        process = subprocess.Popen(
            _start_command(planned.port, planned.dashboard_port, planned.temp_dir, num_cpus),
            env=_environment(planned.id, planned.temp_dir, planned.storage, planned.home / "token"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal that ran `up` is not for the cluster
        )
    head = replace(planned, pid=process.pid, started=psutil.Process(process.pid).create_time())
    storage.write_json(head.home / "state.json", asdict(head))
    return head


def _start_command(
    port: int, dashboard_port: int, temp_dir: str, num_cpus: int | None
) -> list[str]:
    """`ray start --block`: it stays the parent of the whole head, and ends the rest if one part dies."""
    options = {
        "--port": port,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": dashboard_port,
        "--ray-client-server-port": machine.free_port(None, CLIENT_PORT),
        "--dashboard-agent-listen-port": machine.free_port(None, AGENT_PORT),
        "--temp-dir": f"{temp_dir}/ray",  # where whoever inherits RAY_TMPDIR looks for the address, however many clusters run here
    }
    if num_cpus is not None:
        options["--num-cpus"] = num_cpus
    # -P: the working directory, which workers start in, is not a place for Ray to import from.
    ray = [sys.executable, "-P", "-m", "ray.scripts.scripts"]
    return [
        *ray,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *(str(part) for option in options.items() for part in option),
    ]


def _environment(mark: str, temp_dir: str, storage_uri: str, token: Path) -> dict[str, str]:
    """What the head passes on to every worker and every job."""
    # Those of a cluster that this shell may be joined to already.
    foreign = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"}
    return (
        {name: value for name, value in os.environ.items() if name not in foreign}
        | {
            MARK: mark,
            "SPT_NOENV": "1",  # Ray's processes write their titles (ray::...) over their environment otherwise, and the mark with it
            "KILN_STORAGE": storage_uri,
            "PATH": _path(),
            "RAY_TMPDIR": temp_dir,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            # As cluster.connect sets them for a private cluster.
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # `ray job stop` gives a driver 3 s by default, less than a checkpoint takes to be written.
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
            # `down` signals every process itself; a head that drains would only make it wait.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
    )


def _path() -> str:
    """PATH with this interpreter's folder first: `python` in a job is the one that ran `up`, and `ray` is its Ray."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _exports(head: Head) -> str:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in head.variables.items()]
    lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    lines.append("unset RAY_AUTH_TOKEN  # Ray would prefer it to the file")
    return "\n".join(lines) + "\n"


def _wait_until_ready(head: Head) -> None:
    """Returns once the head has published its address, its jobs API answers, and its agent, which starts jobs, is there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.alive() and time.monotonic() < deadline:
        if head._address_file.exists() and head._agent_serves():
            with contextlib.suppress(ValueError):
                head.dashboard.jobs()
                return
        time.sleep(0.2)
    log = head.home / "head.log"
    last_lines = " | ".join(log.read_text(errors="replace").split("\n")[-6:])
    reason = f"did not answer within {START_TIMEOUT_S} s" if head.alive() else "ended at its start"
    raise ValueError(f"the Ray head {reason}; {log} ends with: {last_lines}")


def _write_private(path: Path, text: str) -> None:
    """A file that only its owner can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
