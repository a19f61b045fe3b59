"""What goes wrong in a GAN's training, seen in the figures that it records anyway.

    alarms = Alarms(config.gan.objective, saved)
    for alarm in alarms.measured(step, figures): ...   # at each measurement: losses, scores, penalty
    for alarm in alarms.evaluated(step, figures): ...     # at each judgement of held-out pictures

Each rule gives a severity: at 1 its alarm begins, below `EASED` it is calm, and after `CALM` such looks in a row it has
ended: only then it is said again. One batch says little, so what is measured is seen through the medians of the last
`WINDOW` measurements. A run's first steps are no alarm: a rule asks for what had been there and is lost, or for what no
sound critic shows at any time.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

WINDOW = 9  # measurements
BEGINNING = 24  # measurements in which a critic comes to what it is
WATCHED = (
    "critic_loss",
    "gradient_penalty",
    "gap",
    "width",
)  # the gap: real_score - fake_score, and its width without the sign
LONG, LONG_STEPS = (
    100,
    1000,
)  # measurements, and steps, in which a generator has followed its critic, if it can
EASED = 0.7
CALM = {"measured": WINDOW, "evaluated": 1}

# The loss of a critic that scores every picture alike, at the best such score: 0.5 for lsgan, 0 for the others.
BLIND = {"lsgan": 0.25, "hinge": 2.0, "non-saturating": 2 * math.log(2)}

Finding = tuple[str, float, str]  # kind, severity, message


@dataclass(frozen=True)
class Alarm:
    """Something has begun to go wrong: when it was seen, what it is, and in a message its figures and what one does about it."""

    step: int
    kind: str  # collapse, divergence, critic dominates, critic gives no gradient
    message: str


@dataclass
class Memory:
    """What is remembered of a run, all of it JSON."""

    measurements: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    """The last of each tag in `WATCHED`."""
    gap: dict[str, float] | None = None
    """By how much real pictures outscored others: its peak, the low after it, and when."""
    early: float = 0.0
    """The widest gap of the beginning, whatever its sign."""
    best: dict[str, list[float]] = field(default_factory=dict)
    """Of each judged tag: the best so far and its step."""
    begun: dict[str, int] = field(default_factory=dict)
    """Alarms that have not ended: how often in a row they were calm."""


class Alarms:
    """Watches one run. The same figures give the same alarms, in one go or resumed from a saved state.

    Args:
        objective: gan.objective.
        saved: an earlier `state()`, to go on from.
    """

    def __init__(self, objective: str, saved: dict[str, Any] | None = None) -> None:
        self._blind = BLIND.get(objective)  # None: wgan-gp, whose scores have no scale
        self._seen = Memory(**copy.deepcopy(saved or {}))

    def state(self) -> dict[str, Any]:
        """All that `saved` takes, for JSON."""
        return asdict(self._seen)

    def measured(self, step: int, figures: dict[str, float]) -> list[Alarm]:
        """The alarms that a measurement sets off.

        Args:
            figures: critic_loss, generator_loss, real_score and fake_score (means of the critic's scores), and
                gradient_penalty where there is a penalty; others only have to be finite.
        """
        if broken := _not_finite(step, figures):
            return broken
        self._seen.measurements += 1
        gap = figures["real_score"] - figures["fake_score"]
        for tag, value in {**figures, "gap": gap, "width": abs(gap)}.items():
            if tag in WATCHED:
                self._seen.recent[tag] = [*self._seen.recent.get(tag, []), value][-WINDOW:]
        if self._seen.measurements < WINDOW:
            return []
        now = {tag: median(values) for tag, values in self._seen.recent.items()}
        self._remember(step, now)
        now["step"] = step
        rules = self._wasserstein if self._blind is None else self._bounded
        return self._new(step, "measured", [*rules(now), *self._given_up(now)])

    def evaluated(self, step: int, figures: dict[str, float]) -> list[Alarm]:
        """The alarms that a judgement sets off.

        Args:
            figures: heldout_recall, heldout_coverage, heldout_modes, heldout_frechet_distance, as far as they are known,
                each with its `_floor`, and heldout_samples.
        """
        if broken := _not_finite(step, figures):
            return broken
        found = []
        for tag, rule in {
            "heldout_recall": _share_lost,
            "heldout_coverage": _share_lost,
            "heldout_modes": _modes_lost,
        }.items():
            if tag in figures:
                best, at = self._best_yet(tag, figures[tag], step)
                lost = f"{tag} fell from {best:.3g} at step {at:,.0f} to {figures[tag]:.3g} (floor {figures[f'{tag}_baseline']:.3g})"
                way_out = "the generator makes ever fewer kinds of pictures; start another run with a lower optim.lr or more gan.critic_steps"
                found.append(
                    (
                        "collapse",
                        rule(
                            best,
                            figures[tag],
                            figures[f"{tag}_baseline"],
                            figures["heldout_samples"],
                        ),
                        f"{lost}: {way_out}",
                    )
                )
        tag = "heldout_frechet_distance"
        if tag in figures:
            best, at = self._best_yet(tag, figures[tag], step, lower=True)
            # The floor is the noise of so many samples.
            severity = figures[tag] / (3 * (best + figures[f"{tag}_baseline"]))
            risen = f"{tag} rose from {best:.3g} at step {at:,.0f} to {figures[tag]:.3g}"
            found.append(
                ("divergence", severity, f"{risen}: start another run with a lower optim.lr")
            )
        return self._new(step, "evaluated", found)

    # ------------------------------------------------------------ what is remembered

    def _remember(self, step: int, now: dict[str, float]) -> None:
        """The gap's peak and the lowest since. Once the gap has halved, the peak stays: what passes it then has come back."""
        gap, beginning = now["gap"], self._seen.measurements <= BEGINNING
        if beginning:
            self._seen.early = max(self._seen.early, now["width"])
        if self._seen.gap is None or (
            gap > self._seen.gap["peak"]
            and (beginning or self._seen.gap["low"] > self._seen.gap["peak"] / 2)
        ):
            self._seen.gap = {"peak": gap, "peak_step": step, "low": gap, "low_step": step}
        elif gap < self._seen.gap["low"]:
            self._seen.gap |= {"low": gap, "low_step": step}

    def _best_yet(self, tag: str, value: float, step: int, lower: bool = False) -> list[float]:
        if tag not in self._seen.best or (
            value < self._seen.best[tag][0] if lower else value > self._seen.best[tag][0]
        ):
            self._seen.best[tag] = [value, step]
        return self._seen.best[tag]

    def _new(self, step: int, seen: str, found: Iterable[Finding]) -> list[Alarm]:
        """Of each kind the worst, where it begins."""
        alarms = []
        worst: dict[str, Finding] = {}
        for finding in found:
            worst[finding[0]] = max(worst.get(finding[0], finding), finding, key=lambda one: one[1])
        for kind, severity, message in worst.values():
            name = f"{seen}: {kind}"
            if severity >= 1 and name not in self._seen.begun:
                alarms.append(Alarm(step, kind, message))
            if severity >= 1 or name in self._seen.begun:
                self._seen.begun[name] = (
                    self._seen.begun.get(name, 0) + 1 if severity < EASED else 0
                )
            if self._seen.begun.get(name) == CALM[seen]:
                del self._seen.begun[name]
            elif kind == "divergence" and name in self._seen.begun:
                break  # what a critic that has diverged says besides means nothing
        return alarms

    # ------------------------------------------------------------ rules on medians of what is measured

    def _given_up(self, now: dict[str, float]) -> Iterator[Finding]:
        """The critic no longer tells real pictures from generated ones."""
        assert self._seen.gap is not None
        peak, gap = self._seen.gap["peak"], now["gap"]
        severity = (
            _ratio(0.01 * max(peak, 0.0), gap) if self._seen.measurements >= BEGINNING else 0.0
        )
        way_out = "give it more gan.critic_steps, or a higher optim.critic_lr than the generator's optim.lr"
        if "gradient_penalty" not in now:
            way_out = "nothing holds the two together; set gan.penalty_weight"
        is_now = f"real_score is {abs(gap):.3g} {'above' if gap > 0 else 'below'} fake_score"
        was = (
            f"was {peak:.3g} above it at step {self._seen.gap['peak_step']:,}"
            if peak > 0
            else "never was above it"
        )
        yield "critic gives no gradient", severity, f"{is_now} and {was}: {way_out}"

    def _wasserstein(self, now: dict[str, float]) -> Iterator[Finding]:
        """WGAN: the gap is the estimate of the Wasserstein distance."""
        assert self._seen.gap is not None
        gap, width, low, peak = (
            now["gap"],
            now["width"],
            self._seen.gap["low"],
            self._seen.gap["peak"],
        )
        penalty = now.get("gradient_penalty")
        if penalty is None:
            severity = (
                _ratio(width, 5 * self._seen.early) if self._seen.measurements > BEGINNING else 0.0
            )
            grown = f"scores of real and generated pictures lie {width:.3g} apart, in the run's beginning {self._seen.early:.3g} at most"
            yield (
                "divergence",
                severity,
                f"{grown}: nothing holds the critic's slopes; set gan.penalty_weight, 10 by the paper",
            )
        else:
            # At its best a critic pays less than half of the distance as penalty, whatever the weight: with slopes s it has
            # s W - weight (s - 1)^2, the largest at s - 1 = W / (2 weight).
            paid = now["critic_loss"] + gap
            severity = min(_ratio(paid, width), penalty / 2)
            outweighs = f"gradient_penalty, {penalty:.3g}, outweighs the wasserstein_distance of {gap:.3g} that it stands for"
            yield (
                "divergence",
                severity,
                f"{outweighs}: the critic overshoots; use a lower optim.lr, or optim.critic_lr",
            )
            # Slopes near 0 cost 1 each, and tell next to nothing apart; slopes near 2 cost as much, and tell a lot.
            flat = (
                penalty / 0.8
                if penalty <= 1 and width < paid / 10 and self._seen.measurements >= BEGINNING
                else 0.0
            )
            message = f"gradient_penalty is {penalty:.3g}, the critic scores every picture alike: its optim.critic_lr is too low, or broke it"
            yield "critic gives no gradient", flat, message
        won, stuck = 0.0, 0.0
        if self._seen.measurements > BEGINNING and low <= peak / 2:
            won = gap / (3 * peak) if low > 0 else 0.0
        elif self._seen.measurements > LONG and now["step"] >= LONG_STEPS:
            stuck = gap / (0.9 * peak)
        risen = f"wasserstein_distance rose from {low:.3g} at step {self._seen.gap['low_step']:,} to {gap:.3g}, far past its first {peak:.3g}"
        way_out = (
            "the generator no longer follows; use a lower optim.critic_lr or fewer gan.critic_steps"
        )
        yield "critic dominates", won, f"{risen}: {way_out}"
        still = f"wasserstein_distance is {gap:.3g} and was hardly more at its most, {peak:.3g} at step {self._seen.gap['peak_step']:,}"
        yield (
            "critic dominates",
            stuck,
            f"{still}: the generator does not follow; use a lower optim.critic_lr than its optim.lr",
        )

    def _bounded(self, now: dict[str, float]) -> Iterator[Finding]:
        """LSGAN, hinge, non-saturating: what the loss of a critic that knows nothing is, and that of one that is sure, is known."""
        assert self._blind is not None
        loss = now["critic_loss"]
        times = f"critic_loss is {loss:.3g}, and {self._blind:.3g} is that of a critic that knows nothing"
        high = sorted(self._seen.recent["critic_loss"])[-WINDOW // 3 :][
            0
        ]  # every third measurement: it swings
        wild = f"critic_loss comes to {high:.3g} and more, and {self._blind:.3g} is that of a critic that knows nothing"
        yield (
            "divergence",
            high / (4 * self._blind),
            f"{wild}: use a lower optim.lr, or a larger gan.penalty_weight",
        )
        blind = (
            _ratio(0.01 * self._blind, abs(self._blind - loss))
            if self._seen.measurements >= BEGINNING
            else 0.0
        )
        yield (
            "critic gives no gradient",
            blind,
            f"{times}: raise optim.critic_lr, or give it more gan.critic_steps",
        )
        sure = "it is always right, and the generator learns nothing more; use a larger gan.penalty_weight or a lower optim.critic_lr"
        won = (
            _ratio(0.05 * self._blind, loss) if self._seen.measurements >= BEGINNING else 0.0
        )  # a first generator is easily seen through
        yield "critic dominates", won, f"{times}: {sure}"


def _not_finite(step: int, figures: dict[str, float]) -> list[Alarm]:
    """The first figure that is NaN or infinite: always said, since it ends the run."""
    wrong = [
        Alarm(step, "divergence", f"{tag} is {value}; use a lower optim.lr")
        for tag, value in figures.items()
        if not math.isfinite(value)
    ]
    return wrong[:1]


# ---------------------------------------------------------------- rules on judgements


def _share_lost(best: float, value: float, floor: float, samples: float) -> float:
    """A share of `samples` pictures that is half of what it was, by more than chance (four standard deviations)."""
    chance = 4 * math.sqrt(best * (1 - best) / samples)
    there = best >= 0.1 * floor
    return _ratio(best / 2, value) if there and best - value > chance else 0.0


def _modes_lost(best: float, value: float, floor: float, samples: float) -> float:
    """30 % of the modes, two at least: one comes and goes."""
    return _ratio(0.7 * best, value) if best - value >= 2 else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.inf
