"""One writer per output folder: a second process that would write there is refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from wys_nerfstudio.utils.errors import WysError

LOCK_FILE = "writer.lock"

_locks: dict[Path, FileLock] = {}
"""Locks that this process holds, by folder."""


def lock_folder(folder: Path, what: str, remedy: str) -> None:
    """Make this process the only writer of a folder until `unlock_folder` or its end.

    Args:
        folder: The folder; it must exist.
        what: What is written there, for the error message.
        remedy: What to do instead of waiting.

    Raises:
        WysError: If another process writes there.
    """
    key = folder.resolve()
    if key in _locks:
        return
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise WysError(f'Another process is writing {what} in "{folder}": wait until it ends, or {remedy}.') from error
    _locks[key] = lock


def unlock_folder(folder: Path) -> None:
    """Let other processes write into a folder; does nothing if this process has not locked it."""
    lock = _locks.pop(folder.resolve(), None)
    if lock is not None:
        lock.release()
        (folder / LOCK_FILE).unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, what: str) -> Iterator[None]:
    """Context in which this process is the only writer of a command's output folder.

    The folder is created if necessary, and removed again if nothing was written.

    Args:
        folder: The folder.
        what: As in `lock_folder`.

    Raises:
        WysError: As for `lock_folder`, or if the folder cannot be created.
    """
    new = not os.path.lexists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder, what, "give -o another folder")
    except OSError as error:
        raise WysError(
            f'The folder "{folder}" cannot be written ({error.strerror}): give -o another folder.'
        ) from error
    try:
        yield
    finally:
        unlock_folder(folder)
        if new and not any(folder.iterdir()):
            folder.rmdir()
