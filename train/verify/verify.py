"""Whether a killed run ends as if nothing had been: `python -m train verify-resume gpt|gan [--config ...] [--kills ...]`.

The run is made twice: straight, and with kill -9 of its workers and its driver. What both recorded of each step, and every
tensor of their checkpoints, is then compared. Each run is driven by a process of its own, so that it can be killed too.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

from cluster import cli, storage
from train.config import sections as configs
from train.config.sections import Config
from train.data.order import rng
from train.run import checkpoint
from train.run import recorder as metrics
from train.verify import compare, faults
from train.verify.faults import Fault

STEPS = 24
GPU_TOLERANCE = 1e-3  # CUDA promises no order of summation
KILLS = ("upload", "worker", "driver", "random")
POLL_S = 0.2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kill:
    """A fault that happened, and how the run went on."""

    fault: Fault
    step: int
    resumed_from: int | None  # None: no step was left to be done
    recovery_s: float | None  # until the gradients of the next step were there


@dataclass(frozen=True)
class Verdict:
    """What a comparison of a straight run and a killed one came to."""

    equal: bool  # within the tolerance: 0 is bit for bit
    largest_difference: (
        float  # absolute, over all figures and tensors; infinite where one of the two has no value
    )
    first_difference: str | None  # beyond the tolerance
    kills: list[Kill]
    figures: int  # how many were compared
    tensors: int
    straight: str  # the runs' names
    killed: str

    @property
    def recoveries_s(self) -> list[float]:
        """From each kill to the first step after it."""
        return [kill.recovery_s for kill in self.kills if kill.recovery_s is not None]


class Unproven(RuntimeError):
    """A run failed, or was not killed as planned, so that a comparison would prove nothing; the message is one sentence."""


def verify(
    config: Config,
    root: str,
    plan: list[Fault],
    tolerance: float = 0.0,
    keep: bool = False,
    straight: str | None = None,
    sabotage: str | None = None,
    say: Say = lambda _: None,
) -> Verdict:
    """Trains `config` with the faults of `plan` and compares it with an uninterrupted run.

    Of the config, the run's name, what is logged and how many checkpoints are kept are replaced; the mathematics stays.

    Args:
        root: the storage, a folder or URI.
        plan: the kills; all happen to one run.
        tolerance: the largest difference allowed, relative to the largest magnitude in the straight run's tensor or figure.
        keep: the runs stay; otherwise those made here go when they are equal.
        straight: the name of an earlier straight run of the same config to compare with; by default one is made.
        sabotage: what each restore gets wrong on purpose, one of `faults.SABOTAGES`.
        say: is told what is being done, a line a phase.

    Raises:
        ValueError: the plan does not fit the config, or the config is wrong.
        Unproven: a run failed, a kill of the plan never happened, or a sabotage had nothing to break.
    """
    _refuse_unfit(config, plan)
    root = storage.absolute(root)
    stem = f"verify-{time.strftime('%Y%m%d-%H%M%S')}"
    if straight is None:
        calm = f"{stem}-straight"
        say(f"straight: run {calm}, {config.steps} steps")
        _complete(_watched(config, calm), root)
    else:
        calm = straight
        _refuse_incomplete(config, root, calm)
    killed = f"{stem}-killed"
    say(f"killed: run {killed}, {config.steps} steps, {len(plan)} kills")
    _complete(_watched(config, killed, len(plan)), root, plan, sabotage, say)
    kills = _kills(_uri(root, killed), plan)
    if sabotage and not any(kill.resumed_from for kill in kills):
        raise Unproven(
            f"nothing was restored, so nothing was broken: every kill of run {killed} came before its first checkpoint"
        )
    say(f"comparing {config.steps} steps")
    verdict = judge(_uri(root, calm), _uri(root, killed), kills, tolerance)
    if verdict.equal and not keep:
        for name in [killed] if straight else [calm, killed]:
            storage.delete(_uri(root, name))
    return verdict


def _uri(root: str, name: str) -> str:
    return storage.join(root, "runs", name)


def _refuse_unfit(config: Config, plan: list[Fault]) -> None:
    if not plan:
        raise ValueError("no kill is planned, so there is nothing to verify")
    for fault in plan:
        if fault.moment not in faults.MOMENTS or fault.target not in faults.TARGETS:
            raise ValueError(
                f"{fault} has no such moment or target: use one of {faults.MOMENTS} and one of {faults.TARGETS}"
            )
        if not 1 <= fault.step <= config.steps:
            raise ValueError(
                f"a kill is planned at step {fault.step}, and the run has steps 1 to {config.steps}: plan it there"
            )
        if not 0 <= fault.rank < config.parallel.workers:
            raise ValueError(
                f"worker {fault.rank} is to be killed, and parallel.workers is {config.parallel.workers}: their ranks begin with 0"
            )


def _refuse_incomplete(config: Config, root: str, straight: str) -> None:
    place = storage.join(_uri(root, straight), "summary.json")
    steps = storage.read_json(place)["steps"] if storage.exists(place) else 0
    if steps != config.steps:
        raise ValueError(
            f"run {straight} in {root} has completed {steps} steps, and {config.steps} are to be compared: make it anew"
        )


def _with(config: Config, values: dict[str, Any]) -> Config:
    return configs.build(
        configs.KINDS[config.kind],
        configs.merge(config.model_dump(), configs.nested(values)),
        "verify-resume",
    )


def _watched(config: Config, name: str, kills: int = 0) -> Config:
    """The config of a run that writes down every step and keeps every checkpoint, so that all can be compared."""
    return _with(
        config,
        {
            "run.name": name,
            "run.resume": "auto",
            "run.max_failures": config.run.max_failures + kills,
            "checkpoint.keep_last": config.steps,
            "log.every": 1,
            "log.eval_every": config.steps,
            "log.sample_every": config.steps,
            "log.wandb": "off",
        },
    )


# ---------------------------------------------------------------- driving


def _complete(
    config: Config,
    root: str,
    plan: list[Fault] | None = None,
    sabotage: str | None = None,
    say: Say = lambda _: None,
) -> None:
    """Drives a run to its end, started again each time the plan kills its driver."""
    plan, name, carried_out = plan or [], str(config.run.name), set[int]()
    due = {number for number, fault in enumerate(plan) if fault.target == "driver"}
    while (number := _drive(config, root, plan, sabotage, due - carried_out)) is not None:
        carried_out.add(number)
        if checkpoint.newest(_uri(root, name)) is not None:
            config = _with(config, {"run.resume": "must"})
        say(f"the driver of run {name} was killed: it is started again")


def _drive(
    config: Config, root: str, plan: list[Fault], sabotage: str | None, due: set[int]
) -> int | None:
    """One driver, from its start to its end: which fault of those that are `due` killed it, or None where the run is complete."""
    order = {
        "kind": config.kind,
        "config": config.model_dump(),
        "root": root,
        "plan": [asdict(fault) for fault in plan],
        "sabotage": sabotage,
    }
    with tempfile.TemporaryFile("w+") as complaints:
        driver = subprocess.Popen(
            [sys.executable, "-m", "train.verify.verify", json.dumps(order)],
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            text=True,
        )
        try:
            while driver.poll() is None:
                for number in due:
                    if storage.exists(faults.place(_uri(root, str(config.run.name)), number)):
                        driver.kill()
                        driver.wait()
                        return number
                time.sleep(POLL_S)
        finally:
            _end(driver)
        if driver.returncode == 0:
            return None
        sentence = _sentence(complaints)
    if driver.returncode == 2:
        raise ValueError(sentence)
    raise Unproven(sentence)


def _end(driver: subprocess.Popen[str]) -> None:
    """A driver that is told to end takes its private cluster along."""
    if driver.poll() is None:
        driver.terminate()
        try:
            driver.wait(timeout=20)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()


def _sentence(complaints: IO[str]) -> str:
    complaints.seek(0)
    lines = [line for line in complaints.read().splitlines() if line.strip()] or ["without a word"]
    said = next(
        (line for line in reversed(lines) if line.startswith("error: ")),
        f"a driver ended: {lines[-1]}",
    )
    return said.removeprefix("error: ")


def drive(argv: list[str]) -> int:
    """What the process of a driver does: the order that `_drive` wrote."""
    from train import launch

    order = json.loads(argv[0])
    config = configs.build(configs.KINDS[order["kind"]], order["config"], "verify-resume")
    try:
        launch.fit(
            config,
            order["root"],
            quiet=True,
            plan=[Fault(**values) for values in order["plan"]],
            sabotage=order["sabotage"],
        )
    except launch.TrainingFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def _kills(run_uri: str, plan: list[Fault]) -> list[Kill]:
    """What became of each fault of a plan.

    Raises:
        Unproven: one never happened.
    """
    found = []
    for number, fault in enumerate(plan):
        place = faults.place(run_uri, number)
        if not storage.exists(place):
            raise Unproven(
                f"the kill of {describe(fault)} never happened, so nothing is proven; the runs are kept, see {run_uri}"
            )
        happened = storage.read_json(place)
        recovery_s = happened["recovered"] - happened["time"] if "recovered" in happened else None
        found.append(
            (
                happened["time"],
                Kill(fault, happened["step"], happened.get("resumed_from"), recovery_s),
            )
        )
    return [kill for _, kill in sorted(found, key=lambda pair: pair[0])]


def describe(fault: Fault, step: int | None = None) -> str:
    """A kill in words.

    Args:
        step: where it happened; by default where it was planned.
    """
    who = "the driver" if fault.target == "driver" else f"worker {fault.rank}"
    step = step or fault.step
    if fault.moment == "upload":
        return f"{who} in the upload of step {step}'s checkpoint"
    return (
        f"{who} {fault.later:.2f} of a step after step {step}'s gradients"
        if fault.later
        else f"{who} in the middle of step {step}"
    )


# ---------------------------------------------------------------- judging


def judge(straight_uri: str, killed_uri: str, kills: list[Kill], tolerance: float) -> Verdict:
    """Compares two runs that are complete.

    Raises:
        Unproven: the straight one recorded nothing to compare.
    """
    figures = list(compare.figures(metrics.read(straight_uri), metrics.read(killed_uri)))
    tensors = list(compare.checkpoints(straight_uri, killed_uri))
    if not figures or not tensors:
        raise Unproven(
            f"{straight_uri} has {len(figures)} figures and {len(tensors)} tensors to compare: is that a run?"
        )
    beyond = sorted(
        (item for item in figures + tensors if not item.within(tolerance)),
        key=lambda item: item.step,
    )
    return Verdict(
        equal=not beyond,
        largest_difference=max(item.absolute for item in figures + tensors),
        first_difference=_first(beyond[0], kills) if beyond else None,
        kills=kills,
        figures=len(figures),
        tensors=len(tensors),
        straight=straight_uri.rsplit("/", 1)[-1],
        killed=killed_uri.rsplit("/", 1)[-1],
    )


def _first(item: compare.Compared, kills: list[Kill]) -> str:
    """The difference in words, with the kill after which the run went on to this step."""
    before = [
        kill for kill in kills if kill.resumed_from is not None and kill.resumed_from < item.step
    ]
    after = (
        f" (after the kill of {describe(before[-1].fault, before[-1].step)}, gone on from step {before[-1].resumed_from})"
        if before
        else ""
    )
    return f"{item.what}: {item.difference}{after}"


# ---------------------------------------------------------------- the command


def shortened(config: Config, steps: int) -> Config:
    """The config with `steps` steps and four checkpoints on the way."""
    return _with(config, {"steps": steps, "checkpoint.every": steps // 4})


def plan_kills(names: list[str], config: Config, seed: int = 0) -> list[Fault]:
    """Kills between the checkpoints of a run.

    Args:
        names: of KILLS, as often as wanted: "upload" in the second checkpoint, "worker" between gradients and update after it,
            "driver" after the third one, "random" anywhere, of any worker.
        seed: of what is random.

    Raises:
        ValueError: there is no kill of a name.
    """
    every, workers, draw = config.checkpoint.every, config.parallel.workers, rng(seed)
    half = (every + 1) // 2
    # A checkpoint begins when the one before it is complete: from the second one on there is one to go on from.
    known = {
        "upload": lambda: Fault(2 * every, "upload"),
        "worker": lambda: Fault(2 * every + half, rank=workers - 1),
        "driver": lambda: Fault(3 * every + half, target="driver"),
        "random": lambda: Fault(
            int(draw.integers(2, config.steps - 1)),
            rank=int(draw.integers(workers)),
            later=float(draw.random()),
        ),
    }
    for name in names:
        if name not in known:
            raise ValueError(
                f"--kills: there is no kill {name!r}{configs.nearest(name, list(KILLS))}: use {', '.join(KILLS)}"
            )
    return [known[name]() for name in names]


def command(argv: list[str]) -> int:
    """`python -m train verify-resume`: 0 where the runs are equal, 1 where they are not or nothing could be proven."""
    options = argparse.ArgumentParser(
        prog="python -m train verify-resume",
        allow_abbrev=False,
        description="Proves on your own config that kill -9 and resume change nothing: trains straight and with kills, and compares. "
        "Every key of `python -m train gpt --help` may follow.",
    )
    options.add_argument("kind", choices=configs.KINDS)
    options.add_argument("--config", help="a preset, or a YAML file with the same keys")
    options.add_argument(
        "--storage",
        default=cli.storage_default(),
        help="where data and runs go (KILN_STORAGE; default ./kiln)",
    )
    options.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="of each run, with four checkpoints (default %(default)s)",
    )
    options.add_argument(
        "--kills",
        default=",".join(KILLS),
        help="which, in any number: " + ", ".join(KILLS) + " (default: each once)",
    )
    options.add_argument("--seed", type=int, default=0, help="decides the random moments")
    options.add_argument(
        "--tolerance",
        type=float,
        help=f"relative; by default 0 (bit for bit), {GPU_TOLERANCE:g} on GPUs",
    )
    options.add_argument(
        "--keep", action="store_true", help="keep both runs also where they are equal"
    )
    options.add_argument(
        "--break-restore",
        choices=faults.SABOTAGES,
        help="resume wrongly on purpose, to see that it is found",
    )
    given, rest = options.parse_known_args(argv)
    if given.steps < 8:
        raise ValueError(
            f"--steps is {given.steps}: with fewer than 8 there is no room for kills between four checkpoints"
        )
    config = shortened(
        configs.load(given.kind, given.config, configs.parse(given.kind, rest)), given.steps
    )
    plan = plan_kills(given.kills.split(","), config, given.seed)
    tolerance = (
        (GPU_TOLERANCE if config.parallel.gpu else 0.0)
        if given.tolerance is None
        else given.tolerance
    )
    for fault in plan:
        print(f"planned: kill -9 of {describe(fault)}")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # the driver that runs must end too
    try:
        verdict = verify(
            config, given.storage, plan, tolerance, given.keep, None, given.break_restore, say=_say
        )
    except Unproven as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(report(verdict, config.steps, tolerance))
    if not any(kill.resumed_from for kill in verdict.kills):
        print(
            "error: every kill came before the first checkpoint, so nothing was restored or proven: use more --steps, other --kills, or another --seed",
            file=sys.stderr,
        )
        return 1
    return 0 if verdict.equal else 1


def _say(line: str) -> None:
    print(line, flush=True)


def report(verdict: Verdict, steps: int, tolerance: float = 0.0) -> str:
    """The kills as a table, and the verdict."""
    rows = [("kill -9 of", "went on from", "seconds to the next step")]
    for kill in verdict.kills:
        went_on = (
            ("its end", "-")
            if kill.resumed_from is None
            else (f"step {kill.resumed_from}", f"{kill.recovery_s:.1f}")
        )
        rows.append((describe(kill.fault, kill.step), *went_on))
    width = max(len(row[0]) for row in rows)
    lines = [f"{who:<{width}}  {where:<12}  {seconds}" for who, where, seconds in rows]
    compared = f"{steps} steps, {len(verdict.kills)} kills, {verdict.figures} figures and {verdict.tensors} tensors"
    if verdict.equal and verdict.largest_difference == 0:
        return "\n".join([*lines, f"equal: {compared}, bit for bit"])
    largest = f"the largest difference is {verdict.largest_difference:.1e}"
    if verdict.equal:
        return "\n".join([*lines, f"equal: {compared} within {tolerance:g}, {largest}"])
    kept = f"the runs are kept: {verdict.straight}, {verdict.killed}"
    return "\n".join(
        [
            *lines,
            f"different: {verdict.first_difference}",
            f"{compared} were compared, {largest}; {kept}",
        ]
    )


if __name__ == "__main__":
    sys.exit(cli.run(drive))
