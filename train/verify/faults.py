"""Injected faults: a run loses a worker or its driver at a chosen moment, or restores wrongly.

`python -m train verify-resume` plans them, to prove that a resumed run equals an uninterrupted
one, and that a difference would be found.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch

from cluster import storage
from train.config.sections import Config
from train.parallel.state import State
from train.run.hooks import Hooks

Moment = Literal["update", "upload"]
Target = Literal["worker", "driver"]

# update: gradients are ready and the update is not done (GAN: the critic is updated, the generator
# is not); upload: a checkpoint's files are on storage and its manifest is not.
MOMENTS: tuple[Moment, ...] = ("update", "upload")
TARGETS: tuple[Target, ...] = ("worker", "driver")
DRIVER_LIMIT_S = 600  # within which a driver that is to be killed must be gone

AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Fault:
    """kill -9 of `target` when worker `rank` first reaches `moment` of `step`, or of a later step
    if a resume skipped it.

    A worker kills itself. The driver, which may be on another machine, is killed by the process
    that started it (train/verify/driver.py).
    """

    step: int
    moment: Moment = "update"
    target: Target = "worker"
    rank: int = 0
    delay: float = 0.0
    """How long after that moment, in durations of the step before."""


class Faults(Hooks):
    """Hooks that carry out planned faults.

    Args:
        plan: the faults; each happens once in a run.
        broken_restore: what each restore gets wrong, one of `options.BROKEN_RESTORES`; None:
            nothing.
    """

    def __init__(self, plan: Sequence[Fault] = (), broken_restore: str | None = None) -> None:
        self.plan, self.broken_restore = tuple(plan), broken_restore

    def on_worker(self, run_uri: str, rank: int) -> Hooks:
        """Return the faults that this worker carries out."""
        return _WorkerFaults(run_uri, rank, self)


class _WorkerFaults(Hooks):
    """The faults of one worker.

    Args:
        run_uri: the run's folder, where each fault that has happened is recorded.
        rank: this worker's.
        faults: of all workers.
    """

    def __init__(self, run_uri: str, rank: int, faults: Faults) -> None:
        self._run_uri = run_uri
        self._broken_restore = faults.broken_restore
        plan = dict(enumerate(faults.plan))
        happened = [number for number in plan if storage.exists(record_uri(run_uri, number))]
        self._pending = {
            number: fault
            for number, fault in plan.items()
            if fault.rank == rank and number not in happened
        }
        self._survived = happened if rank == 0 else []
        self._updated: float | None = None

    def restored(self, config: AnyConfig, state: State) -> tuple[AnyConfig, State]:
        """Break the restore, where that is planned."""
        if self._broken_restore is None:
            return config, state
        return break_restore(self._broken_restore, config, state)

    def gradients_ready(self, step: int) -> None:
        """Record that the run has recovered from earlier faults; carry out those due now."""
        self._record_recovery(step)
        now = time.monotonic()
        step_s, self._updated = now - (self._updated or now), now
        self._reached("update", step, step_s)

    def files_uploaded(self, step: int) -> None:
        """Carry out the faults due now."""
        self._reached("upload", step, 0.0)

    def _reached(self, moment: Moment, step: int, step_s: float) -> None:
        for number, fault in list(self._pending.items()):
            if fault.moment != moment or step < fault.step:
                continue
            del self._pending[number]
            if fault.delay and step_s:
                timer = threading.Timer(
                    fault.delay * step_s, self._carry_out, (number, fault, step)
                )
                timer.daemon = True
                timer.start()
            else:
                self._carry_out(number, fault, step)

    def _record_recovery(self, step: int) -> None:
        """Record, in a process's first step, when and from which step the run resumed after each
        fault."""
        for number in self._survived:
            uri = record_uri(self._run_uri, number)
            record = storage.read_json(uri)
            if "recovered" not in record:
                recovery = {"recovered": time.time(), "resumed_from": step - 1}
                storage.write_json(uri, record | recovery)
        self._survived = []

    def _carry_out(self, number: int, fault: Fault, step: int) -> None:
        record = {**asdict(fault), "step": step, "time": time.time()}
        storage.write_json(record_uri(self._run_uri, number), record)
        if fault.target == "worker":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(DRIVER_LIMIT_S)  # this worker ends with its driver and must not train until then
        raise RuntimeError(f"the driver was to be killed at step {step} and is still running")


def record_uri(run_uri: str, number: int) -> str:
    """Return where fault `number` of a plan is recorded.

    The record holds the fault, with the step and time (Unix, seconds) at which it happened, and,
    once the run has resumed, when that was (`recovered`) and from which step (`resumed_from`).
    """
    return storage.join(run_uri, "faults", f"{number}.json")


def break_restore(what: str, config: AnyConfig, state: State) -> tuple[AnyConfig, State]:
    """Return a config and a checkpoint's state as a broken restore would leave them.

    Args:
        what: "optimizer" zeroes Adam's moments, "order" takes samples and noise of another seed,
            "weights" rounds the weights to bfloat16.
        config: of the run.
        state: of the checkpoint.
    """
    if what == "order":
        run = config.run.model_copy(update={"seed": config.run.seed + 1})
        return config.model_copy(update={"run": run}), state
    broken: dict[str, Any] = {}
    for part, values in state.items():
        if part.endswith("_optimizer") and what == "optimizer":
            broken[part] = {name: torch.zeros_like(values[name]) for name in values}
        elif f"{part}_optimizer" in state and what == "weights":
            broken[part] = {
                name: values[name].to(torch.bfloat16).to(values[name].dtype) for name in values
            }
    return config, state | broken
