"""Writes the views, masks, cameras and surface points of an edited scene in nerfstudio's format."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from torch import Tensor

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.export.colmap import MODEL_FOLDER, require_colmap, write_colmap_model
from wys_nerfstudio.export.points import grid_size, ply_file, surface_points
from wys_nerfstudio.export.transforms import CaptureFrame, camera_keys, capture_keys
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.history import HistoryEntry, in_force
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.atomic_io import atomic_write, write_json
from wys_nerfstudio.utils.image_io import ImageFile, provenance, write_image
from wys_nerfstudio.utils.progress import track
from wys_nerfstudio.utils.visualization import SOFTWARE, save_png, to_uint8

POINTS_FILE = "points.ply"


def write_data_set(
    output: Path,
    data: WysDataManager,
    model: WysModel,
    edits: Sequence[dict[str, Any]],
    renders: bool = False,
    points: int = 100_000,
    data_format: Literal["nerfstudio", "colmap"] = "nerfstudio",
    path: Optional[Cameras] = None,
    report: Callable[[str], None] = lambda text: None,
) -> str:
    """Write the edited scene of a run as a data set in nerfstudio's format; `transforms.json` is written last.

    Args:
        output: Output folder.
        data: The views of the run, some of them edited.
        model: The scene.
        edits: Result of `edit_records`.
        renders: Write renders instead of the edited views.
        points: Number of rays whose surface points are written.
        data_format: With "colmap" a COLMAP model is written, too.
        path: Cameras whose renders are written instead of the views.
        report: Receives the progress.

    Returns:
        What was written, in words.

    Raises:
        WysError: If COLMAP cannot describe the views.
        OSError: If a file cannot be written.
    """

    def each(what: str, count: int) -> Iterator[int]:
        for number in track(range(count), description=what):
            report(f"export: {what.lower()}, view {number + 1} of {count}")
            yield number

    frame = CaptureFrame.of(data.dataparser.config, data.train_dataparser_outputs)
    cameras = data.cameras if path is None else path
    shared = capture_keys(cameras, frame)
    if data_format == "colmap":
        require_colmap(shared["camera_model"], camera_keys(cameras[:1], frame), data.view_names if path is None else [])
    numbers = each("Images", len(cameras))
    if path is None:
        frames = [write_view(output, data, model, frame, view, edits, renders) for view in numbers]
        written = f"{len(frames)} views, {len(data.edited_views)} of them edited,"
    else:
        frames = [write_render(output, model, frame, path, number, edits) for number in numbers]
        written = f"{len(frames)} renders along the camera path"
    positions, colors = scene_points(data, model, frame, each("Surface points", data.num_views), points)
    about = f"{'renders' if renders or path is not None else 'views'} of a scene edited with {SOFTWARE}"
    comments = [about, *(json.dumps(edit["instruction"]) for edit in edits)]
    atomic_write(output / POINTS_FILE, ply_file(positions, colors, comments))
    if data_format == "colmap":
        write_colmap_model(output / MODEL_FOLDER, shared["camera_model"], frames, positions, colors, about)
    record = {"software": SOFTWARE, "content": about, "edits": edits}
    transforms = {**shared, "ply_file_path": POINTS_FILE, "wys_nerfstudio": record, "frames": frames}
    write_json(output / "transforms.json", transforms)
    return f"{written} and {len(positions)} points"


def edit_records(history: Sequence[HistoryEntry], settings: RunSettings, editor: str) -> list[dict[str, Any]]:
    """Return the records, as of `provenance`, of the edits that are in force in a run, oldest first.

    Args:
        history: The run's history, without a reset at its end.
        settings: The run's settings.
        editor: The run's editor. Earlier edits, which may come from a base run, are recorded without one.
    """
    *earlier, _ = in_force(history)
    current = settings.as_dict()
    return [*(entry.settings for entry in earlier), provenance(current["instruction"], editor, current)]


def write_view(
    output: Path,
    data: WysDataManager,
    model: WysModel,
    frame: CaptureFrame,
    view: int,
    edits: Sequence[dict[str, Any]],
    renders: bool,
) -> dict[str, Any]:
    """Write a training view and its masks.

    Args:
        output: Folder of the data set.
        data: The views of the run.
        model: The scene.
        frame: Coordinates of the capture.
        view: Index of the view.
        edits: Result of `edit_records`.
        renders: Write a render instead of the edited view.

    Returns:
        The view's frame of `transforms.json`.
    """
    name = data.view_names[view]
    captured, current = (to_uint8(views([view])[0]) for views in (data.captured_views, data.current_views))
    keys: dict[str, Any] = {"file_path": f"images/{name}.png", "edit_mask_path": f"edit_masks/{name}.png"}
    image = output / keys["file_path"]
    if renders or view in data.edited_views:
        pixels = torch.from_numpy(to_uint8(model.render_colors(data.cameras, view)) if renders else current)
        write_edited(image, pixels, edits)
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


def write_render(
    output: Path, model: WysModel, frame: CaptureFrame, path: Cameras, number: int, edits: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write the render of a camera of a path and return its frame of `transforms.json`. As in the viewer, it has no training view's
    appearance.

    Args:
        output: Folder of the data set.
        model: The scene, in eval mode.
        frame: Coordinates of the capture.
        path: The cameras.
        number: Index of the camera among them.
        edits: Result of `edit_records`.
    """
    camera = path[number : number + 1].to(model.device)
    pixels = torch.from_numpy(to_uint8(model.get_outputs_for_camera(camera)["rgb"]))
    file = f"images/path_{number:05d}.png"
    write_edited(output / file, pixels, edits)
    return {"file_path": file, **camera_keys(camera, frame)}


def write_edited(file: Path, pixels: UInt8[Tensor, "h w 3"], edits: Sequence[dict[str, Any]]) -> None:
    """Write an image of the edited scene with the records of its edits.

    Args:
        file: The file.
        pixels: The image.
        edits: Result of `edit_records`.
    """
    write_image(file, pixels, ImageFile(pixels, edits=tuple(edits[:-1])), edits[-1])


def scene_points(
    data: WysDataManager, model: WysModel, frame: CaptureFrame, views: Iterable[int], count: int
) -> tuple[Float[Tensor, "n 3"], UInt8[Tensor, "n 3"]]:
    """Return the surface points of a scene in the coordinates of the capture, and their colors.

    Args:
        data: The views of the run.
        model: The scene.
        frame: Coordinates of the capture.
        views: Indices of all training views.
        count: Number of rays.
    """
    size = grid_size(*data.view_size, count / data.num_views)
    parts = [surface_points(model, data.cameras, view, size) for view in views]
    points, colors = (torch.cat(part) for part in zip(*parts))
    return frame.points(points), colors
