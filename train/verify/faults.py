"""Faults on purpose: a run loses a worker, or its driver, at a chosen moment, or restores something wrong.

`python -m train verify-resume` (train/verify/verify.py) plans them, to prove that a run goes on as if nothing had been, and that
it would say so if that were not true. Nothing else does.
"""

import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from cluster import storage
from train.config.sections import Base
from train.parallel.state import State

# Gradients are there and the update is not (GAN: the critic is updated and the generator is not); a checkpoint's files are
# there and its manifest is not.
MOMENTS = ("update", "upload")
TARGETS = ("worker", "driver")
SABOTAGES = ("optimizer", "order", "weights")
DRIVER_LIMIT_S = 600  # within which a driver that is to die must have died

AnyConfig = TypeVar("AnyConfig", bound=Base)


@dataclass(frozen=True)
class Fault:
    """kill -9 of `target` when worker `rank` first reaches `moment` of `step`, or of a later one if a resume passed over it.

    A worker kills itself. The driver, which may be on another machine, is killed by who started it: train/verify/verify.py.
    """

    step: int
    moment: str = "update"
    target: str = "worker"
    rank: int = 0
    later: float = 0.0  # so much of a step's duration after the moment: anywhere between this step's update and the next one's


class Faults:
    """What one worker does of a plan; called at each moment with its name and the step.

    Args:
        run_uri: the run's folder, where each fault that has happened is written down: it happens once.
        rank: this worker's.
        plan: of all workers.
    """

    def __init__(self, run_uri: str, rank: int, plan: list[Fault]) -> None:
        self._run_uri = run_uri
        happened = [number for number in range(len(plan)) if storage.exists(place(run_uri, number))]
        self._mine = {
            number: fault
            for number, fault in enumerate(plan)
            if fault.rank == rank and number not in happened
        }
        self._survived = happened if rank == 0 else []
        self._updated: float | None = None

    def __call__(self, moment: str, step: int) -> None:
        step_s = 0.0
        if moment == "update":
            self._recovered(step)
            now = time.monotonic()
            step_s, self._updated = now - (self._updated or now), now
        for number, fault in list(self._mine.items()):
            if fault.moment == moment and step >= fault.step:
                del self._mine[number]
                if fault.later and step_s:
                    timer = threading.Timer(
                        fault.later * step_s, self._strike, (number, fault, step)
                    )
                    timer.daemon = True
                    timer.start()
                else:
                    self._strike(number, fault, step)

    def _recovered(self, step: int) -> None:
        """In the first step of a process: writes down when, and from which step, the run went on after each fault."""
        for number in self._survived:
            happened = storage.read_json(place(self._run_uri, number))
            if "recovered" not in happened:
                storage.write_json(
                    place(self._run_uri, number),
                    {**happened, "recovered": time.time(), "resumed_from": step - 1},
                )
        self._survived = []

    def _strike(self, number: int, fault: Fault, step: int) -> None:
        storage.write_json(
            place(self._run_uri, number), {**asdict(fault), "step": step, "time": time.time()}
        )
        if fault.target == "worker":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(
            DRIVER_LIMIT_S
        )  # this worker dies with the driver, and must not go on until then
        raise RuntimeError(f"the driver was to be killed at step {step} and lives")


def place(run_uri: str, number: int) -> str:
    """Where fault `number` of a plan is written down when it happens: the fault with the step and time (Unix, seconds) it
    happened at and, once the run goes on, when that was (`recovered`) and from which step (`resumed_from`)."""
    return storage.join(run_uri, "faults", f"{number}.json")


def build(run_uri: str, rank: int, plan: list[dict[str, Any]]) -> Faults:
    return Faults(run_uri, rank, [Fault(**values) for values in plan])


def sabotage(what: str, config: AnyConfig, state: State) -> tuple[AnyConfig, State]:
    """A config and a checkpoint's state as a broken restore would leave them.

    Args:
        what: "optimizer" forgets Adam's moments, "order" takes the samples and the noise of another seed, "weights" rounds
            the weights to bfloat16.
    """
    if what == "order":
        return config.model_copy(
            update={"run": config.run.model_copy(update={"seed": config.run.seed + 1})}
        ), state
    broken: State = {}
    for part, values in state.items():
        if part.endswith("_optimizer") and what == "optimizer":
            broken[part] = {name: torch.zeros_like(values[name]) for name in values}
        elif f"{part}_optimizer" in state and what == "weights":
            broken[part] = {
                name: values[name].to(torch.bfloat16).to(values[name].dtype) for name in values
            }
    return config, state | broken
