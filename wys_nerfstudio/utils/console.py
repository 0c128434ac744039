"""Console output that cannot end a run: through a closed pipe or terminal, or with text that is not UTF-8."""

import errno
import io
import os
import sys
from typing import Any

CLOSED = (errno.EPIPE, errno.EIO)
"""Errors of an output whose reader (`| head`) or terminal is gone."""


class LastingOutput:
    """Text stream that discards what is written after its reader is gone.

    Args:
        stream: The stream that is written to.
    """

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if error.errno not in CLOSED:
            raise error
        # The file descriptor, because the buffer still holds text that is flushed when the process ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def keep_output() -> None:
    """Make stdout and stderr lasting for the rest of the process."""
    if not isinstance(sys.stdout, LastingOutput):
        sys.stdout = LastingOutput(sys.stdout)  # type: ignore
    if not isinstance(sys.stderr, LastingOutput):
        sys.stderr = LastingOutput(sys.stderr)  # type: ignore
