"""Alarms: each rule on made-up metrics, resumed runs, and real runs, sound and broken ones."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.config.loader import load
from train.data import images
from train.data.dataset import Dataset
from train.gan.alarm_history import BEGINNING, WINDOW
from train.gan.alarm_rules import CONSTANT_CRITIC_LOSS, LONG
from train.gan.alarms import Alarm, Alarms
from train.gan.config import GanConfig
from train.gan.trainer import GanTrainer, net_config
from train.parallel import backends

Metrics = dict[str, float]


def scores(gap: float, loss: float | None = None, penalty: float | None = 0.01) -> Metrics:
    """The metrics of a measurement; the default loss is that of WGAN-GP with a weight of 10."""
    metrics = {"real_score": 7 + gap, "fake_score": 7.0, "generator_loss": -7.0}
    if penalty is not None:
        metrics["gradient_penalty"] = penalty
    return {**metrics, "critic_loss": 10 * (penalty or 0) - gap if loss is None else loss}


def measured(
    rows: Iterable[Metrics], objective: str = "wgan-gp", alarms: Alarms | None = None
) -> list[tuple[int, str]]:
    """(step, kind) of each alarm of a run that measures every ten steps."""
    alarms = alarms or Alarms(objective)
    return [
        (alarm.step, alarm.kind)
        for step, metrics in enumerate(rows, 1)
        for alarm in alarms.measured(10 * step, metrics)
    ]


def kinds(rows: Iterable[Metrics], objective: str = "wgan-gp") -> list[str]:
    return [kind for _, kind in measured(rows, objective)]


def sound(count: int = 100) -> list[Metrics]:
    """Measurements as of gan-demo: the distance falls from its first peak, with noise, and the
    penalty is a tenth of it at most."""
    return [
        scores((16 / step + 1) * (1 + 0.4 * math.sin(7 * step)), penalty=0.02 / step)
        for step in range(1, count + 1)
    ]


# ---- measurements: WGAN-GP


def test_sound_run_has_no_alarm() -> None:
    assert measured(sound()) == []


def test_slow_start_of_the_critic_is_no_alarm() -> None:
    """The critic goes from constant to a gap of 40 in a straight line, and its gradients stay
    bounded."""
    rows = [scores(step, penalty=max(0.7 - step / 10, 0.01)) for step in range(1, 40)]
    assert measured(rows) == []


@pytest.mark.parametrize(("penalty", "alarm"), [(3.0, False), (8.0, True)])
def test_penalty_above_the_distance_is_divergence(penalty: float, alarm: bool) -> None:
    """A critic at its optimum pays less than half of its distance of 50, for any weight: a weighted
    penalty of 30 is high, and one of 80 is impossible."""
    found = measured([*[scores(50.0)] * BEGINNING, *[scores(50.0, penalty=penalty)] * WINDOW])
    expected = [(10 * (BEGINNING + 5), "divergence")] if alarm else []
    assert found == expected, "it starts once more than half of the window shows it"


def test_single_outliers_are_no_alarm() -> None:
    run = sound()
    for step in (30, 31, 60, 61, 62):
        run[step] = scores(-200, penalty=1e6)
    assert measured(run) == []


def test_growing_scores_without_a_penalty_are_divergence() -> None:
    def swinging(width: float, count: int) -> list[Metrics]:
        return [scores((-1) ** step * width, penalty=None) for step in range(count)]

    steady = swinging(10, BEGINNING)
    assert kinds([*steady, *swinging(40, 50)]) == ["critic gives no gradient"]
    assert "divergence" in kinds([*steady, *swinging(60, 50)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_metric_is_divergence_at_once(value: float) -> None:
    alarms = Alarms("wgan-gp")
    assert measured(sound(3), alarms=alarms) == []
    (alarm,) = alarms.measured(40, {**scores(1), "generator_loss": value})
    assert (alarm.step, alarm.kind) == (40, "divergence")
    assert alarm.message.startswith(f"generator_loss is {value}")
    json.dumps(alarms.state(), allow_nan=False)


def test_critic_that_scores_generated_images_above_real_ones_gives_no_gradient() -> None:
    (step, kind), *rest = measured([*sound(50), *[scores(-0.5)] * 20])
    assert (step, kind, rest) == (550, "critic gives no gradient", [])
    assert kinds([*sound(50), *[scores(0.5)] * 50]) == [], "a small distance is what one trains for"


def test_constant_critic_gives_no_gradient() -> None:
    found = measured([scores(0.001, penalty=0.97)] * 100)
    assert found == [(10 * BEGINNING, "critic gives no gradient")]


def test_critic_dominates_where_the_distance_never_falls() -> None:
    noisy = [scores(10 + math.sin(step)) for step in range(200)]
    assert measured(noisy) == [(10 * (LONG + 1), "critic dominates")]
    assert measured([*noisy[:LONG], *[scores(7.0)] * 100]) == []


def test_critic_that_never_separated_real_from_generated_gives_no_gradient() -> None:
    alarms = Alarms("hinge")
    found = [
        alarm
        for step in range(50)
        for alarm in alarms.measured(step, scores(-0.1 - step / 100, 2.1 + step / 100))
    ]
    assert [(alarm.kind, alarm.step) for alarm in found] == [
        ("critic gives no gradient", BEGINNING - 1)
    ]
    assert "below fake_score and was never above it" in found[0].message


def test_critic_dominates_where_the_distance_rises_past_its_peak_after_a_fall() -> None:
    down = [scores(10.0)] * BEGINNING + [scores(3.0)] * 20
    assert kinds([*down, *[scores(25.0)] * 20]) == []
    alarms = Alarms("wgan-gp")
    assert measured(down, alarms=alarms) == []
    found = [alarm for step in range(20) for alarm in alarms.measured(1000 + step, scores(35.0))]
    assert [alarm.kind for alarm in found] == ["critic dominates"]
    assert "from 3 at step 290 to" in found[0].message
    assert "optim.critic_lr" in found[0].message


# ---- measurements: the other objectives


@pytest.mark.parametrize("objective", CONSTANT_CRITIC_LOSS)
def test_other_objectives_compare_with_the_loss_of_a_constant_critic(objective: str) -> None:
    constant_loss = CONSTANT_CRITIC_LOSS[objective]
    cases = {
        0.5: [],
        0.9: [],
        0.08: [],
        0.02: ["critic dominates"],
        1.0: ["critic gives no gradient"],
        6.0: ["divergence"],
    }
    for factor, expected in cases.items():
        gap = 1.0 if factor != 1.0 else 0.0
        rows = [scores(gap, factor * constant_loss)] * 60
        assert kinds(rows, objective) == expected, factor


def test_critic_may_recognize_every_image_of_an_untrained_generator() -> None:
    assert kinds([*[scores(4, 0.0)] * (BEGINNING - WINDOW), *[scores(2, 1.0)] * 50], "hinge") == []


# ---- evaluations


def evaluation(
    recall: float = 0.6,
    coverage: float = 0.7,
    modes: float = 10,
    distance: float = 1.0,
    samples: float = 1000,
) -> Metrics:
    return {
        "heldout_recall": recall,
        "heldout_recall_baseline": 0.96,
        "heldout_coverage": coverage,
        "heldout_coverage_baseline": 0.97,
        "heldout_modes": modes,
        "heldout_modes_baseline": 10,
        "heldout_frechet_distance": distance,
        "heldout_frechet_distance_baseline": 0.014,
        "heldout_samples": samples,
    }


def evaluated(*rows: Metrics) -> list[Alarm]:
    """The alarms of a run that evaluates every hundred steps."""
    alarms = Alarms("wgan-gp")
    return [
        alarm
        for step, metrics in enumerate(rows, 1)
        for alarm in alarms.evaluated(100 * step, metrics)
    ]


def test_rising_variety_is_no_collapse() -> None:
    rising = [
        evaluation(step / 20, step / 15, min(10, step + 1), 20 / (step + 1)) for step in range(10)
    ]
    assert evaluated(*rising) == []


@pytest.mark.parametrize(
    ("fallen", "metric", "best"),
    [
        ({"recall": 0.2}, "heldout_recall", "0.6"),
        ({"coverage": 0.1}, "heldout_coverage", "0.7"),
        ({"modes": 6}, "heldout_modes", "10"),
    ],
)
def test_fall_from_the_best_value_is_a_collapse(fallen: Metrics, metric: str, best: str) -> None:
    (alarm,) = evaluated(
        evaluation(0.3, 0.4, 8), evaluation(), evaluation(0.5, 0.6), evaluation(**fallen)
    )
    assert (alarm.step, alarm.kind) == (400, "collapse")
    assert alarm.message.startswith(f"{metric} fell from {best} at step 200 to ")
    assert "lower optim.lr" in alarm.message


def test_collapse_in_several_metrics_is_one_alarm_that_names_the_worst() -> None:
    (alarm,) = evaluated(evaluation(), evaluation(0.2, 0.01, 6))
    assert "heldout_coverage" in alarm.message


def test_fall_within_chance_is_no_collapse() -> None:
    """A quarter of 40 images is 10 +- 3; of 1,000 images it is 250 +- 14."""
    for samples, expected in ((40, 0), (1000, 1)):
        before = evaluation(recall=0.25, samples=samples)
        after = evaluation(recall=0.1, samples=samples)
        assert len(evaluated(before, after)) == expected


@pytest.mark.parametrize("little", [{"recall": 0.05}, {"coverage": 0.05}, {"modes": 2}])
def test_loss_of_little_variety_is_no_collapse(little: Metrics) -> None:
    halved = dict.fromkeys(little, 0.5 * min(little.values()))
    assert evaluated(evaluation(**little), evaluation(**halved)) == []


def test_much_worse_images_are_divergence() -> None:
    assert evaluated(*[evaluation(distance=distance) for distance in (20, 2, 5)]) == []
    (alarm,) = evaluated(*[evaluation(distance=distance) for distance in (20, 2, 7)])
    assert (alarm.step, alarm.kind) == (300, "divergence")
    assert alarm.message.startswith("heldout_frechet_distance rose from 2 at step 200 to 7")
    at_baseline = [evaluation(distance=distance) for distance in (0.02, 0.09)]
    assert evaluated(*at_baseline) == [], "near the baseline a rise is noise"


def test_metrics_without_features_give_no_alarm() -> None:
    metrics = {
        "heldout_sliced_wasserstein": 0.1,
        "heldout_sliced_wasserstein_baseline": 0.03,
        "heldout_samples": 1000.0,
    }
    assert evaluated(metrics) == []


# ---- start and end of an alarm, and resumed runs


def test_alarm_starts_again_only_after_it_has_ended() -> None:
    fallen, half, well = evaluation(recall=0.2), evaluation(recall=0.35), evaluation(recall=0.5)
    steps = [alarm.step for alarm in evaluated(well, fallen, fallen, half, fallen)]
    assert steps == [200], "halfway back it is still active"
    assert [alarm.step for alarm in evaluated(well, fallen, well, fallen)] == [200, 400]
    diverged, calm = [scores(50, penalty=80)] * 30, sound(5)
    found = kinds([*diverged, *calm, *diverged])
    assert found == ["divergence"], "a few calm measurements do not end it"
    assert kinds([*diverged, *sound(60), *diverged]) == ["divergence"] * 2


def test_divergence_suppresses_other_alarms() -> None:
    diverged = [scores((-1) ** step * 50, penalty=80) for step in range(100)]
    assert kinds([*sound(), *diverged]) == ["divergence"]


REAL = st.floats(-1e3, 1e3)
MEASUREMENTS = st.lists(st.builds(scores, REAL, REAL, st.floats(0, 100)), min_size=1, max_size=60)
EVALUATIONS = st.lists(
    st.builds(evaluation, *[st.floats(0, 1)] * 2, st.floats(0, 10), st.floats(0, 30)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["wgan-gp", *CONSTANT_CRITIC_LOSS]), MEASUREMENTS, EVALUATIONS, st.data())
def test_resumed_run_has_the_alarms_of_an_uninterrupted_one(
    objective: str, measurements: list[Metrics], evaluations: list[Metrics], data: st.DataObject
) -> None:
    def run(
        alarms: Alarms,
        check: Callable[[Alarms, int, Metrics], list[Alarm]],
        rows: list[Metrics],
        cut: int,
    ) -> list[Alarm]:
        found = []
        for step, metrics in enumerate(rows, 1):
            found += check(alarms, step, metrics)
            if step == cut:
                alarms = Alarms(objective, json.loads(json.dumps(alarms.state(), allow_nan=False)))
        return found

    for check, rows in ((Alarms.measured, measurements), (Alarms.evaluated, evaluations)):
        cut = data.draw(st.integers(1, len(rows)))
        assert run(Alarms(objective), check, rows, cut) == run(Alarms(objective), check, rows, 0)


def test_saved_state_does_not_change_afterwards() -> None:
    """A checkpoint is written while training continues."""
    alarms = Alarms("wgan-gp")
    measured(sound(20), alarms=alarms)
    state = alarms.state()
    written = json.dumps(state)
    measured([scores(-1)] * 20, alarms=alarms)
    measured([scores(50, penalty=80)] * 20, alarms=Alarms("wgan-gp", state))
    assert json.dumps(state) == written


# ---- real runs

NO_PENALTY = {"gan.penalty_weight": 0.0, "optim.critic_lr": 5e-3, "optim.lr": 1e-4}
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sound": ({}, set()),
    "sound hinge": ({"gan.objective": "hinge"}, set()),
    "thirty times the learning rate": ({"optim.lr": 0.03}, {"divergence"}),
    "critic that does not learn": ({"optim.critic_lr": 1e-7}, {"critic gives no gradient"}),
    "critic without a penalty": (
        {"gan.objective": "hinge", **NO_PENALTY},
        {"critic dominates"},
    ),
}


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = load("gan", "gan-tiny")
    assert isinstance(config, GanConfig)
    return images.prepare(config.data, str(tmp_path_factory.mktemp("kiln")))


def trained(config: GanConfig, dataset: Dataset, steps: int) -> Iterator[Metrics]:
    """Yield what each step of a run measures."""
    train = images.Images(dataset, "train", config.data.size)
    trainer = GanTrainer(config, net_config(config, dataset), backends.build(config))
    for step in range(steps):
        losses: dict[str, Tensor] = {}
        for _ in range(config.gan.critic_steps):
            losses |= trainer.update_critic(trainer.critic_batches(trainer.critic_updates, train))
        losses |= trainer.update_generator(trainer.generator_batches(step))
        yield {name: float(value) for name, value in losses.items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use a single thread: nets this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_real_run_has_the_alarm_of_its_fault_and_no_other(name: str, garments: Dataset) -> None:
    changes, expected = RUNS[name]
    config = load("gan", "gan-tiny", changes)
    assert isinstance(config, GanConfig)
    assert set(kinds(trained(config, garments, 60), config.gan.objective)) == expected
