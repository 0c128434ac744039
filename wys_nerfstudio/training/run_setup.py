"""How a run begins: in a clean folder, from a base run's scene, or with what a run that is resumed has left.

What is wrong with a base is said by `checkpoint`; how a run ends before its time is the business of `endings`.
"""

import shutil
from pathlib import Path
from typing import Any, Optional

from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, find_checkpoint, load_base, read_checkpoint, run_folder
from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.training.history import SNAPSHOTS, History
from wys_nerfstudio.training.options import WysOptions
from wys_nerfstudio.training.run_state import STATE_KEY, RunState, edit_records
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.atomic_io import write_text


def start_run(options: WysOptions, folder: Path, model: WysModel, data: WysDataManager) -> History:
    """Begins a run that is not resumed, from a base if its options name one.

    Args:
        options: The run's.
        folder: Its `wys` folder.
        model: Gets the base's scene.
        data: Gets the base's views.

    Returns:
        The run's history: the base's, and the run's own instruction.
    """
    _clear(folder)
    entries, edited = [], None
    if options.base_run is not None:
        entries, edited = _take_base(options.base_run, folder, model, data)
    history, first = History(folder, entries), options.plan().reconstruct_steps
    start = "captured" if edited is None else "on top"
    history.add(options.instruction, start, options.live_settings(), first, before=edited)
    return history


@main_process_only
def _clear(folder: Path) -> None:
    """Removes what a run of this name left that was killed before its first checkpoint; but for the relevance maps, which
    are found by what they are of."""
    for path in folder.glob("*"):
        if path.is_dir() and path.name != "relevance":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _take_base(
    base_run: Path, folder: Path, model: WysModel, data: WysDataManager
) -> tuple[list[dict[str, Any]], Optional[dict[str, Any]]]:
    """Takes over a base run's scene and, if it is an edited one, its views, history and captured scene.

    Returns:
        The entries of the base's history, and a checkpoint of its edited scene; no entries and None if the base is no
        edited scene.
    """
    path = find_checkpoint(base_run, "--base-run")
    outputs = data.train_dataparser_outputs
    transform = {"transform": outputs.dataparser_transform.tolist(), "scale": outputs.dataparser_scale}
    load_base(model, path, transform)
    CONSOLE.print(f"The scene of {base_run} is edited; it is not reconstructed again.")
    checkpoint = read_checkpoint(path)
    if STATE_KEY not in checkpoint:
        return [], None
    state = RunState.of(checkpoint, path)
    if state.plan.phase(state.step) is not Phase.EDIT:
        return [], None
    data.set_state(state.views)
    data.start_from_current()
    _copy(run_folder(path) / "wys", folder, SNAPSHOTS, CAPTURED_SCENE)
    return state.history, {key: checkpoint[key] for key in ("step", "pipeline", STATE_KEY)}


@main_process_only
def copy_resumed_files(state: RunState, old: Path, folder: Path) -> None:
    """Brings the files of a run that is resumed to where it goes on, as they were at its checkpoint.

    Args:
        state: The checkpoint's.
        old: Its run's `wys` folder.
        folder: The `wys` folder of the run that goes on; it may be the same.
    """
    _copy(old, folder, "relevance", "masks", SNAPSHOTS, CAPTURED_SCENE)
    records = edit_records(old, before_step=state.step + 1)
    write_text(folder / "edits.jsonl", "".join(f"{line}\n" for line in records))


@main_process_only
def _copy(old: Path, new: Path, *names: str) -> None:
    """Copies files and folders of another run's `wys` folder, those that are there."""
    if old.resolve() == new.resolve():
        return
    new.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (old / name).is_dir():
            shutil.copytree(old / name, new / name, dirs_exist_ok=True)
        elif (old / name).is_file():
            shutil.copy2(old / name, new / name)
