"""A run's folder: its name, what may be resumed, and who drives it.

    with open_run(config, "kiln", stem="gpt-tiny") as run: ...

A run never silently starts over, and has one driver at a time.
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
from typing import Any

import psutil
import yaml

from cluster import storage
from train.config.sections import Config
from train.run import checkpoint

log = logging.getLogger(__name__)

HEARTBEAT_S = 10
STALE_S = 60  # a driver on another machine that has not been heard of for this long is dead
# What may differ between the parts of one run: it changes neither the samples nor, but for how often a critic steps, the mathematics.
FREE: tuple[str, ...] = (
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
    "sample.",
    "quality.inception",
    "gan.critic_steps",
    "gan.on_collapse",
    "batch.micro_size",
    "steps",
    "compile",
)


@dataclass(frozen=True)
class Run:
    """An opened run: its name, its URI, the step it goes on from (0: it starts), this driver's token."""

    name: str
    uri: str
    start: int
    token: str


@contextmanager
def open_run(config: Config, root: str, stem: str) -> Iterator[Run]:
    """The run that `config` names, locked for this driver, its config written down.

    Args:
        stem: what an unnamed run's name begins with.

    Raises:
        ValueError: run.resume and what is on storage do not agree, the config is another than the run's, or
            another driver lives.
    """
    name = (
        config.run.name
        or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem)}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    uri = storage.join(root, "runs", name)
    _start(config, name, uri)  # what is refused leaves no trace
    with _driver(name, uri) as token:
        start = _start(config, name, uri)
        storage.write_bytes(storage.join(uri, "run.yaml"), config.to_yaml().encode())
        yield Run(name, uri, start, token)


def _start(config: Config, name: str, uri: str) -> int:
    newest = checkpoint.newest(uri)
    resume = config.run.resume
    if newest is None:
        if resume == "must":
            raise ValueError(
                f"run.resume is must, and {uri} has no complete checkpoint: check --run.name and --storage, or use --run.resume auto"
            )
        return 0
    if resume == "never":
        raise ValueError(
            f"run.resume is never, and run {name} has a checkpoint of step {newest.step}: use another --run.name, or --run.resume auto to go on"
        )
    _refuse_another_config(config, name, newest.config)
    if newest.step > config.steps:
        raise ValueError(
            f"run {name} is at step {newest.step}, beyond steps {config.steps}: use another --run.name, or more --steps"
        )
    return newest.step


def _refuse_another_config(config: Config, name: str, before: dict[str, Any]) -> None:
    now, then = _flat(yaml.safe_load(config.to_yaml())), _flat(before)
    for key in sorted(now.keys() | then.keys()):
        if not key.startswith(FREE) and now.get(key) != then.get(key):
            raise ValueError(
                f"run {name} was begun with {key} {then.get(key)!r}, and now it is {now.get(key)!r}: give it the old value, or use another --run.name"
            )


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


# ---------------------------------------------------------------- one driver


@contextmanager
def _driver(name: str, uri: str) -> Iterator[str]:
    """Holds driver.json, refreshed by a heartbeat; yields the token that proves who holds it."""
    place = storage.join(uri, "driver.json")
    if storage.exists(place):
        _refuse_if_alive(name, storage.read_json(place))
    token = secrets.token_hex(8)
    me = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    storage.write_json(place, {**me, "heartbeat": time.time()})
    time.sleep(0.05)
    if storage.read_json(place)["token"] != token:
        raise ValueError(
            f"run {name} was started by another process at the same moment: one of the two is enough"
        )
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            try:
                if storage.read_json(place)["token"] != token:
                    return  # taken over: the other driver's file is not ours to touch
                storage.write_json(place, {**me, "heartbeat": time.time()})
            except OSError as error:
                log.warning(
                    "the heartbeat of run %s could not be written (%s): it is tried again",
                    name,
                    error,
                )

    heart = threading.Thread(target=beat, name="driver-heartbeat", daemon=True)
    heart.start()
    try:
        yield token
    finally:
        over.set()
        heart.join()
        with suppress(
            OSError
        ):  # a full disk: why the run ended matters more, and the next driver sees that this one is gone
            if storage.read_json(place)["token"] == token:
                storage.write_json(place, {**me, "heartbeat": 0})


def _refuse_if_alive(name: str, other: dict[str, Any]) -> None:
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
            f"run {name} is driven by process {other['pid']} on {other['host']}: stop that one first, or use another --run.name"
        )
