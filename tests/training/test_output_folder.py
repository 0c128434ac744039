"""The folder of a run: one writer, and nothing lost that is not the run's own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from wys_nerfstudio.training.output_folder import (
    CONFIG_TAG,
    REPLACED,
    claim_folder,
    remove_unsaved_files,
)
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import LOCK_FILE, unlock_folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that was killed before its first checkpoint."""
    folder = tmp_path / "run"
    (folder / "nerfstudio_models").mkdir(parents=True)
    (folder / "config.yml").write_text(f"{CONFIG_TAG}\nmethod_name: wys\n")
    write(folder, "wys/edits.jsonl", "wys/masks/a.png", "events.out.tfevents.1")
    yield folder
    unlock_folder(folder)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def claim(folder: Path, resumed: "Path | None" = None) -> None:
    claim_folder(folder, folder / "nerfstudio_models", resumed)


def refusal(folder: Path) -> str:
    """Return the sentence with which a new run is refused; it must not change the folder."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE}

    before = content()
    with pytest.raises(WysError) as error:
        claim(folder)
    assert content() == before
    return str(error.value)


def test_a_new_folder_is_created_and_claimed(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "run")
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == [LOCK_FILE]
    claim(tmp_path / "new" / "run")  # by the same process
    unlock_folder(tmp_path / "new" / "run")
    assert not list((tmp_path / "new" / "run").iterdir())
    unlock_folder(tmp_path / "never claimed")


def test_a_folder_has_one_writer_at_a_time(folder: Path) -> None:
    with FileLock(folder / LOCK_FILE):  # as another process: locks belong to open files
        assert "Another process is writing the run in" in refusal(folder)
        with pytest.raises(WysError, match="leave out --timestamp"):
            claim(folder, folder / "nerfstudio_models" / "step-000000001.ckpt")
    claim(folder)
    with pytest.raises(TimeoutError):
        FileLock(folder / LOCK_FILE, timeout=0).acquire()
    unlock_folder(folder)
    with FileLock(folder / LOCK_FILE, timeout=0):
        pass


def test_a_refused_folder_is_not_claimed(folder: Path) -> None:
    write(folder, "nerfstudio_models/step-000000001.ckpt")
    assert "There is a run in" in refusal(folder)
    with FileLock(folder / LOCK_FILE, timeout=0):
        pass


def test_files_that_a_run_may_not_have_written_stay(folder: Path) -> None:
    write(folder, *(f"wys/{name.replace('*', 'x')}" for name in REPLACED))
    foreign = ["wys/notes.txt", "wys/.git/config", "wys/masks/mine.xcf", "wys/edits/sub/a.png", "wys/history/mine.ckpt"]
    foreign += ["wys/relevance/maps.safetensors", "notes.txt"]
    write(folder, *foreign)
    claim(folder)
    remove_unsaved_files(folder / "wys")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {*foreign, "config.yml", "events.out.tfevents.1", LOCK_FILE}


@pytest.mark.parametrize(
    "config", ["", "!!python/object:nerfstudio.engine.trainer.TrainerConfig\n", "method_name: wys\n"]
)
def test_folders_of_others_are_refused(folder: Path, config: str) -> None:
    (folder / "config.yml").write_text(config)
    assert "contains files that are not from a run of this method" in refusal(folder)
    (folder / "config.yml").unlink()
    assert "contains files that are not from a run of this method" in refusal(folder)


def test_a_run_killed_before_its_config_is_started_again(tmp_path: Path) -> None:
    write(tmp_path / "run", LOCK_FILE, "config.yml.partial")
    claim(tmp_path / "run")
    unlock_folder(tmp_path / "run")


@pytest.mark.parametrize("scene", ["captured.ckpt", "history/001.ckpt"])
def test_scenes_without_a_checkpoint_are_not_replaced(folder: Path, scene: str) -> None:
    write(folder, f"wys/{scene}")
    message = refusal(folder)
    assert f'--base-run "{folder / "wys" / scene}"' in message and "leave out --timestamp" in message


def test_resuming_in_place_replaces_nothing_and_is_allowed(folder: Path) -> None:
    write(folder, "nerfstudio_models/step-000000001.ckpt", "wys/captured.ckpt")
    (folder / "config.yml").unlink()
    claim(folder, folder / "nerfstudio_models" / "step-000000001.ckpt")


@pytest.mark.parametrize(
    "link",
    ["wys", "wys/history", "wys/edits", "wys/edits.jsonl", "nerfstudio_models/x", "config.yml", "wandb", LOCK_FILE],
)
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, link: str) -> None:
    outside, path = tmp_path / "outside", folder / link
    write(outside, "000.ckpt", "a.png")
    if path.exists():
        path.rename(outside / path.name)
    path.symlink_to(outside / "000.ckpt" if "." in link else outside)
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    for resumed in (None, folder / "nerfstudio_models" / "step-000000001.ckpt"):
        with pytest.raises(WysError, match=f'"{path}" is a symbolic link, and a run writes into its own folder only'):
            claim(folder, resumed)
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("link", ["wandb/latest-run", "wandb/run-1/logs/debug-core.log"])
def test_links_of_wandb_to_its_logs_are_allowed(folder: Path, link: str) -> None:
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to("run-1")
    write(folder, "nerfstudio_models/step-000000001.ckpt")
    claim(folder, folder / "nerfstudio_models" / "step-000000001.ckpt")


def test_the_folder_itself_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    claim(tmp_path / "link")
    unlock_folder(folder)
    assert not os.path.lexists(folder / LOCK_FILE)
