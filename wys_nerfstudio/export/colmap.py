"""Cameras, views and points of a data set as a COLMAP model in text format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from nerfstudio.data.utils.colmap_parsing_utils import rotmat2qvec
from torch import Tensor

from wys_nerfstudio.utils.atomic_io import write_text
from wys_nerfstudio.utils.errors import WysError

MODEL_FOLDER = "sparse/0"
"""Folder of the model, where implementations of Gaussian splatting look for it. Not `colmap/sparse/0`, which would make nerfstudio
assume an `applied_transform`."""


def colmap_camera(model: str, frame: dict[str, Any]) -> str:
    """Return the simplest camera model of COLMAP that describes a frame, with its size and parameters, as a line of text.

    Args:
        model: `camera_model` of transforms.json.
        frame: Frame of transforms.json.

    Raises:
        WysError: If COLMAP has no such model.
    """
    k1, k2, k3, k4, p1, p2 = (frame.get(key, 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if model == "OPENCV_FISHEYE" and p1 == p2 == 0:
        name, distortion = "OPENCV_FISHEYE", [k1, k2, k3, k4]
    elif model == "OPENCV" and k4 == 0:
        name, distortion = "FULL_OPENCV", [k1, k2, p1, p2, k3, 0.0, 0.0, 0.0]
        if k3 == 0:
            name, distortion = ("OPENCV", distortion[:4]) if k1 or k2 or p1 or p2 else ("PINHOLE", [])
    else:
        raise WysError(
            f"COLMAP has no camera model for {model} cameras with the distortion of these views: leave out --format colmap."
        )
    intrinsics = [frame[key] for key in ("fl_x", "fl_y", "cx", "cy")]
    return " ".join(map(str, [name, frame["w"], frame["h"], *intrinsics, *distortion]))


def require_colmap(model: str, frame: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse views that COLMAP's text format cannot describe.

    Args:
        model: As in `colmap_camera`.
        frame: As in `colmap_camera`.
        names: Names of the views.

    Raises:
        WysError: As for `colmap_camera`, or if a name has blanks, which separate the format's values.
    """
    colmap_camera(model, frame)
    for name in names:
        if len(name.split()) > 1:
            raise WysError(
                f'The name of the view "{name}" has a blank, which COLMAP\'s text format does not allow: leave out --format colmap.'
            )


def write_colmap_model(
    folder: Path,
    model: str,
    frames: Sequence[dict[str, Any]],
    points: Float[Tensor, "n 3"],
    colors: UInt8[Tensor, "n 3"],
    about: str,
) -> None:
    """Write `cameras.txt`, `images.txt` and `points3D.txt`; points have no tracks.

    Args:
        folder: Folder of the model.
        model: `camera_model` of transforms.json.
        frames: Frames of transforms.json.
        points: Positions.
        colors: Colors in 8 bits.
        about: A line that describes the data set.

    Raises:
        WysError: If COLMAP has no such camera model.
    """
    cameras: dict[str, int] = {}
    images = [f"# {about}"]
    for number, frame in enumerate(frames, 1):
        camera = cameras.setdefault(colmap_camera(model, frame), len(cameras) + 1)
        # COLMAP's cameras look along +z with y down, nerfstudio's along -z with y up.
        world_to_camera = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1.0, -1.0, -1.0, 1.0]))
        pose = [*rotmat2qvec(world_to_camera[:3, :3]), *world_to_camera[:3, 3]]
        images += [f"{number} {' '.join(map(str, pose))} {camera} {Path(frame['file_path']).name}", ""]
    rows = zip(points.tolist(), colors.tolist())
    lines = [f"{i} {' '.join(map(str, [*position, *color]))} 0" for i, (position, color) in enumerate(rows, 1)]
    write_text(folder / "cameras.txt", "\n".join([f"# {about}", *(f"{i} {line}" for line, i in cameras.items()), ""]))
    write_text(folder / "images.txt", "\n".join([*images, ""]))
    write_text(folder / "points3D.txt", "\n".join([f"# {about}", *lines, ""]))
