"""Faults on purpose: a run loses a worker, or its driver, at a chosen moment, to prove that it goes on as if nothing had been.

python -m train verify-resume plans them; nothing else does.
"""

import os
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from models import storage

MOMENTS = ("update", "upload")  # gradients are there and the update is not; a checkpoint's files are there and its manifest is not
TARGETS = ("worker", "driver")


@dataclass(frozen=True)
class Fault:
    """kill -9 of `target` when worker `rank` reaches `moment` of `step` for the first time."""

    step: int
    moment: str = "update"
    target: str = "worker"
    rank: int = 0


class Faults:
    """What one worker does of a plan; called at each moment with its name and the step.

    Args:
        run_uri: the run's folder, where each fault that has happened is written down: it happens once.
        rank: this worker's.
        plan: of all workers.
    """

    def __init__(self, run_uri: str, rank: int, plan: list[Fault]) -> None:
        self._run_uri = run_uri
        self._mine = {
            number: fault for number, fault in enumerate(plan) if fault.rank == rank and not storage.exists(place(run_uri, number))
        }

    def __call__(self, moment: str, step: int) -> None:
        for number, fault in list(self._mine.items()):
            if (fault.moment, fault.step) == (moment, step):
                del self._mine[number]
                storage.write_json(place(self._run_uri, number), {**asdict(fault), "time": time.time()})
                victim = os.getpid() if fault.target == "worker" else storage.read_json(storage.join(self._run_uri, "driver.json"))["pid"]
                os.kill(victim, signal.SIGKILL)
                time.sleep(60)  # what dies with the victim must not go on until it does


def place(run_uri: str, number: int) -> str:
    """Where fault `number` of a plan is written down when it happens."""
    return storage.join(run_uri, "faults", f"{number}.json")


def build(run_uri: str, rank: int, plan: list[dict[str, Any]] | None) -> Faults:
    return Faults(run_uri, rank, [Fault(**values) for values in plan or []])
