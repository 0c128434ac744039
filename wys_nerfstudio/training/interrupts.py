"""Early ends of a run: errors, Ctrl-C and SIGTERM, a full disk. Each ends with a sentence instead of a traceback."""

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.utils.errors import WysError

INTERRUPTED = 130
"""Exit code of a program that was ended by Ctrl-C."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program on a `WysError` (exit code 1) or a second Ctrl-C (130), with a sentence."""
    try:
        yield
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error
    except KeyboardInterrupt as error:
        print("wys: Stopped at once; nothing since the last checkpoint is saved.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


@contextmanager
def convert_disk_errors(folder: Path) -> Iterator[None]:
    """Convert errors of a disk that cannot be written to a `WysError`.

    Args:
        folder: The run's folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise WysError(
            f'"{error.filename or folder}" could not be written: {error.strerror}. Correct that first; a run with '
            f"checkpoints is intact as of its newest one: {resume_hint(folder)}"
        ) from error


def resume_hint(folder: Path) -> str:
    """Return the sentence that tells how to resume a run.

    Args:
        folder: The run's folder.
    """
    return f'to resume, type the same command with --load-dir "{folder}".'


class GracefulInterrupt:
    """Context manager that lets the current step finish after Ctrl-C or SIGTERM. A second Ctrl-C raises
    KeyboardInterrupt; SIGTERM, which queueing systems send, never does."""

    def __init__(self) -> None:
        self.received = False
        """Whether a signal was received."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "GracefulInterrupt":
        # Python accepts signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {kind: signal.signal(kind, self._handle) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)

    def _handle(self, _number: int, _frame: Optional[FrameType]) -> None:
        if not self.received:
            CONSOLE.print("Stopping after this step. Ctrl-C again stops at once and saves nothing.")
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
