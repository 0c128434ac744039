"""How a run ends before its time: by an error, by Ctrl-C, or because the disk is full. Always with a sentence."""

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
    """Ends the program with the sentence of a `WysError` and exit code 1, or with that of Ctrl-C."""
    try:
        yield
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error
    except KeyboardInterrupt as error:
        print("wys: Stopped at once; what came after the last checkpoint is not saved.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


@contextmanager
def convert_disk_errors(folder: Path) -> Iterator[None]:
    """Makes a disk that cannot be written to a `WysError`.

    Args:
        folder: The run's folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise WysError(
            f'"{error.filename or folder}" could not be written: {error.strerror}. Mend that and start again; a run that has '
            f"checkpoints is whole as of the newest: {resume_hint(folder)}"
        ) from error


def resume_hint(folder: Path) -> str:
    """What to type to go on with a run, as a sentence.

    Args:
        folder: The run's folder.
    """
    return f'to go on, type the same command with --load-dir "{folder}".'


class GracefulInterrupt:
    """While it is entered, a first Ctrl-C is only noted, so that the step that is being trained can come to its end.
    A second one is Python's own. SIGTERM, which ends a job in a queue and one of several ranks, is always only noted."""

    def __init__(self) -> None:
        self.came = False
        """Whether there was one."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "GracefulInterrupt":
        # Signals can only be taken in the main thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, _number: int, _frame: Optional[FrameType]) -> None:
        if not self.came:
            CONSOLE.print("Stopping after this step. Ctrl-C again stops at once and saves nothing.")
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
