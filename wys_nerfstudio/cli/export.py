"""`wys export`: the edited scene of a run as a data set in nerfstudio's format, on which any method trains."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import tyro

from wys_nerfstudio.cli.finished_run import find_config, require_outside
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import locked_folder

if TYPE_CHECKING:
    from wys_nerfstudio.training.run_state import RunState


@dataclass
class Export:
    """Write the edited scene of a run as a data set in nerfstudio's format, on which any method trains: ns-train nerfacto --data
    DIR, or ns-train splatfacto --data DIR. It contains the training views as the run was trained on them: the latest edit of
    each view, and the captured view if it was never edited. Held-out views are left out, because they are not edited:
    nerfstudio holds out a tenth of the data set instead, or nothing with nerfstudio-data --eval-mode all. Poses are those of
    the capture's transforms.json with the corrections that the run has learned; intrinsics and distortion are those of the
    exported images. Needs neither the editor nor a network."""

    run: tyro.conf.Positional[Path]
    """Folder or config.yml of the run."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Output folder, new or empty: transforms.json, images/, edit_masks/ (white where a view was edited), masks/ (the capture's
    own, if it has any) and points.ply."""
    renders: bool = False
    """Write renders of the edited scene from the training cameras instead of the edited views: they are consistent with each
    other, and less sharp."""
    camera_path: Optional[Path] = None
    """With --renders, render the perspective cameras of a camera path that nerfstudio's viewer has saved, instead of the training
    cameras. There are no edit_masks/ and masks/ then."""
    points: int = 100_000
    """Number of rays whose surface points are written to points.ply, from which splatfacto starts."""
    format: Literal["nerfstudio", "colmap"] = "nerfstudio"
    """With colmap a COLMAP model in text format is written, too, to sparse/0."""

    def main(self) -> None:
        """Write the data set."""
        if self.points < 1:
            raise WysError(f"--points must be at least 1, not {self.points}.")
        if self.camera_path is not None and not self.renders:
            raise WysError("The cameras of --camera-path are rendered: add --renders.")
        written = export_run(self.run, self.output, self.renders, self.points, self.format, self.camera_path)
        data = shlex.quote(str(self.output))
        print(
            f"Wrote {written} to {self.output}. To train on them: ns-train nerfacto --data {data}, or "
            f"ns-train splatfacto --data {data}."
        )


def export_run(
    run: Path,
    output: Path,
    renders: bool,
    points: int,
    data_format: Literal["nerfstudio", "colmap"] = "nerfstudio",
    camera_path: Optional[Path] = None,
) -> str:
    """Write the edited scene of a run as a data set in nerfstudio's format; `transforms.json` is written last.

    Args:
        run: Folder or config.yml of the run.
        output: Output folder, new or empty.
        renders: Write renders instead of the edited views.
        points: Number of rays whose surface points are written.
        data_format: With "colmap" a COLMAP model is written, too.
        camera_path: Camera path whose renders are written instead of the views.

    Returns:
        What was written, in words.

    Raises:
        WysError: If the run is not a wys run with edited views, or the folder is not empty, or COLMAP cannot
            describe the views, or the camera path is not one that can be rendered.
    """
    from nerfstudio.utils.eval_utils import eval_setup

    from wys_nerfstudio.demo.scene import require_empty_folder
    from wys_nerfstudio.export.camera_path import read_camera_path
    from wys_nerfstudio.export.data_set import edit_records, write_data_set
    from wys_nerfstudio.training.history import HistoryEntry

    config = find_config(run, "wys export")
    require_outside(output, config.parent)
    require_empty_folder(output)
    path = None if camera_path is None else read_camera_path(camera_path)
    state = edited_state(config.parent)
    with locked_folder(output, "the data set"):
        pipeline: Any = eval_setup(config, test_mode="test")[1]
        data = pipeline.datamanager
        data.load_views_state(state.views)
        history = [HistoryEntry(**entry) for entry in state.history]
        edits = edit_records(history, state.settings, pipeline.config.editor)
        return write_data_set(output, data, pipeline.scene_model, edits, renders, points, data_format, path)


def edited_state(run: Path) -> "RunState":
    """Return the state of a run in its newest undamaged checkpoint.

    Args:
        run: Folder of the run.

    Raises:
        WysError: If it has no checkpoint or no edited views.
    """
    from wys_nerfstudio.training.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint
    from wys_nerfstudio.training.run_state import RunState

    if newest_checkpoint(run / "nerfstudio_models") is None:
        raise WysError(f'The run "{run}" has no checkpoint yet: wait until it has saved one, or train it again.')
    path = find_checkpoint(run, "wys export")
    state = RunState.from_checkpoint(read_checkpoint(path), path)
    if not state.views["edited"]:
        raise WysError(
            f'The run "{run}" has no edited views at step {state.step}: resume it with --load-dir "{run}", or train it with a '
            "lower --mask-threshold if it is finished."
        )
    return state
