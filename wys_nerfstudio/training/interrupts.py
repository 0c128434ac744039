"""Early ends of a run: errors, Ctrl-C, SIGTERM and SIGHUP, a full disk. Each ends with a sentence instead of a traceback."""

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Optional

from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.utils.errors import WysError

INTERRUPTED = 130
"""Exit code of a program that was ended by Ctrl-C."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors that come from a disk even if they name no file."""
END_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals after which a run is saved. Windows has no SIGHUP, which a closing terminal sends."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program on a `WysError`, a file that cannot be used (exit code 1) or a second Ctrl-C (130), with a sentence."""
    try:
        yield
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error
    except OSError as error:
        if error.filename is None:
            raise
        message = f'"{error.filename}" cannot be used: {error.strerror}. Correct the path or its permissions.'
        raise SystemExit(f"wys: {message}") from error
    except KeyboardInterrupt as error:
        print("wys: Stopped at once; nothing since the last checkpoint is saved.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


def report_uncaught_errors() -> None:
    """End this program with a sentence instead of a traceback after a `WysError` that nothing else converts: nerfstudio's commands
    build some parts of a finished run by themselves."""
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
        if isinstance(error, WysError):
            print(f"wys: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = report


@contextmanager
def convert_disk_errors(folder: Path) -> Iterator[None]:
    """Convert errors of files in a run's folder that cannot be written to a `WysError`.

    Args:
        folder: The run's folder.
    """
    try:
        yield
    except OSError as error:
        path = folder if error.filename is None else Path(str(error.filename))
        of_this_run = path.absolute().is_relative_to(folder.absolute())
        if not of_this_run or (error.filename is None and error.errno not in DISK_ERRORS):
            raise
        raise WysError(
            f'"{path}" could not be written: {error.strerror}. Correct that first; a run with checkpoints is intact as of '
            f"its newest one: {resume_hint(folder)}"
        ) from error


def resume_hint(folder: Path) -> str:
    """Return the sentence that tells how to resume a run.

    Args:
        folder: The run's folder.
    """
    return f'to resume, type the same command with --load-dir "{folder}".'


class GracefulInterrupt:
    """Context manager that lets the current step or render finish after Ctrl-C, SIGTERM or SIGHUP. A second Ctrl-C raises
    KeyboardInterrupt; SIGTERM, which queueing systems send, and SIGHUP never do. nohup's SIGHUP stays ignored."""

    def __init__(self) -> None:
        self.received = False
        """Whether a signal was received."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "GracefulInterrupt":
        # Python accepts signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            kinds = [kind for kind in END_SIGNALS if signal.getsignal(kind) is not signal.SIG_IGN]
            self._previous = {kind: signal.signal(kind, self._handle) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)

    def _handle(self, _number: int, _frame: Optional[FrameType]) -> None:
        if not self.received:
            CONSOLE.print("Stopping after this step or render. Ctrl-C again stops at once and saves nothing.")
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
