"""Colored points on the surfaces of a scene, and PLY files."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from wys_nerfstudio.model import WysModel
from wys_nerfstudio.utils.cameras import resize_cameras
from wys_nerfstudio.utils.visualization import to_uint8

MIN_ACCUMULATION = 0.5
"""Rays of a smaller accumulation have no median depth: they pass through the scene."""
MAX_LINE = 1000
"""Characters of a line in a PLY header; open3d refuses longer ones."""


def grid_size(height: int, width: int, pixels: float) -> tuple[int, int]:
    """Return height and width of a grid over a view of about a number of pixels, and at most the view's.

    Args:
        height: Height of the view.
        width: Width of the view.
        pixels: Number of pixels of the grid.
    """
    scale = min(1.0, math.sqrt(pixels / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))


@torch.no_grad()
def surface_points(
    model: WysModel, cameras: Cameras, view: int, size: tuple[int, int]
) -> tuple[Float[Tensor, "n 3"], UInt8[Tensor, "n 3"]]:
    """Return the points of the scene that a training view shows, at the median depth of its rays, and their colors.

    Args:
        model: The scene.
        cameras: The training cameras.
        view: Index of the view among them.
        size: Height and width of the grid of rays over the view.
    """
    camera = model.pose_corrected_camera(cameras, view)
    resize_cameras(camera, size[1], size[0])
    rays = camera.generate_rays(0)
    with model.eval_as_view(view):
        outputs = model.get_outputs_for_camera_ray_bundle(rays)
    solid = outputs["accumulation"][..., 0] >= MIN_ACCUMULATION
    points = (rays.origins + rays.directions * outputs["depth"].to(rays.origins))[solid]
    return points.cpu(), torch.from_numpy(to_uint8(outputs["rgb"][solid]))


def ply_file(points: Float[Tensor, "n 3"], colors: UInt8[Tensor, "n 3"], comments: Sequence[str]) -> bytes:
    """Return the content of a binary PLY file.

    Args:
        points: Positions.
        colors: Colors in 8 bits.
        comments: Lines of ASCII text for its header; long ones are cut off.
    """
    fields = [(axis, "<f4") for axis in "xyz"] + [(channel, "u1") for channel in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=fields)
    for i, (name, _) in enumerate(fields):
        vertices[name] = (points if i < 3 else colors)[:, i % 3].numpy()
    properties = [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in fields]
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {line}"[:MAX_LINE] for line in comments)]
    header.append(f"element vertex {len(points)}")
    return "\n".join([*header, *properties, "end_header\n"]).encode("ascii") + vertices.tobytes()
