"""Console output through closed pipes and with text that is not UTF-8."""

import errno
import io
import os
import sys

import pytest

from wys_nerfstudio.utils.console import LastingOutput, keep_output


def test_output_to_a_closed_pipe_is_discarded():
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        output = LastingOutput(stream)
        os.close(reader)
        for _ in range(3):
            print("x" * 100000, file=output)
            output.flush()
        assert output.fileno() == writer and not output.isatty()


def test_output_that_is_not_utf8_is_escaped():
    file = io.BytesIO()
    output = LastingOutput(io.TextIOWrapper(file, "utf8"))
    print("a\udcff", file=output, flush=True)
    assert file.getvalue().decode() == f"a\\udcff{os.linesep}"


def test_output_to_a_full_disk_is_an_error():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        print("x", file=LastingOutput(Full()))


def test_streams_are_wrapped_once(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    keep_output()
    streams = sys.stdout, sys.stderr
    keep_output()
    assert (sys.stdout, sys.stderr) == streams and all(isinstance(stream, LastingOutput) for stream in streams)
