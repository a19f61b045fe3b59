"""A run's folder: its name, whether it is resumed, and its driver.

    with open_run(config, "kiln", stem="gpt-tiny") as run: ...

A run is never started over silently, and it has one driver at a time.
"""

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypedDict

import psutil
import yaml

from cluster import storage
from train.config.sections import Config, Values
from train.run import checkpoint

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10
STALE_S = 60  # a driver on another machine whose heartbeat is older than this is dead
# Keys that may differ when a run resumes (besides `Config.changeable`): they change neither the
# samples nor the mathematics.
CHANGEABLE: tuple[str, ...] = (
    "run.name",
    "run.resume",
    "run.max_failures",
    "parallel.workers",
    "parallel.gpu",
    "parallel.cpus_per_worker",
    "parallel.strategy",
    "parallel.zero_stage",
    "parallel.offload",
    "checkpoint.",
    "log.",
    "batch.micro_size",
    "steps",
    "compile",
)


@dataclass(frozen=True)
class Run:
    """An opened run."""

    name: str
    uri: str
    start: int
    """The step that it resumes from; 0: it starts."""
    token: str
    """Of this driver (see driver.json)."""


@contextmanager
def open_run(config: Config, root: str, stem: str) -> Iterator[Run]:
    """Lock the run that `config` names for this driver and write its config down.

    Args:
        config: of the run.
        root: the storage.
        stem: what an unnamed run's name begins with.

    Raises:
        ValueError: run.resume contradicts what is on storage, the config differs from the run's,
            or another driver is alive.
    """
    name = config.run.name or _new_name(stem)
    uri = storage.join(root, "runs", name)
    _start(config, name, uri)  # a run that is refused leaves no files
    with _driver(name, uri) as token:
        start = _start(config, name, uri)
        storage.write_bytes(storage.join(uri, "run.yaml"), config.to_yaml().encode())
        yield Run(name, uri, start, token)


def _new_name(stem: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _start(config: Config, name: str, uri: str) -> int:
    """Return the step to resume from, or 0.

    Raises:
        ValueError: run.resume or the config contradicts what is on storage.
    """
    newest = checkpoint.newest(uri)
    resume = config.run.resume
    if newest is None:
        if resume == "must":
            raise ValueError(
                f"run.resume is must, and {uri} has no complete checkpoint: check --run.name and "
                "--storage, or use --run.resume auto"
            )
        return 0
    if resume == "never":
        raise ValueError(
            f"run.resume is never, and run {name} has a checkpoint of step {newest.step}: use "
            "another --run.name, or --run.resume auto to resume it"
        )
    _check_config(config, name, newest.config)
    if newest.step > config.steps:
        raise ValueError(
            f"run {name} is at step {newest.step}, beyond steps {config.steps}: use another "
            "--run.name, or more --steps"
        )
    return newest.step


def _check_config(config: Config, name: str, before: Values) -> None:
    """Check that the config differs only in keys that may change.

    Raises:
        ValueError: another key differs.
    """
    now, then = _flat(yaml.safe_load(config.to_yaml())), _flat(before)
    changeable = CHANGEABLE + config.changeable
    for key in sorted(now.keys() | then.keys()):
        if not key.startswith(changeable) and now.get(key) != then.get(key):
            raise ValueError(
                f"run {name} was started with {key} {then.get(key)!r}, and now it is "
                f"{now.get(key)!r}: restore the old value, or use another --run.name"
            )


def _flat(values: Values, prefix: str = "") -> Values:
    """Return nested values by dotted keys."""
    flat: Values = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# ---- one driver


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
def _driver(name: str, uri: str) -> Iterator[str]:
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
        alive = (
            psutil.pid_exists(other["pid"])
            and abs(psutil.Process(other["pid"]).create_time() - other["started"]) < 1
        )
    else:
        alive = time.time() - other["heartbeat"] < STALE_S
    if alive:
        raise ValueError(
            f"run {name} is driven by process {other['pid']} on {other['host']}: stop that one "
            "first, or use another --run.name"
        )
