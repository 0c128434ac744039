"""Speed of a run over its recent steps."""

from collections import deque
from typing import Optional

RECENT_INTERVALS = 10
"""Number of intervals from one edit to the next that the speed is measured over."""


class RecentSteps:
    """Durations and edits of the newest steps of one phase."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()

    def add(self, seconds: float, edits: int, interval: int) -> None:
        """Add the step that was just trained.

        Args:
            seconds: Its duration.
            edits: Number of views that were edited before it.
            interval: Steps from one edit to the next; older steps than the newest `RECENT_INTERVALS` of them are dropped.
        """
        self._steps.append((seconds, edits))
        while len(self._steps) > RECENT_INTERVALS * interval:
            self._steps.popleft()

    def clear(self) -> None:
        """Drop all steps: another phase has begun."""
        self._steps.clear()

    def seconds_per_step(self) -> Optional[float]:
        """Return the mean duration of a step; None if there is none."""
        return sum(seconds for seconds, _ in self._steps) / len(self._steps) if self._steps else None

    def edits_per_minute(self, interval: int) -> Optional[float]:
        """Return the number of edits per minute of training; None before the end of the first interval.

        Args:
            interval: Steps from one edit to the next.
        """
        # Whole intervals: a part of one contains either all of its edits or none.
        whole = list(self._steps)[len(self._steps) % interval :]
        return 60 * sum(edits for _, edits in whole) / sum(seconds for seconds, _ in whole) if whole else None
