"""Work in a thread beside the training steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Optional


class BackgroundJob:
    """Runs one job at a time in a thread. Errors of a job are raised where its end is noticed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: Optional[Future[None]] = None

    def start(self, job: Callable[[], None]) -> None:
        """Start a job; the previous one must have ended."""
        assert self._running is None
        self._running = self._pool.submit(job)

    def ended(self, wait: bool) -> bool:
        """Return whether a job has ended since the last call.

        Args:
            wait: Wait for the job that is running.

        Raises:
            Exception: The job's error.
        """
        if self._running is None or not (wait or self._running.done()):
            return False
        running, self._running = self._running, None
        running.result()
        return True
