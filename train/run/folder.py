"""A run's folder: its name, and whether it is resumed.

    with open_run(config, "kiln", stem="gpt-tiny") as run: ...

A run is never started over silently.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import yaml

from cluster import storage
from train.config.sections import Config, Values
from train.run import checkpoint, driver

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
    with driver.hold(name, uri) as token:
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
