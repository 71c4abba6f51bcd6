"""Times of frames, in bounded memory: an app may run for years."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

_REMEMBERED = 1000  # frames that the median is of
_WINDOW_S = 10.0  # that the rate is of


class FrameTimes:
    """Times of frames in ms: how many there were, the first, the last, and a median of the latest ones."""

    def __init__(self) -> None:
        self.count, self.first_ms, self.last_ms = 0, 0.0, 0.0
        self.latest_ms: deque[float] = deque(maxlen=_REMEMBERED)
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, time_ms: float) -> None:
        """Take the time of one more frame, which ends now."""
        self.first_ms = self.first_ms if self.count else time_ms
        self.count, self.last_ms = self.count + 1, time_ms
        self.latest_ms.append(time_ms)
        self._ends.append(time.monotonic())

    def median_ms(self) -> float:
        """Return the median of the latest frames; 0 before the first."""
        return float(np.median(self.latest_ms)) if self.latest_ms else 0.0

    def frames_per_s(self) -> float:
        """Return how many frames end in a second, of those of the last ten seconds; 0 where there are none."""
        now = time.monotonic()
        while self._ends and now - self._ends[0] > _WINDOW_S:
            self._ends.popleft()
        if len(self._ends) < 2:
            return 0.0
        return (len(self._ends) - 1) / max(now - self._ends[0], 1e-9)

    def __str__(self) -> str:
        of = f" of the last {_REMEMBERED}" if self.count > _REMEMBERED else ""
        return f"{self.count} frames, median{of} {self.median_ms():.2f} ms, first {self.first_ms:.2f} ms"
