"""Percentiles of recent durations."""

from serve.http.latency import Latency
from serve.http.schemas import Percentiles


def test_percentiles_are_of_the_latest_requests() -> None:
    latency = Latency()
    assert latency.percentiles_ms() == Percentiles(p50=None, p99=None)
    for milliseconds in range(2001):
        latency.add(milliseconds / 1000)
    assert latency.percentiles_ms() == Percentiles(p50=1500.5, p99=1990.01)  # of 1001 to 2000
