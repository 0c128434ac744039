"""`wys export`: the edited scene of a run as a data set in nerfstudio's format, on which any method trains."""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from wys_nerfstudio.cli.finished_run import find_config, require_outside
from wys_nerfstudio.utils.atomic_io import atomic_write, write_json
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import locked_folder
from wys_nerfstudio.utils.image_io import ImageFile, provenance, write_image
from wys_nerfstudio.utils.visualization import SOFTWARE, save_png, to_uint8

if TYPE_CHECKING:
    from wys_nerfstudio.cli.export_transforms import CaptureFrame
    from wys_nerfstudio.pipeline import WysPipeline
    from wys_nerfstudio.training.run_state import RunState

POINTS_FILE = "points.ply"


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
    points: int = 100_000
    """Number of rays whose surface points are written to points.ply, from which splatfacto starts."""
    format: Literal["nerfstudio", "colmap"] = "nerfstudio"
    """With colmap a COLMAP model in text format is written, too, to sparse/0."""

    def main(self) -> None:
        """Write the data set."""
        if self.points < 1:
            raise WysError(f"--points must be at least 1, not {self.points}.")
        written = export_run(self.run, self.output, self.renders, self.points, self.format)
        data = shlex.quote(str(self.output))
        print(
            f"Wrote {written} to {self.output}. To train on them: ns-train nerfacto --data {data}, or "
            f"ns-train splatfacto --data {data}."
        )


def export_run(
    run: Path, output: Path, renders: bool, points: int, data_format: Literal["nerfstudio", "colmap"] = "nerfstudio"
) -> str:
    """Write the edited scene of a run as a data set in nerfstudio's format; `transforms.json` is written last.

    Args:
        run: Folder or config.yml of the run.
        output: Output folder, new or empty.
        renders: Write renders instead of the edited views.
        points: Number of rays whose surface points are written.
        data_format: With "colmap" a COLMAP model is written, too.

    Returns:
        What was written, in words.

    Raises:
        WysError: If the run is not a wys run with edited views, or the folder is not empty, or COLMAP cannot
            describe the views.
    """
    from nerfstudio.utils.eval_utils import eval_setup
    from nerfstudio.utils.rich_utils import CONSOLE
    from rich.progress import track

    from wys_nerfstudio.cli.export_colmap import MODEL_FOLDER, require_colmap, write_colmap_model
    from wys_nerfstudio.cli.export_points import ply_file
    from wys_nerfstudio.cli.export_transforms import CaptureFrame, camera_keys, capture_keys
    from wys_nerfstudio.demo.scene import require_empty_folder

    config = find_config(run, "wys export")
    require_outside(output, config.parent)
    require_empty_folder(output)
    state = edited_state(config.parent)
    with locked_folder(output, "the data set"):
        pipeline: Any = eval_setup(config, test_mode="test")[1]
        data = pipeline.datamanager
        data.load_views_state(state.views)
        frame = CaptureFrame.of(data.dataparser.config, data.train_dataparser_outputs)
        shared = capture_keys(data.cameras, frame)
        if data_format == "colmap":
            require_colmap(shared["camera_model"], camera_keys(data.cameras[:1], frame), data.view_names)
        edits = edit_records(state, pipeline.config.editor)
        views = track(range(data.num_views), description="Views", console=CONSOLE)
        frames = [write_view(output, pipeline, frame, view, edits, renders) for view in views]
        views = track(range(data.num_views), description="Surface points", console=CONSOLE)
        positions, colors = scene_points(pipeline, frame, views, points)
        about = f"{'renders' if renders else 'views'} of a scene edited with {SOFTWARE}"
        comments = [about, *(json.dumps(edit["instruction"]) for edit in edits)]
        atomic_write(output / POINTS_FILE, ply_file(positions, colors, comments))
        if data_format == "colmap":
            write_colmap_model(output / MODEL_FOLDER, shared["camera_model"], frames, positions, colors, about)
        record = {"software": SOFTWARE, "content": about, "edits": edits}
        transforms = {**shared, "ply_file_path": POINTS_FILE, "wys_nerfstudio": record, "frames": frames}
        write_json(output / "transforms.json", transforms)
    return f"{data.num_views} views, {len(data.edited_views)} of them edited, and {len(positions)} points"


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


def edit_records(state: "RunState", editor: str) -> list[dict[str, Any]]:
    """Return the records, as of `provenance`, of the edits that are in force in a run, oldest first.

    Args:
        state: State of the run.
        editor: The run's editor. Earlier edits, which may come from a base run, are recorded without one.
    """
    from wys_nerfstudio.training.history import HistoryEntry, in_force

    *earlier, _ = in_force([HistoryEntry(**entry) for entry in state.history])
    current = state.settings.as_dict()
    return [*(entry.settings for entry in earlier), provenance(current["instruction"], editor, current)]


def write_view(
    output: Path,
    pipeline: "WysPipeline",
    frame: "CaptureFrame",
    view: int,
    edits: Sequence[dict[str, Any]],
    renders: bool,
) -> dict[str, Any]:
    """Write a training view and its masks.

    Args:
        output: Folder of the data set.
        pipeline: The run, with its edited views.
        frame: Coordinates of the capture.
        view: Index of the view.
        edits: Result of `edit_records`.
        renders: Write a render instead of the edited view.

    Returns:
        The view's frame of `transforms.json`.
    """
    from wys_nerfstudio.cli.export_transforms import camera_keys

    data, model = pipeline.datamanager, pipeline.scene_model
    name = data.view_names[view]
    captured, current = (to_uint8(views([view])[0]) for views in (data.captured_views, data.current_views))
    keys: dict[str, Any] = {"file_path": f"images/{name}.png", "edit_mask_path": f"edit_masks/{name}.png"}
    image = output / keys["file_path"]
    if renders or view in data.edited_views:
        pixels = torch.from_numpy(to_uint8(model.render_colors(data.cameras, view)) if renders else current)
        write_image(image, pixels, ImageFile(pixels, edits=tuple(edits[:-1])), edits[-1])
    else:
        save_png(image, Image.fromarray(current), f"captured view {name}, not edited")
    edited = Image.fromarray((captured != current).any(axis=-1))
    save_png(output / keys["edit_mask_path"], edited, f"edited pixels of view {name}")
    mask = data.frame_mask(view)
    if mask is not None:
        keys["mask_path"] = f"masks/{name}.png"
        save_png(output / keys["mask_path"], Image.fromarray(mask.numpy()).convert("L"), f"frame mask of view {name}")
    return {
        **keys,
        "edited": view in data.edited_views,
        **camera_keys(model.pose_corrected_camera(data.cameras, view), frame),
    }


def scene_points(
    pipeline: "WysPipeline", frame: "CaptureFrame", views: Iterable[int], count: int
) -> tuple[Float[Tensor, "n 3"], UInt8[Tensor, "n 3"]]:
    """Return the surface points of a scene in the coordinates of the capture, and their colors.

    Args:
        pipeline: The run.
        frame: Coordinates of the capture.
        views: Indices of all training views.
        count: Number of rays.
    """
    from wys_nerfstudio.cli.export_points import grid_size, surface_points

    data = pipeline.datamanager
    size = grid_size(*data.view_size, count / data.num_views)
    parts = [surface_points(pipeline.scene_model, data.cameras, view, size) for view in views]
    points, colors = (torch.cat(part) for part in zip(*parts))
    return frame.points(points), colors
