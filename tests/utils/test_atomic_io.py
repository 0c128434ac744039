"""Atomic file writes, also on a full disk."""

import errno
import os
from pathlib import Path

import pytest
import torch

from wys_nerfstudio.utils.atomic_io import atomic_write, write_json, write_tensors, write_text


def test_a_file_is_replaced_without_leftovers(tmp_path):
    path = tmp_path / "new" / "folder" / "a.b.bin"
    atomic_write(path, b"first")
    atomic_write(path, memoryview(b"second"))
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_text_json_and_tensors_round_trip(tmp_path):
    write_text(tmp_path / "a.txt", "snow – now")
    write_json(tmp_path / "a.json", {"a": [1, "é"]})
    write_tensors(tmp_path / "a.ckpt", {"a": torch.arange(3)}, partial=tmp_path / "elsewhere" / "x.partial")
    assert (tmp_path / "a.txt").read_text("utf8") == "snow – now"
    assert (tmp_path / "a.json").read_text("utf8") == '{\n "a": [\n  1,\n  "\\u00e9"\n ]\n}'
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["a"].tolist() == [0, 1, 2]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_intact(tmp_path, monkeypatch, call):
    def disk_full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new" * 100)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    """A power failure loses no data if the order is: file, rename, folder."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(f"sync {path.name} {path.stat().st_size if path.is_file() else ''}".strip())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("/proc/self/fd exists on Linux only")
    atomic_write(tmp_path / "a", b"12345")
    assert calls == ["sync a.partial 5", "rename", f"sync {tmp_path.name}"]
