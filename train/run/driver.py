"""driver.json: which process drives a run, and whether it is alive.

A run has one driver at a time. A driver on another machine is alive as long as it refreshes its
heartbeat.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypedDict

import psutil

from cluster import machine, storage

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10
STALE_S = 60  # a driver on another machine whose heartbeat is older than this is dead


class DriverFile(TypedDict):
    """The content of driver.json: the process that drives the run."""

    token: str
    host: str
    pid: int
    started: float
    """When the process was created: Unix, seconds. Another process may get the same pid later."""
    heartbeat: float
    """When the process was last alive: Unix, seconds; 0 once it has ended."""


@contextmanager
def hold(name: str, uri: str) -> Iterator[str]:
    """Hold driver.json and refresh its heartbeat; yield the token that identifies its holder.

    Raises:
        ValueError: another driver is alive.
    """
    file = storage.join(uri, "driver.json")
    if storage.exists(file):
        _check_dead(name, storage.read_json(file))
    token = secrets.token_hex(8)
    driver = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    storage.write_json(file, {**driver, "heartbeat": time.time()})
    time.sleep(0.05)
    if storage.read_json(file)["token"] != token:
        raise ValueError(
            f"run {name} was started by another process at the same moment: start it once"
        )
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                if storage.read_json(file)["token"] != token:
                    return  # another driver has taken over, and the file is its own
                storage.write_json(file, {**driver, "heartbeat": time.time()})
            except OSError as error:
                logger.warning(
                    "the heartbeat of run %s could not be written (%s): trying again", name, error
                )

    heartbeat = threading.Thread(target=beat, name="driver-heartbeat", daemon=True)
    heartbeat.start()
    try:
        yield token
    finally:
        done.set()
        heartbeat.join()
        # On a full disk the error that ended the run matters more; the next driver finds this
        # process dead.
        with suppress(OSError):
            if storage.read_json(file)["token"] == token:
                storage.write_json(file, {**driver, "heartbeat": 0})


def _check_dead(name: str, other: DriverFile) -> None:
    """Check that the driver of another driver.json has ended.

    Raises:
        ValueError: it is alive.
    """
    if other["heartbeat"] == 0:
        return
    if other["host"] == socket.gethostname():
        alive = machine.is_same_process(other["pid"], other["started"])
    else:
        alive = time.time() - other["heartbeat"] < STALE_S
    if alive:
        raise ValueError(
            f"run {name} is driven by process {other['pid']} on {other['host']}: stop that one "
            "first, or use another --run.name"
        )
