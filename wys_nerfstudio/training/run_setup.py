"""Start of a run: with a clean folder, from a base run's scene, or with the files of the run that is resumed."""

import shutil
from pathlib import Path
from typing import Any, Optional

from nerfstudio.utils.rich_utils import CONSOLE
from torch import nn

from wys_nerfstudio.training.base_run import load_base
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, find_checkpoint, read_checkpoint, run_folder
from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.training.edit_log import EDITS_FILE, read_edit_lines
from wys_nerfstudio.training.history import SNAPSHOTS, History
from wys_nerfstudio.training.run_state import STATE_KEY, RunState
from wys_nerfstudio.training.scene import EditableViews
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.atomic_io import write_text


def start_run(
    base_run: Optional[Path],
    folder: Path,
    model: nn.Module,
    views: EditableViews,
    transform: dict[str, Any],
    settings: RunSettings,
    first_step: int,
) -> History:
    """Start a run that is not resumed.

    Args:
        base_run: Run whose scene and views are loaded; None to start from nothing.
        folder: The run's `wys` folder.
        model: Receives the base run's scene.
        views: Receives the base run's views.
        transform: As for `load_base`.
        settings: The run's settings.
        first_step: First step under the run's instruction.

    Returns:
        The run's history: the base run's, and the run's own instruction.
    """
    _clear(folder)
    entries, edited = [], None
    if base_run is not None:
        entries, edited = _load_base_run(base_run, folder, model, views, transform)
    history = History(folder, entries)
    mode = "captured" if edited is None else "on top"
    history.add(settings.instruction, mode, settings.as_dict(), first_step, before=edited)
    return history


@main_process_only
def _clear(folder: Path) -> None:
    """Remove what a run of this name left that was killed before its first checkpoint. Relevance maps stay: they are
    identified by what they depend on."""
    for path in folder.glob("*"):
        if path.is_dir() and path.name != "relevance":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _load_base_run(
    base_run: Path, folder: Path, model: nn.Module, views: EditableViews, transform: dict[str, Any]
) -> tuple[list[dict[str, Any]], Optional[dict[str, Any]]]:
    """Load a base run's scene and, if it is edited, its views, history and captured scene.

    Returns:
        Entries of the base run's history and a checkpoint of its edited scene; no entries and None if it is not edited.
    """
    path = find_checkpoint(base_run, "--base-run")
    load_base(model, path, transform)
    CONSOLE.print(f"Loaded the scene of {base_run}: it is edited without reconstruction.")
    checkpoint = read_checkpoint(path)
    if STATE_KEY not in checkpoint:
        return [], None
    state = RunState.from_checkpoint(checkpoint, path)
    if state.schedule.phase(state.step) is not Phase.EDIT:
        return [], None
    views.load_views_state(state.views)
    views.start_from_current()
    _copy(run_folder(path) / "wys", folder, SNAPSHOTS, CAPTURED_SCENE)
    return state.history, {key: checkpoint[key] for key in ("step", "pipeline", STATE_KEY)}


@main_process_only
def copy_resumed_files(state: RunState, old: Path, folder: Path) -> None:
    """Copy the files of a run to the folder where it is resumed, as they were at its checkpoint.

    Args:
        state: State in the checkpoint.
        old: The run's `wys` folder.
        folder: The `wys` folder of the resuming run; may be the same.
    """
    _copy(old, folder, "relevance", "masks", SNAPSHOTS, CAPTURED_SCENE)
    lines = read_edit_lines(old, before_step=state.step + 1)
    write_text(folder / EDITS_FILE, "".join(f"{line}\n" for line in lines))


@main_process_only
def _copy(old: Path, new: Path, *names: str) -> None:
    """Copy files and folders between the `wys` folders of two runs, those that exist."""
    if old.resolve() == new.resolve():
        return
    new.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (old / name).is_dir():
            shutil.copytree(old / name, new / name, dirs_exist_ok=True)
        elif (old / name).is_file():
            shutil.copy2(old / name, new / name)
