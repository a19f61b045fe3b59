"""Training speed, and the seconds spent waiting."""

import time

import pytest

from train.run.meter import Meter


class Clock:
    """A replacement of time.perf_counter that is advanced explicitly."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_speed_excludes_pauses_and_includes_waiting(clock: Clock) -> None:
    meter = Meter("tokens_per_s", per_step=100)
    for _ in range(4):
        with meter.waiting("data"):
            clock.advance(0.5)
        clock.advance(1.5)
        meter.count()
    with meter.paused():
        clock.advance(1000)
    assert meter.read() == {"tokens_per_s": 50.0, "data_s": 2.0}  # 400 tokens in 8 s


def test_read_covers_the_time_since_the_last_read_and_total_covers_all(clock: Clock) -> None:
    meter = Meter("tokens_per_s", per_step=100, flop_per_step=30.0, peak_flops=60.0)
    for seconds, data in [(1.0, 0.25), (3.0, 0.5)]:
        clock.advance(seconds - data)
        with meter.waiting("data"):
            clock.advance(data)
        meter.count()
        assert meter.read() == {"tokens_per_s": 100 / seconds, "mfu": 0.5 / seconds, "data_s": data}
    clock.advance(1.0)
    assert meter.read() == {"tokens_per_s": 0.0, "mfu": 0.0}, "no waiting since the last read"
    assert meter.total() == {"tokens_per_s": 40.0, "mfu": 0.2, "train_s": 5.0, "data_s": 0.75}


def test_waiting_inside_a_pause_is_counted(clock: Clock) -> None:
    meter = Meter("tokens_per_s", per_step=100)
    clock.advance(1.0)
    meter.count()
    assert meter.read() == {"tokens_per_s": 100.0}
    for _ in range(2):
        with meter.paused():
            clock.advance(5.0)
            with meter.waiting("checkpoint"):
                clock.advance(2.0)
    assert meter.total() == {"tokens_per_s": 100.0, "train_s": 1.0, "checkpoint_s": 4.0}, (
        "waiting since the last read"
    )
    clock.advance(1.0)
    meter.count()
    assert meter.read() == {"tokens_per_s": 100.0, "checkpoint_s": 4.0}
    assert meter.total() == {"tokens_per_s": 100.0, "train_s": 2.0, "checkpoint_s": 4.0}


@pytest.mark.parametrize("known", [{"flop_per_step": 1e9}, {"peak_flops": 1e9}, {}])
def test_mfu_needs_both_flop_and_peak(known: dict[str, float], clock: Clock) -> None:
    meter = Meter("tokens_per_s", 1, **known)
    clock.advance(1.0)
    meter.count()
    assert "mfu" not in meter.read() | meter.total()
