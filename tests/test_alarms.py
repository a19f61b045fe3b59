"""Alarms: each rule by hand, none at a start or from noise, the same over a resume, and on real runs, sound and spoilt."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.config.loader import load
from train.data import images
from train.gan.alarms import BEGINNING, BLIND, LONG, WINDOW, Alarm, Alarms
from train.gan.config import GanConfig
from train.gan.trainer import GanTrainer, net_config
from train.parallel import backends

Figures = dict[str, float]


def scores(gap: float, loss: float | None = None, penalty: float | None = 0.01) -> Figures:
    """A measurement; without a loss, that of WGAN-GP with a weight of 10."""
    known = {"real_score": 7 + gap, "fake_score": 7.0, "generator_loss": -7.0}
    if penalty is not None:
        known["gradient_penalty"] = penalty
    return {**known, "critic_loss": 10 * (penalty or 0) - gap if loss is None else loss}


def measured(
    figures: Iterable[Figures], objective: str = "wgan-gp", alarms: Alarms | None = None
) -> list[tuple[int, str]]:
    """(step, kind) of each alarm of a run that measures every ten steps."""
    watch = alarms or Alarms(objective)
    return [
        (alarm.step, alarm.kind)
        for step, values in enumerate(figures, 1)
        for alarm in watch.measured(10 * step, values)
    ]


def kinds(figures: Iterable[Figures], objective: str = "wgan-gp") -> list[str]:
    return [kind for _, kind in measured(figures, objective)]


def sound(count: int = 100) -> list[Figures]:
    """As gan-demo measures: the distance falls from its first peak, with noise; a penalty of a tenth of it at most."""
    return [
        scores((16 / step + 1) * (1 + 0.4 * math.sin(7 * step)), penalty=0.02 / step)
        for step in range(1, count + 1)
    ]


# ---------------------------------------------------------------- measured: WGAN-GP


def test_a_sound_run_is_left_in_peace() -> None:
    assert measured(sound()) == []


def test_a_critic_that_comes_slowly_is_no_alarm() -> None:
    """From flat to a distance of 40 in a straight line: nothing was lost, and slopes never went wild."""
    assert measured(scores(step, penalty=max(0.7 - step / 10, 0.01)) for step in range(1, 40)) == []


@pytest.mark.parametrize(("penalty", "alarm"), [(3.0, False), (8.0, True)])
def test_a_penalty_that_outweighs_its_distance_is_divergence(penalty: float, alarm: bool) -> None:
    """At its best a critic pays less than half of its distance, 50, whatever the weight: 30 is much, and 80 is out of bounds."""
    found = measured([*[scores(50.0)] * BEGINNING, *[scores(50.0, penalty=penalty)] * WINDOW])
    assert found == ([(10 * (BEGINNING + 5), "divergence")] if alarm else []), (
        "once more than half of the window shows it"
    )


def test_one_wild_batch_is_noise() -> None:
    run = sound()
    for step in (30, 31, 60, 61, 62):
        run[step] = scores(-200, penalty=1e6)
    assert measured(run) == []


def test_without_a_penalty_scores_that_grow_are_divergence() -> None:
    steady = [scores((-1) ** step * 10, penalty=None) for step in range(BEGINNING)]
    assert kinds([*steady, *[scores((-1) ** step * 40, penalty=None) for step in range(50)]]) == [
        "critic gives no gradient"
    ]
    assert "divergence" in kinds(
        [*steady, *[scores((-1) ** step * 60, penalty=None) for step in range(50)]]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_divergence_at_once(value: float) -> None:
    alarms = Alarms("wgan-gp")
    assert measured(sound(3), alarms=alarms) == []
    (alarm,) = alarms.measured(40, {**scores(1), "generator_loss": value})
    assert (alarm.step, alarm.kind) == (40, "divergence")
    assert alarm.message.startswith(f"generator_loss is {value}")
    json.dumps(alarms.state(), allow_nan=False)


def test_a_critic_that_takes_generated_for_real_has_given_up() -> None:
    (step, kind), *rest = measured([*sound(50), *[scores(-0.5)] * 20])
    assert (step, kind, rest) == (550, "critic gives no gradient", [])
    assert kinds([*sound(50), *[scores(0.5)] * 50]) == [], (
        "a distance that has become small is what one trains for"
    )


def test_a_flat_critic_has_given_up() -> None:
    found = measured([scores(0.001, penalty=0.97)] * 100)
    assert found == [(10 * BEGINNING, "critic gives no gradient")]


def test_a_distance_that_never_falls_is_won_by_the_critic() -> None:
    noisy = [scores(10 + math.sin(step)) for step in range(200)]
    assert measured(noisy) == [(10 * (LONG + 1), "critic dominates")]
    assert measured([*noisy[:LONG], *[scores(7.0)] * 100]) == []


def test_a_critic_that_never_saw_a_difference_has_given_up() -> None:
    alarms = Alarms("hinge")
    said = [
        alarm
        for step in range(50)
        for alarm in alarms.measured(step, scores(-0.1 - step / 100, 2.1 + step / 100))
    ]
    assert [(alarm.kind, alarm.step) for alarm in said] == [
        ("critic gives no gradient", BEGINNING - 1)
    ]
    assert "below fake_score and never was above it" in said[0].message


def test_a_distance_that_rises_past_its_peak_after_it_fell_is_won_by_the_critic() -> None:
    down = [scores(10.0)] * BEGINNING + [scores(3.0)] * 20
    assert kinds([*down, *[scores(25.0)] * 20]) == []
    alarms = Alarms("wgan-gp")
    assert measured(down, alarms=alarms) == []
    said = [alarm for step in range(20) for alarm in alarms.measured(1000 + step, scores(35.0))]
    assert [alarm.kind for alarm in said] == ["critic dominates"]
    assert "from 3 at step 290 to" in said[0].message
    assert "optim.critic_lr" in said[0].message


# ---------------------------------------------------------------- measured: the others


@pytest.mark.parametrize("objective", BLIND)
def test_the_others_are_judged_by_the_loss_of_a_critic_that_knows_nothing(objective: str) -> None:
    blind = BLIND[objective]
    cases = {
        0.5: [],
        0.9: [],
        0.08: [],
        0.02: ["critic dominates"],
        1.0: ["critic gives no gradient"],
        6.0: ["divergence"],
    }
    for share, expected in cases.items():
        gap = 1.0 if share != 1.0 else 0.0
        assert kinds([scores(gap, share * blind)] * 60, objective) == expected, share


def test_a_generator_that_knows_nothing_yet_is_easily_seen_through() -> None:
    assert kinds([*[scores(4, 0.0)] * (BEGINNING - WINDOW), *[scores(2, 1.0)] * 50], "hinge") == []


# ---------------------------------------------------------------- judged


def judgement(
    recall: float = 0.6,
    coverage: float = 0.7,
    modes: float = 10,
    distance: float = 1.0,
    samples: float = 1000,
) -> Figures:
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


def judged(*figures: Figures) -> list[Alarm]:
    alarms = Alarms("wgan-gp")
    return [
        alarm
        for step, values in enumerate(figures, 1)
        for alarm in alarms.evaluated(100 * step, values)
    ]


def test_a_start_from_nothing_is_no_collapse() -> None:
    rising = [
        judgement(step / 20, step / 15, min(10, step + 1), 20 / (step + 1)) for step in range(10)
    ]
    assert judged(*rising) == []


@pytest.mark.parametrize(
    ("fallen", "tag", "was"),
    [
        ({"recall": 0.2}, "heldout_recall", "0.6"),
        ({"coverage": 0.1}, "heldout_coverage", "0.7"),
        ({"modes": 6}, "heldout_modes", "10"),
    ],
)
def test_what_had_been_there_and_falls_is_a_collapse(fallen: Figures, tag: str, was: str) -> None:
    (alarm,) = judged(judgement(0.3, 0.4, 8), judgement(), judgement(0.5, 0.6), judgement(**fallen))
    assert (alarm.step, alarm.kind) == (400, "collapse")
    assert alarm.message.startswith(f"{tag} fell from {was} at step 200 to ")
    assert "lower optim.lr" in alarm.message


def test_of_several_figures_the_worst_is_named_once() -> None:
    (alarm,) = judged(judgement(), judgement(0.2, 0.01, 6))
    assert "heldout_coverage" in alarm.message


def test_a_fall_within_chance_is_none() -> None:
    """A quarter of 40 pictures is 10, give or take 3; of 1,000 it is 250, give or take 14."""
    for samples, expected in ((40, 0), (1000, 1)):
        assert (
            len(
                judged(
                    judgement(recall=0.25, samples=samples), judgement(recall=0.1, samples=samples)
                )
            )
            == expected
        )


@pytest.mark.parametrize("little", [{"recall": 0.05}, {"coverage": 0.05}, {"modes": 2}])
def test_what_had_hardly_been_there_is_no_loss(little: Figures) -> None:
    assert (
        judged(judgement(**little), judgement(**dict.fromkeys(little, 0.5 * min(little.values()))))
        == []
    )


def test_pictures_that_get_far_worse_are_divergence() -> None:
    assert judged(judgement(distance=20), judgement(distance=2), judgement(distance=5)) == []
    (alarm,) = judged(judgement(distance=20), judgement(distance=2), judgement(distance=7))
    assert (alarm.step, alarm.kind) == (300, "divergence")
    assert alarm.message.startswith("heldout_frechet_distance rose from 2 at step 200 to 7")
    assert judged(judgement(distance=0.02), judgement(distance=0.09)) == [], (
        "at the floor, that is noise"
    )


def test_without_an_extractor_there_is_nothing_to_judge() -> None:
    assert (
        judged(
            {
                "heldout_sliced_wasserstein": 0.1,
                "heldout_sliced_wasserstein_baseline": 0.03,
                "heldout_samples": 1000.0,
            }
        )
        == []
    )


# ---------------------------------------------------------------- said once, and over a resume


def test_an_alarm_is_said_once_until_it_has_ended() -> None:
    fallen, half, well = judgement(recall=0.2), judgement(recall=0.35), judgement(recall=0.5)
    assert [alarm.step for alarm in judged(well, fallen, fallen, half, fallen)] == [200], (
        "halfway back it goes on"
    )
    assert [alarm.step for alarm in judged(well, fallen, well, fallen)] == [200, 400]
    wild, calm = [scores(50, penalty=80)] * 30, sound(5)
    assert [kind for _, kind in measured([*wild, *calm, *wild])] == ["divergence"], (
        "a short calm is none"
    )
    assert [kind for _, kind in measured([*wild, *sound(60), *wild])] == ["divergence"] * 2


def test_what_a_critic_that_has_diverged_says_besides_means_nothing() -> None:
    assert kinds([*sound(), *[scores((-1) ** step * 50, penalty=80) for step in range(100)]]) == [
        "divergence"
    ]


REAL = st.floats(-1e3, 1e3)
MEASUREMENTS = st.lists(st.builds(scores, REAL, REAL, st.floats(0, 100)), min_size=1, max_size=60)
JUDGEMENTS = st.lists(
    st.builds(judgement, *[st.floats(0, 1)] * 2, st.floats(0, 10), st.floats(0, 30)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["wgan-gp", *BLIND]), MEASUREMENTS, JUDGEMENTS, st.data())
def test_a_resumed_run_alarms_as_an_uninterrupted_one(
    objective: str, measurements: list[Figures], judgements: list[Figures], data: st.DataObject
) -> None:
    def run(
        alarms: Alarms,
        look: Callable[[Alarms], Callable[[int, Figures], list[Alarm]]],
        rows: list[Figures],
        cut: int,
    ) -> list[Alarm]:
        said = []
        for step, figures in enumerate(rows, 1):
            said += look(alarms)(step, figures)
            if step == cut:
                alarms = Alarms(objective, json.loads(json.dumps(alarms.state(), allow_nan=False)))
        return said

    looks: list[tuple[Callable[[Alarms], Any], list[Figures]]] = [
        (lambda alarms: alarms.measured, measurements),
        (lambda alarms: alarms.judged, judgements),
    ]
    for look, rows in looks:
        cut = data.draw(st.integers(1, len(rows)))
        assert run(Alarms(objective), look, rows, cut) == run(Alarms(objective), look, rows, 0)


def test_a_saved_state_stays_as_it_was() -> None:
    """A checkpoint is written while the run goes on."""
    alarms = Alarms("wgan-gp")
    measured(sound(20), alarms=alarms)
    state = alarms.state()
    written = json.dumps(state)
    measured([scores(-1)] * 20, alarms=alarms)
    measured([scores(50, penalty=80)] * 20, alarms=Alarms("wgan-gp", state))
    assert json.dumps(state) == written


# ---------------------------------------------------------------- real runs

NO_PENALTY = {"gan.penalty_weight": 0.0, "optim.critic_lr": 5e-3, "optim.lr": 1e-4}
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sound": ({}, set()),
    "sound hinge": ({"gan.objective": "hinge"}, set()),
    "thirty times the learning rate": ({"optim.lr": 0.03}, {"divergence"}),
    "a critic that does not learn": ({"optim.critic_lr": 1e-7}, {"critic gives no gradient"}),
    "a critic that nothing holds back": (
        {"gan.objective": "hinge", **NO_PENALTY},
        {"critic dominates"},
    ),
}


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> images.Images:
    config = load("gan", "gan-tiny")
    assert isinstance(config, GanConfig)
    return images.Images(
        Path(images.prepare(config.data, str(tmp_path_factory.mktemp("kiln")))),
        "train",
        config.data.size,
    )


def trained(config: GanConfig, pictures: images.Images, steps: int) -> Iterator[Figures]:
    """What each step of a run measures."""
    gan = GanTrainer(config, net_config(config, pictures), backends.build(config))
    for step in range(steps):
        figures: dict[str, Tensor] = {}
        for _ in range(config.gan.critic_steps):
            figures |= gan.update_critic(gan.critic_batches(gan.critic_updates, pictures))
        figures |= gan.update_generator(gan.generator_batches(step))
        yield {tag: float(value) for tag, value in figures.items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Nets this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNS)
def test_real_runs(name: str, garments: images.Images, one_thread: None) -> None:
    changes, expected = RUNS[name]
    config = load("gan", "gan-tiny", changes)
    assert isinstance(config, GanConfig)
    assert set(kinds(trained(config, garments, 60), config.gan.objective)) == expected
