"""Drive a run in a process of its own, so that the driver can be killed too."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO

from cluster import cli, storage
from train.config import loader
from train.config.sections import Config, Values
from train.kinds import KINDS
from train.run import checkpoint
from train.verify import faults
from train.verify.faults import Fault
from train.verify.verdict import Unproven

POLL_S = 0.2
TERMINATE_S = 20  # within which a driver ends its private cluster


def with_values(config: Config, values: Values) -> Config:
    """Return the config with other values, by dotted keys."""
    merged = loader.merge(config.model_dump(), loader.nested(values))
    return loader.build(KINDS[config.kind].config, merged, "verify-resume")


def run_to_end(
    config: Config,
    root: str,
    plan: Sequence[Fault] = (),
    broken_restore: str | None = None,
    log: cli.Log = cli.no_log,
) -> None:
    """Train a run to its end; start it again each time the plan kills its driver.

    Args:
        config: of the run, which has a name.
        root: the storage.
        plan: the faults.
        broken_restore: see `faults.Faults`.
        log: called with each progress message.

    Raises:
        ValueError: the config is invalid.
        Unproven: the run failed.
    """
    name, done = str(config.run.name), set[int]()
    run_uri = storage.join(root, "runs", name)
    drivers = {number for number, fault in enumerate(plan) if fault.target == "driver"}
    while True:
        killed = _drive(config, root, run_uri, plan, broken_restore, drivers - done)
        if killed is None:
            return
        done.add(killed)
        if checkpoint.newest(run_uri) is not None:
            config = with_values(config, {"run.resume": "must"})
        log(f"the driver of run {name} was killed: starting it again")


def _drive(
    config: Config,
    root: str,
    run_uri: str,
    plan: Sequence[Fault],
    broken_restore: str | None,
    due: set[int],
) -> int | None:
    """Run one driver; return which of the `due` faults killed it, or None where the run is
    complete."""
    request = {
        "kind": config.kind,
        "config": config.model_dump(),
        "root": root,
        "plan": [asdict(fault) for fault in plan],
        "broken_restore": broken_restore,
    }
    command = [sys.executable, "-m", "train.verify.driver", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as stderr:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, text=True)
        try:
            while driver.poll() is None:
                for number in due:
                    if storage.exists(faults.record_uri(run_uri, number)):
                        driver.kill()
                        driver.wait()
                        return number
                time.sleep(POLL_S)
        finally:
            _end(driver)
        if driver.returncode == 0:
            return None
        message = _error(stderr)
    if driver.returncode == 2:
        raise ValueError(message)
    raise Unproven(message)


def _end(driver: subprocess.Popen[str]) -> None:
    """End a driver; one that is terminated, not killed, ends its private cluster too."""
    if driver.poll() is None:
        driver.terminate()
        try:
            driver.wait(timeout=TERMINATE_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()


def _error(stderr: IO[str]) -> str:
    stderr.seek(0)
    lines = [line for line in stderr.read().splitlines() if line.strip()] or ["without a message"]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return f"a driver ended: {lines[-1]}"


def main(argv: list[str]) -> int:
    """Train the run that `_drive` describes in argv[0]."""
    from train import launch

    request = json.loads(argv[0])
    config = loader.build(KINDS[request["kind"]].config, request["config"], "verify-resume")
    plan = [Fault(**values) for values in request["plan"]]
    hooks = faults.Faults(plan, request["broken_restore"])
    try:
        launch.fit(config, request["root"], quiet=True, hooks=hooks)
    except launch.TrainingFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
