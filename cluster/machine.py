"""This machine's ports and processes: which port is free, which processes are ours, how they end."""

import contextlib
import socket

import psutil


def free_port(wanted: int | None, preferred: int, option: str = "") -> int:
    """`wanted`, or where nothing was wanted `preferred`, or where that is taken one that the system picks.

    Raises:
        ValueError: `wanted` (given as `option`) is taken.
    """
    if wanted is not None and not _is_free(wanted):
        raise ValueError(
            f"{option} {wanted} is taken by another process: name another, or leave {option} out and a free one is chosen"
        )
    if wanted is not None or _is_free(preferred):
        return wanted if wanted is not None else preferred
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A listener still refuses us; what a closed one left behind (TIME_WAIT) does not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def marked(name: str, value: str) -> list[psutil.Process]:
    """The running processes that were started with `name`=`value` in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another user's, or gone meanwhile
            if process.environ().get(name) == value and running(process):
                found.append(process)
    return found


def running(process: psutil.Process) -> bool:
    """Whether it is more than an entry that its parent has not collected yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(name: str, value: str, grace_s: float) -> int:
    """SIGTERM to all `marked` processes, SIGKILL to those still there after the grace; how many there were."""
    ended: set[psutil.Process] = set()
    for round_number in range(10):  # the dying may still start others
        processes = marked(name, value)
        if not processes:
            break
        ended.update(processes)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if round_number else process.terminate()
        psutil.wait_procs(processes, timeout=grace_s)
    return len(ended)
