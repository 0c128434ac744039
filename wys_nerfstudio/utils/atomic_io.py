"""Atomic file writes: an interrupted write leaves the previous file, or none, never a partial one."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch


def atomic_write(path: Path, content: "bytes | memoryview | BinaryIO", partial: Optional[Path] = None) -> None:
    """Write a temporary file, flush it to disk and rename it.

    Args:
        path: The file; its folder is created if necessary.
        content: Content of the file, or an open file with it.
        partial: The temporary file, on the same disk. Default: beside the file, with ".partial" appended.

    Raises:
        OSError: If it cannot be written; it names `path`, and an existing file stays unchanged.
    """
    partial = partial or path.with_name(f"{path.name}.partial")
    for folder in {path.parent, partial.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:  # a new file: never through a link that has this name
            if isinstance(content, (bytes, memoryview)):
                file.write(content)
            else:
                shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
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


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file a second name on the same disk, or copy it to another one; existing files are replaced.

    For files that are only ever replaced as a whole, as this module writes them: both names share the content.

    Raises:
        OSError: If it cannot be written; it names `path`.
    """
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # another disk, or one without hard links
        copy_file(source, path)
        return
    os.replace(partial, path)
    partial.unlink(missing_ok=True)  # nothing is renamed if both were one file already
    _sync_folder(path.parent)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically.

    Raises:
        OSError: If it cannot be written; it names `path`.
    """
    with source.open("rb") as content:
        atomic_write(path, content)


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk; until then a rename may be lost."""
    if os.name != "posix":  # other systems cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
