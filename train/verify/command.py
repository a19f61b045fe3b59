"""`python -m train verify-resume gpt|gan`: prove on your own config that a killed run ends as an
uninterrupted one does.

The config is trained twice: without interruption, and with kill -9 of its workers and its driver.
Then the metrics of every step and every tensor of every checkpoint are compared.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from cluster import cli, storage
from train.config import loader
from train.config.sections import Config
from train.data.order import rng
from train.run import summary
from train.verify import faults
from train.verify.driver import run_to_end, with_values
from train.verify.faults import Fault
from train.verify.options import GPU_TOLERANCE, KILLS
from train.verify.verdict import Unproven, Verdict, compare_runs, describe, kills_of, table

MIN_STEPS = 8


def verify(
    config: Config,
    root: str,
    plan: Sequence[Fault],
    tolerance: float = 0.0,
    keep: bool = False,
    uninterrupted: str | None = None,
    broken_restore: str | None = None,
    log: cli.Log = cli.no_log,
) -> Verdict:
    """Train `config` with the faults of `plan` and compare it with an uninterrupted run.

    The run's name, what is logged and how many checkpoints are kept are replaced; the mathematics
    is not changed.

    Args:
        config: the config.
        root: the storage, a folder or URI.
        plan: the kills; all happen to one run.
        tolerance: the largest difference allowed, relative to the largest magnitude in the
            uninterrupted run's tensor or metric.
        keep: keep the runs; otherwise those made here are deleted when they are equal.
        uninterrupted: the name of an earlier uninterrupted run of the same config; by default one
            is made.
        broken_restore: what each restore gets wrong, one of `options.BROKEN_RESTORES`.
        log: called with each progress message.

    Raises:
        ValueError: the plan does not fit the config, or the config is invalid.
        Unproven: a run failed, a planned kill did not happen, or nothing was restored that could
            have been broken.
    """
    _check_plan(config, plan)
    root = storage.absolute(root)
    stem = f"verify-{time.strftime('%Y%m%d-%H%M%S')}"
    made = []
    if uninterrupted is None:
        uninterrupted = f"{stem}-uninterrupted"
        made.append(uninterrupted)
        log(f"uninterrupted: run {uninterrupted}, {config.steps} steps")
        run_to_end(_recording_all(config, uninterrupted), root)
    else:
        _check_complete(config, root, uninterrupted)
    killed = f"{stem}-killed"
    made.append(killed)
    log(f"killed: run {killed}, {config.steps} steps, {len(plan)} kills")
    run_to_end(_recording_all(config, killed, len(plan)), root, plan, broken_restore, log)
    kills = kills_of(_uri(root, killed), plan)
    if broken_restore and not any(kill.resumed_from for kill in kills):
        raise Unproven(
            f"nothing was restored, so nothing was broken: every kill of run {killed} came before "
            "its first checkpoint"
        )
    log(f"comparing {config.steps} steps")
    verdict = compare_runs(_uri(root, uninterrupted), _uri(root, killed), kills, tolerance)
    if verdict.equal and not keep:
        for name in made:
            storage.delete(_uri(root, name))
    return verdict


def shortened(config: Config, steps: int) -> Config:
    """Return the config with `steps` steps and four checkpoints."""
    return with_values(config, {"steps": steps, "checkpoint.every": steps // 4})


def plan_kills(names: Sequence[str], config: Config, seed: int = 0) -> list[Fault]:
    """Return faults between the checkpoints of a run.

    Args:
        names: of `KILLS`, each any number of times: "upload" in the second checkpoint, "worker"
            between gradients and update after it, "driver" after the third one, "random" anywhere,
            of any worker.
        config: of the run.
        seed: of the random ones.

    Raises:
        ValueError: a name is unknown.
    """
    every, workers, draw = config.checkpoint.every, config.parallel.workers, rng(seed)
    half = (every + 1) // 2

    def random() -> Fault:
        step = int(draw.integers(2, config.steps - 1))
        return Fault(step, rank=int(draw.integers(workers)), delay=float(draw.random()))

    # A checkpoint begins when the one before it is complete: from the second one on there is one
    # to resume from.
    known: dict[str, Callable[[], Fault]] = {
        "upload": lambda: Fault(2 * every, "upload"),
        "worker": lambda: Fault(2 * every + half, rank=workers - 1),
        "driver": lambda: Fault(3 * every + half, target="driver"),
        "random": random,
    }
    for name in names:
        if name not in known:
            raise ValueError(
                f"--kills: there is no kill {name!r}{cli.nearest(name, KILLS)}: use "
                f"{', '.join(KILLS)}"
            )
    return [known[name]() for name in names]


def _uri(root: str, name: str) -> str:
    return storage.join(root, "runs", name)


def _check_plan(config: Config, plan: Sequence[Fault]) -> None:
    if not plan:
        raise ValueError("no kill is planned, so there is nothing to verify")
    for fault in plan:
        if fault.moment not in faults.MOMENTS or fault.target not in faults.TARGETS:
            raise ValueError(
                f"{fault} has an unknown moment or target: use one of {faults.MOMENTS} and one of "
                f"{faults.TARGETS}"
            )
        if not 1 <= fault.step <= config.steps:
            raise ValueError(
                f"a kill is planned at step {fault.step}, and the run has steps 1 to "
                f"{config.steps}: plan it there"
            )
        if not 0 <= fault.rank < config.parallel.workers:
            raise ValueError(
                f"worker {fault.rank} is to be killed, and parallel.workers is "
                f"{config.parallel.workers}: ranks begin with 0"
            )


def _check_complete(config: Config, root: str, uninterrupted: str) -> None:
    done = summary.read(_uri(root, uninterrupted))
    steps = done["steps"] if done else 0
    if steps != config.steps:
        raise ValueError(
            f"run {uninterrupted} in {root} has completed {steps} steps, and {config.steps} are to "
            "be compared: train it again"
        )


def _recording_all(config: Config, name: str, kills: int = 0) -> Config:
    """Return the config of a run that records every step and keeps every checkpoint."""
    values = {
        "run.name": name,
        "run.resume": "auto",
        "run.max_failures": config.run.max_failures + kills,
        "checkpoint.keep_last": config.steps,
        "log.every": 1,
        "log.eval_every": config.steps,
        "log.sample_every": config.steps,
        "log.wandb": "off",
    }
    return with_values(config, values)


# ---- the command


def run(arguments: argparse.Namespace, keys: list[str]) -> int:
    """Run `verify-resume`.

    Args:
        arguments: the options.
        keys: the rest of the command line, the config's keys.

    Returns:
        0 where the runs are equal; 1 where they are not, or nothing could be proven.
    """
    if arguments.steps < MIN_STEPS:
        raise ValueError(
            f"--steps is {arguments.steps}: {MIN_STEPS} or more leave room for kills between four "
            "checkpoints"
        )
    overrides = loader.parse(arguments.kind, keys)
    config = loader.load(arguments.kind, arguments.config, overrides)
    config = shortened(config, arguments.steps)
    plan = plan_kills(arguments.kills.split(","), config, arguments.seed)
    tolerance = arguments.tolerance
    if tolerance is None:
        tolerance = GPU_TOLERANCE if config.parallel.gpu else 0.0
    log = cli.no_log if arguments.json else cli.log
    for fault in plan:
        log(f"planned: kill -9 of {describe(fault)}")
    # The driver that runs must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    root, broken = cli.storage_of(arguments), arguments.break_restore
    try:
        verdict = verify(config, root, plan, tolerance, arguments.keep, None, broken, log)
    except Unproven as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if arguments.json:
        cli.print_json(asdict(verdict))
    else:
        print(table(verdict, config.steps, tolerance))
    if not any(kill.resumed_from for kill in verdict.kills):
        print(
            "error: every kill came before the first checkpoint, so nothing was restored or "
            "proven: use more --steps, other --kills, or another --seed",
            file=sys.stderr,
        )
        return 1
    return 0 if verdict.equal else 1
