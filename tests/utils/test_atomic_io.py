"""Atomic file writes, also on a full disk."""

import errno
import os
from pathlib import Path

import pytest
import torch

from wys_nerfstudio.utils.atomic_io import (
    atomic_write,
    copy_file,
    link_or_copy,
    write_json,
    write_tensors,
    write_text,
)


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


def test_temporary_files_are_never_written_through_links(tmp_path):
    (tmp_path / "other").write_text("other")
    for write in (lambda path: atomic_write(path, b"new"), lambda path: link_or_copy(tmp_path / "other", path)):
        (tmp_path / "a.partial").symlink_to(tmp_path / "other")
        write(tmp_path / "a")
        assert (tmp_path / "other").read_text() == "other" and not (tmp_path / "a").is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other"]


def test_linked_files_share_their_content_until_one_is_replaced(tmp_path):
    old, new = tmp_path / "old", tmp_path / "folder" / "new"
    old.write_bytes(b"scene")
    for _ in range(2):  # the second time, both are one file already
        link_or_copy(old, new)
        assert old.samefile(new) and [path.name for path in new.parent.iterdir()] == ["new"]
    atomic_write(new, b"another")
    assert old.read_bytes() == b"scene"
    link_or_copy(old, new)
    old.unlink()
    assert new.read_bytes() == b"scene"


def test_files_are_copied_where_links_are_impossible(tmp_path, monkeypatch):
    def across_disks(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across_disks)
    (tmp_path / "old").write_bytes(b"scene" * 100_000)
    link_or_copy(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"scene" * 100_000 and not (tmp_path / "new").samefile(tmp_path / "old")


@pytest.mark.parametrize("copy", [copy_file, link_or_copy])
def test_an_error_of_a_copy_names_the_file_that_is_written(tmp_path, monkeypatch, copy):
    def disk_full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "old").write_bytes(b"scene")
    monkeypatch.setattr(os, "link", disk_full)
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError) as error:
        copy(tmp_path / "old", tmp_path / "new")
    assert error.value.filename == str(tmp_path / "new") and [p.name for p in tmp_path.iterdir()] == ["old"]
