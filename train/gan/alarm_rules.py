"""Rules that detect a failing GAN in the metrics of its training.

A rule yields findings whose severity says how far the metrics are from healthy ones; an alarm
starts at a severity of 1. The first steps of a run cause no alarm: a rule compares the metrics with
the run's own best values, or with bounds that a working critic never crosses.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from train.gan.alarm_history import BEGINNING, WINDOW, History

LONG, LONG_STEPS = 100, 1000
"""Measurements and steps within which a generator reduces the gap if it follows its critic."""

CONSTANT_CRITIC_LOSS = {"lsgan": 0.25, "hinge": 2.0, "non-saturating": 2 * math.log(2)}
"""The least loss of a critic that scores all images alike: with 0.5 for lsgan, else with 0."""


class Finding(NamedTuple):
    """What a rule found."""

    kind: str  # collapse, divergence, critic dominates, critic gives no gradient
    severity: float
    message: str


# ---- rules on the medians of measurements


def critic_without_gap(medians: Mapping[str, float], history: History) -> Iterator[Finding]:
    """Find a critic that no longer separates real from generated images."""
    assert history.gap is not None
    peak, gap = history.gap["peak"], medians["gap"]
    severity = _ratio(0.01 * max(peak, 0.0), gap) if history.past_beginning else 0.0
    side = "above" if gap > 0 else "below"
    before = "was never above it"
    if peak > 0:
        before = f"was {peak:.3g} above it at step {history.gap['peak_step']:,}"
    hint = "raise gan.critic_steps, or set optim.critic_lr above the generator's optim.lr"
    if "gradient_penalty" not in medians:
        hint = "nothing bounds the critic's gradients, set gan.penalty_weight"
    yield Finding(
        "critic gives no gradient",
        severity,
        f"real_score is {abs(gap):.3g} {side} fake_score and {before}: the critic does not "
        f"separate real from generated images; {hint}",
    )


def wasserstein(medians: Mapping[str, float], history: History, step: int) -> Iterator[Finding]:
    """Apply the rules for WGAN, whose gap estimates the Wasserstein distance."""
    if "gradient_penalty" in medians:
        yield from _penalty(medians, history)
    else:
        yield from _unbounded_scores(medians, history)
    yield from _distance(medians["gap"], history, step)


def _unbounded_scores(medians: Mapping[str, float], history: History) -> Iterator[Finding]:
    """Find scores that grow without a penalty, in either direction."""
    width, early = medians["width"], history.early_width
    severity = _ratio(width, 5 * early) if history.measurements > BEGINNING else 0.0
    yield Finding(
        "divergence",
        severity,
        f"real_score and fake_score are {width:.3g} apart, and at most {early:.3g} in the run's "
        f"first {BEGINNING} measurements: nothing bounds the critic's gradients; set "
        "gan.penalty_weight (10 in the paper)",
    )


def _penalty(medians: Mapping[str, float], history: History) -> Iterator[Finding]:
    """Find a gradient penalty that is too large for its gap, or that of a constant critic."""
    gap, width, penalty = medians["gap"], medians["width"], medians["gradient_penalty"]
    # With gradient norms s and a distance W, a critic maximizes s W - weight (s - 1)^2. At the
    # maximum, s - 1 = W / (2 weight): the weighted penalty is below W / 2 for any weight.
    weighted = medians["critic_loss"] + gap
    yield Finding(
        "divergence",
        min(_ratio(weighted, width), penalty / 2),
        f"gradient_penalty is {penalty:.3g}, {weighted:.3g} with its weight, more than the "
        f"wasserstein_distance of {gap:.3g}: the critic overshoots; use a lower optim.lr, or "
        "optim.critic_lr",
    )
    # Gradient norms near 0 and near 2 both cost a penalty of 1. With those near 2 the gap is wide.
    constant = penalty <= 1 and width < weighted / 10 and history.past_beginning
    yield Finding(
        "critic gives no gradient",
        penalty / 0.8 if constant else 0.0,
        f"gradient_penalty is {penalty:.3g}, and the scores differ by {width:.3g}: the critic "
        "scores all images alike; optim.critic_lr is too low for it to learn, or so high that it "
        "broke the critic",
    )


def _distance(gap: float, history: History, step: int) -> Iterator[Finding]:
    """Find a distance that rises again after it had halved, or that never falls."""
    assert history.gap is not None
    low, low_step = history.gap["low"], history.gap["low_step"]
    peak, peak_step = history.gap["peak"], history.gap["peak_step"]
    risen, constant = 0.0, 0.0
    if history.measurements > BEGINNING and low <= peak / 2:
        risen = gap / (3 * peak) if low > 0 else 0.0
    elif history.measurements > LONG and step >= LONG_STEPS:
        constant = gap / (0.9 * peak)
    yield Finding(
        "critic dominates",
        risen,
        f"wasserstein_distance rose from {low:.3g} at step {low_step:,} to {gap:.3g}, far above "
        f"its first peak of {peak:.3g}: the generator no longer follows the critic; use a lower "
        "optim.critic_lr or fewer gan.critic_steps",
    )
    yield Finding(
        "critic dominates",
        constant,
        f"wasserstein_distance is {gap:.3g} and has hardly fallen from its peak of {peak:.3g} at "
        f"step {peak_step:,}: the generator does not follow the critic; set optim.critic_lr below "
        "the generator's optim.lr",
    )


def bounded_loss(
    medians: Mapping[str, float], history: History, constant_loss: float
) -> Iterator[Finding]:
    """Apply the rules for LSGAN, hinge and non-saturating losses, whose scale is known.

    Args:
        medians: of the watched metrics.
        history: of the run.
        constant_loss: the objective's entry in `CONSTANT_CRITIC_LOSS`.
    """
    loss = medians["critic_loss"]
    # The loss of a diverging critic swings: the median misses what every third measurement shows.
    high = sorted(history.recent["critic_loss"])[-WINDOW // 3]
    reference = f"a critic that scores all images alike has {constant_loss:.3g}"
    yield Finding(
        "divergence",
        high / (4 * constant_loss),
        f"critic_loss reaches {high:.3g} and more in a third of the measurements, and {reference}: "
        "use a lower optim.lr, or a larger gan.penalty_weight",
    )
    constant, certain = 0.0, 0.0
    if history.past_beginning:  # an untrained generator is easily recognized
        constant = _ratio(0.01 * constant_loss, abs(constant_loss - loss))
        certain = _ratio(0.05 * constant_loss, loss)
    yield Finding(
        "critic gives no gradient",
        constant,
        f"critic_loss is {loss:.3g}, and {reference}: raise optim.critic_lr or gan.critic_steps",
    )
    yield Finding(
        "critic dominates",
        certain,
        f"critic_loss is {loss:.3g}, and {reference}: the critic is always right and the generator "
        "learns nothing more; use a larger gan.penalty_weight or a lower optim.critic_lr",
    )


# ---- rules on evaluations


def collapse(metrics: Mapping[str, float], history: History, step: int) -> Iterator[Finding]:
    """Find a loss of variety: recall, coverage or modes far below the run's best."""
    for name, severity_of in {
        "heldout_recall": _lost_share,
        "heldout_coverage": _lost_share,
        "heldout_modes": _lost_modes,
    }.items():
        if name not in metrics:
            continue
        value, baseline = metrics[name], metrics[f"{name}_baseline"]
        best, best_step = history.update_best(name, value, step)
        yield Finding(
            "collapse",
            severity_of(best, value, baseline, metrics["heldout_samples"]),
            f"{name} fell from {best:.3g} at step {best_step:,} to {value:.3g} (baseline "
            f"{baseline:.3g}): the generated images lose variety; start another run with a lower "
            "optim.lr or more gan.critic_steps",
        )


def worse_images(metrics: Mapping[str, float], history: History, step: int) -> Iterator[Finding]:
    """Find a Frechet distance far above the run's best."""
    name = "heldout_frechet_distance"
    if name not in metrics:
        return
    value, baseline = metrics[name], metrics[f"{name}_baseline"]
    best, best_step = history.update_best(name, value, step, smaller_is_better=True)
    # Near the baseline, ratios are noise: that is the distance of finitely many real images.
    yield Finding(
        "divergence",
        value / (3 * (best + baseline)),
        f"{name} rose from {best:.3g} at step {best_step:,} to {value:.3g}: the generated images "
        "get worse; start another run with a lower optim.lr",
    )


def _lost_share(best: float, value: float, baseline: float, samples: float) -> float:
    """Return the severity of a fall from `best` to `value`, of a fraction of `samples` images.

    It is 0 where the fraction had hardly been there, or fell by no more than chance explains (four
    standard deviations), and 1 where it has halved.
    """
    chance = 4 * math.sqrt(best * (1 - best) / samples)
    if best < 0.1 * baseline or best - value <= chance:
        return 0.0
    return _ratio(best / 2, value)


def _lost_modes(best: float, value: float, baseline: float, samples: float) -> float:
    """Return the severity of a fall in the number of modes: 1 at 30 % of them.

    It is 0 for a single mode: one comes and goes.
    """
    return _ratio(0.7 * best, value) if best - value >= 2 else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.inf
