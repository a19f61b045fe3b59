"""Detect collapse, divergence and critic saturation in the metrics that a GAN's run records.

    alarms = Alarms(config.gan.objective, saved)
    for alarm in alarms.measured(step, metrics): ...   # losses, scores and penalty of a step
    for alarm in alarms.evaluated(step, metrics): ...  # an evaluation on held-out images

An alarm starts when a rule (see `train.gan.alarm_rules`) finds a severity of 1. It ends after
`CALM_READINGS` in a row with a severity below `CALM`; only then the same alarm can start again.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from train.gan import alarm_rules
from train.gan.alarm_history import WINDOW, History
from train.gan.alarm_rules import CONSTANT_CRITIC_LOSS, Finding

CALM = 0.7
CALM_READINGS = {"measured": WINDOW, "evaluated": 1}


@dataclass(frozen=True)
class Alarm:
    """Something that has started to go wrong in `step`; the message has the numbers and a hint."""

    step: int
    kind: str  # collapse, divergence, critic dominates, critic gives no gradient
    message: str


class Alarms:
    """The alarms of one run.

    The same metrics give the same alarms, whether or not the run was interrupted and resumed.

    Args:
        objective: gan.objective.
        saved: an earlier `state()`, to resume from.
    """

    def __init__(self, objective: str, saved: Mapping[str, Any] | None = None) -> None:
        # None for wgan-gp, whose scores have no scale.
        self._constant_loss = CONSTANT_CRITIC_LOSS.get(objective)
        self._history = History(**copy.deepcopy(dict(saved or {})))

    def state(self) -> dict[str, object]:
        """Return what `saved` takes, JSON-compatible."""
        return asdict(self._history)

    def measured(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that start with a measurement.

        Args:
            step: of the measurement.
            metrics: critic_loss, generator_loss, real_score and fake_score (means of the critic's
                scores), and gradient_penalty where there is a penalty; others need only be finite.
        """
        if alarms := _not_finite(step, metrics):
            return alarms
        medians = self._history.add(step, metrics)
        if medians is None:
            return []
        if self._constant_loss is None:
            findings = alarm_rules.wasserstein(medians, self._history, step)
        else:
            findings = alarm_rules.bounded_loss(medians, self._history, self._constant_loss)
        without_gap = alarm_rules.critic_without_gap(medians, self._history)
        return self._started(step, "measured", [*findings, *without_gap])

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that start with an evaluation.

        Args:
            step: of the evaluation.
            metrics: heldout_recall, heldout_coverage, heldout_modes and heldout_frechet_distance,
                as far as they are known, each with its `_baseline`, and heldout_samples.
        """
        if alarms := _not_finite(step, metrics):
            return alarms
        collapse = alarm_rules.collapse(metrics, self._history, step)
        worse_images = alarm_rules.worse_images(metrics, self._history, step)
        return self._started(step, "evaluated", [*collapse, *worse_images])

    def _started(self, step: int, source: str, findings: Iterable[Finding]) -> list[Alarm]:
        """Return the alarms that start, one per kind, and update which are active."""
        alarms, active = [], self._history.active
        for kind, severity, message in _worst_of_each_kind(findings):
            key = f"{source}: {kind}"
            if severity >= 1 and key not in active:
                alarms.append(Alarm(step, kind, message))
            if severity >= 1 or key in active:
                active[key] = active.get(key, 0) + 1 if severity < CALM else 0
            if active.get(key) == CALM_READINGS[source]:
                del active[key]
            elif kind == "divergence" and key in active:
                break  # the other metrics of a diverged critic mean nothing
        return alarms


def _worst_of_each_kind(findings: Iterable[Finding]) -> list[Finding]:
    worst: dict[str, Finding] = {}
    for finding in findings:
        if finding.kind not in worst or finding.severity > worst[finding.kind].severity:
            worst[finding.kind] = finding
    return list(worst.values())


def _not_finite(step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Return an alarm for the first metric that is NaN or infinite; it ends the run, so it is never
    suppressed as already active."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            message = (
                f"{name} is {value}: training has diverged; start another run with a lower optim.lr"
            )
            return [Alarm(step, "divergence", message)]
    return []
