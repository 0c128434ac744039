"""The folder that a run writes: its only writer, and what a new run replaces there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, newest_checkpoint
from wys_nerfstudio.training.edit_log import EDITS_FILE
from wys_nerfstudio.training.history import HISTORY_FILE, find_snapshots
from wys_nerfstudio.training.interrupts import resume_hint
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import LOCK_FILE, lock_folder, unlock_folder

CONFIG_TAG = "!!python/object:wys_nerfstudio.trainer.SavedConfig"
"""First line of a config.yml of this method."""
REPLACED = (EDITS_FILE, HISTORY_FILE, "contact_sheet.png", "masks/*.png", "edits/*.png", "reference/*.png")
"""What a run leaves in its `wys` folder if it is killed before its first checkpoint, and what a new run of that name removes."""


def claim_folder(folder: Path, checkpoints: Path, resumed: Optional[Path]) -> None:
    """Make this process the only writer of a run's folder, which is created if necessary.

    Args:
        folder: The folder.
        checkpoints: The run's folder of checkpoints.
        resumed: Checkpoint that the run is resumed from; None for a new run.

    Raises:
        WysError: If another process writes there, or the run would change or remove what is not its own.
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_links(folder)
    lock_folder(folder, "the run", "leave out --timestamp to start a run beside it")
    if resumed is not None and resumed.parent.resolve() == checkpoints.resolve():
        return
    try:
        _refuse_existing(folder, checkpoints)
    except WysError:
        unlock_folder(folder)
        raise


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Context at the end of which a claimed folder is released."""
    try:
        yield
    finally:
        unlock_folder(folder)


def remove_unsaved_files(folder: Path) -> None:
    """Remove what a run of the same name left that was killed before its first checkpoint.

    Args:
        folder: The run's `wys` folder. Relevance maps stay: they are identified by what they depend on.
    """
    for pattern in REPLACED:
        for path in folder.glob(pattern):
            path.unlink()


def _refuse_links(folder: Path) -> None:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and folder / "wandb" not in path.parents:  # wandb links to its newest logs
                raise WysError(
                    f'"{path}" is a symbolic link, and a run writes into its own folder only: remove the link, or choose '
                    "another folder with --timestamp or --output-dir."
                )


def _refuse_existing(folder: Path, checkpoints: Path) -> None:
    """Refuse a folder for a new run that is not empty, unless a run of this method was killed there early."""
    if newest_checkpoint(checkpoints) is not None:
        raise WysError(
            f'There is a run in "{folder}" already: {resume_hint(folder)[:-1]}, or leave out --timestamp to start another '
            "one."
        )
    captured, snapshots = folder / "wys" / CAPTURED_SCENE, find_snapshots(folder / "wys")
    if captured.exists() or snapshots:
        scene = captured if captured.exists() else snapshots[-1]
        raise WysError(
            f'There is a run in "{folder}" already, without a checkpoint to resume but with scenes, which a new run would '
            f'replace: leave out --timestamp to start another one. --base-run "{scene}" starts from such a scene.'
        )
    config = folder / "config.yml"
    own = config.is_file() and config.read_bytes().startswith(CONFIG_TAG.encode())
    # The first files of a run, which may be killed before it has its config.yml.
    if not own and {path.name for path in folder.iterdir()} - {LOCK_FILE, "config.yml.partial"}:
        raise WysError(
            f'"{folder}" contains files that are not from a run of this method: choose another folder with --timestamp or '
            "--output-dir."
        )
