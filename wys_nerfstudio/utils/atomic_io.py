"""Files are written whole or not at all: whoever is killed in between leaves the old file, or none, but never half of one."""

import io
import json
import os
from pathlib import Path
from typing import Any, Optional

import torch


def atomic_write(path: Path, content: "bytes | memoryview", partial: Optional[Path] = None) -> None:
    """Writes a file under another name, waits until it is on the disk, and puts it in its place.

    Args:
        path: The file; its folder is made if it is not there.
        content: All of it.
        partial: The other name, on the same disk; by default beside the file, with ".partial" added.

    Raises:
        OSError: If it cannot be written; a file that was there before is as it was.
    """
    partial = partial or path.with_name(f"{path.name}.partial")
    for folder in {path.parent, partial.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """As `atomic_write`, UTF-8."""
    atomic_write(path, text.encode("utf8"))


def write_json(path: Path, data: Any) -> None:
    """As `atomic_write`, indented."""
    write_text(path, json.dumps(data, indent=1))


def write_tensors(path: Path, data: Any, partial: Optional[Path] = None) -> None:
    """As `atomic_write`, by `torch.save`."""
    # In memory first: torch's own writer turns a full disk into an abort of the process.
    buffer = io.BytesIO()
    torch.save(data, buffer)
    atomic_write(path, buffer.getbuffer(), partial)


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
