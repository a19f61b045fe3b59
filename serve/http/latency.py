"""The durations of recent requests."""

from collections import deque

import numpy as np

from serve.http.schemas import Percentiles

WINDOW = 1000  # requests


class Latency:
    """The durations of the last `WINDOW` requests of one kind."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def percentiles_ms(self) -> Percentiles:
        """Return median and 99th percentile, interpolated linearly; None without any request."""
        if not self._seconds:
            return Percentiles(p50=None, p99=None)
        p50, p99 = np.percentile(self._seconds, [50, 99]) * 1000
        return Percentiles(p50=round(float(p50), 3), p99=round(float(p99), 3))
