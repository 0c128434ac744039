"""One writer per output folder."""

from pathlib import Path

import pytest
from conftest import run_wys, sentence_of
from filelock import FileLock, Timeout

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import LOCK_FILE, locked_folder


def test_a_locked_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with locked_folder(folder, "the sweep"):
        with pytest.raises(Timeout):
            FileLock(folder / LOCK_FILE, timeout=0).acquire()
        with locked_folder(folder, "the sweep"):  # the same process
            pass
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with FileLock(folder / LOCK_FILE), pytest.raises(WysError, match="Another process is writing the sweep in"):
        with locked_folder(folder, "the sweep"):
            pass


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with locked_folder(tmp_path / name, "the sweep"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WysError, match="cannot be written .*: give -o another folder"):
        with locked_folder(tmp_path / "file" / "out", "the sweep"):
            pass


@pytest.mark.parametrize("command", ["ablate", "demo"])
def test_two_commands_do_not_write_one_folder(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileLock(tmp_path / LOCK_FILE):  # as another process: locks belong to open files
        sentence = sentence_of(lambda: run_wys(monkeypatch, command, "--output", tmp_path))
    assert "Another process is writing the" in sentence and "give -o another folder" in sentence
