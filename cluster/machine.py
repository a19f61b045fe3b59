"""The ports and processes of this machine."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock


@contextlib.contextmanager
def starting_ray() -> Iterator[None]:
    """Hold the lock under which the user's clusters on this machine start one after the other.

    Ray looks for free ports and listens on them seconds later, so two clusters that start at the
    same time can choose the same ports: one of them then ends, or never answers.
    """
    with FileLock(Path(tempfile.gettempdir(), f"raykiln-{os.getuid()}.lock")):
        yield


def free_port(preferred: int | None = None) -> int:
    """Return `preferred` if it is free, else a free TCP port that the system picks."""
    if preferred is not None and is_free(preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def choose_port(option: str, wanted: int | None, preferred: int) -> int:
    """Return the port that a user asked for, or else `free_port(preferred)`.

    Args:
        option: the command-line option of the port, for the error message.
        wanted: the option's value; None: it was not given.
        preferred: the port to use without the option, if it is free.

    Raises:
        ValueError: `wanted` is taken.
    """
    if wanted is None:
        return free_port(preferred)
    if not is_free(wanted):
        raise ValueError(
            f"{option} {wanted} is taken by another process: choose another port, or omit {option} "
            "to use a free one"
        )
    return wanted


def is_free(port: int) -> bool:
    """Return whether no process listens on a TCP port."""
    with socket.socket() as probe:
        # A listening socket still makes bind fail; a closed one in TIME_WAIT does not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """Return the running processes that were started with `variable`=`value` in their environment.

    Processes whose environment this user may not read are left out.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another user's process, or it has ended
            if process.environ().get(variable) == value and is_running(process):
                found.append(process)
    return found


def is_running(process: psutil.Process) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_same_process(pid: int, created: float) -> bool:
    """Return whether the process `pid` that was created at `created` still runs.

    Args:
        pid: of the process; another process may have it by now.
        created: psutil's `create_time()`.
    """
    try:
        process = psutil.Process(pid)
        # The kernel counts in ticks since boot: the start time varies by fractions of a second.
        return is_running(process) and abs(process.create_time() - created) < 1
    except psutil.NoSuchProcess:
        return False


def end_processes(variable: str, value: str, grace_s: float) -> int:
    """End the processes that `processes_with` finds: SIGTERM, after `grace_s` SIGKILL.

    Returns:
        The number of processes that were signaled.
    """
    signaled: set[psutil.Process] = set()
    for attempt in range(10):  # a process that is ending may still start another
        processes = processes_with(variable, value)
        if not processes:
            break
        signaled.update(processes)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if attempt else process.terminate()
        psutil.wait_procs(processes, timeout=grace_s)
    return len(signaled)
