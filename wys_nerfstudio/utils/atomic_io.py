"""Atomic file writes: an interrupted write leaves the previous file, or none, never a partial one."""

import io
import json
import os
from pathlib import Path
from typing import Any, Optional

import torch


def atomic_write(path: Path, content: "bytes | memoryview", partial: Optional[Path] = None) -> None:
    """Write a temporary file, flush it to disk and rename it.

    Args:
        path: The file; its folder is created if necessary.
        content: Content of the file.
        partial: The temporary file, on the same disk. Default: beside the file, with ".partial" appended.

    Raises:
        OSError: If it cannot be written; an existing file stays unchanged.
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
    """Write text atomically as UTF-8."""
    atomic_write(path, text.encode("utf8"))


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(data, indent=1))


def write_tensors(path: Path, data: Any, partial: Optional[Path] = None) -> None:
    """Write the output of `torch.save` atomically."""
    # In memory first: torch's own writer aborts the process when the disk is full.
    buffer = io.BytesIO()
    torch.save(data, buffer)
    atomic_write(path, buffer.getbuffer(), partial)


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk; until then a rename may be lost."""
    if os.name != "posix":  # other systems cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
