"""Start of a run: with a clean folder, from a base run's scene, or with the files of the run that is resumed."""

from pathlib import Path
from typing import Any, Optional

from nerfstudio.utils.rich_utils import CONSOLE
from torch import nn

from wys_nerfstudio.training.base_run import load_base
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, find_checkpoint, read_checkpoint, run_folder
from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.training.edit_log import EDITS_FILE, read_edit_lines
from wys_nerfstudio.training.history import History, find_snapshots
from wys_nerfstudio.training.output_folder import remove_unsaved_files
from wys_nerfstudio.training.run_state import STATE_KEY, RunState
from wys_nerfstudio.training.scene import EditableViews
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.atomic_io import atomic_write, copy_file, link_or_copy


def start_run(
    base_run: Optional[Path],
    folder: Path,
    model: nn.Module,
    views: EditableViews,
    transform: dict[str, Any],
    settings: RunSettings,
    first_step: int,
    history_size: int,
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
        history_size: As `size` of `History`.

    Returns:
        The run's history: the base run's, and the run's own instruction.
    """
    main_process_only(remove_unsaved_files)(folder)
    entries, edited = [], None
    if base_run is not None:
        entries, edited = _load_base_run(base_run, folder, model, views, transform)
    history = History(folder, history_size, entries)
    mode = "captured" if edited is None else "on top"
    history.add(settings.instruction, mode, settings.as_dict(), first_step, before=edited)
    return history


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
    _copy_scenes(run_folder(path) / "wys", folder)
    return state.history, {key: checkpoint[key] for key in ("step", "pipeline", STATE_KEY)}


@main_process_only
def copy_resumed_files(state: RunState, old: Path, folder: Path) -> None:
    """Copy the files of a run to the folder where it is resumed, as they were at its checkpoint.

    Args:
        state: State in the checkpoint.
        old: The run's `wys` folder.
        folder: The `wys` folder of the resuming run; may be the same.
    """
    lines = read_edit_lines(old)[: state.recorded]
    if old.resolve() != folder.resolve():
        _copy_scenes(old, folder)
        for path in (*old.glob("relevance/*"), *old.glob("masks/*.png")):
            copy_file(path, folder / path.relative_to(old))
    atomic_write(folder / EDITS_FILE, b"".join(line + b"\n" for line in lines))


@main_process_only
def _copy_scenes(old: Path, folder: Path) -> None:
    """Take the captured scene and the snapshots of another run."""
    captured = old / CAPTURED_SCENE
    for path in (*([captured] if captured.is_file() else []), *find_snapshots(old)):
        link_or_copy(path, folder / path.relative_to(old))
