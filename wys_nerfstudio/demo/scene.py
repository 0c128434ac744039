"""The demo scene: views around a toy scene in nerfstudio's format, with the ground truth of its edits.

Training does not read `ground_truth/`; it is for evaluation only.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from wys_nerfstudio.demo.instructions import CAPTION, EDITS
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.world import DEMO_SEEDS, Camera, Scene, look_at, sample_scenes
from wys_nerfstudio.utils.errors import WysError

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
FIELD_OF_VIEW = 48.0
"""Field of view along the shorter side in degrees."""
DISTANCE = 3.1
"""Distance of the cameras from the center of the scene."""
ELEVATIONS = (14.0, 48.0)
"""Lowest and highest elevation of the cameras in degrees."""
GROUND_TRUTH = (
    "ball-blue", "ball-red", "block-red", "block-yellow", "panda", "polar-bear", "hat", "sunglasses", "snow", "night",
    "no-change",
)  # fmt: skip
"""Slugs of the edits whose ground truth is written."""
_CHUNK = 8


def require_empty_folder(folder: Path) -> None:
    """Refuse an output folder with files: a capture's images often have the names of the demo's.

    Raises:
        WysError: If the folder is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise WysError(f'The folder "{folder}" is not empty: give a new one.')


def demo_cameras(scene: Scene, num_views: int, width: int, height: int) -> Camera:
    """Return cameras on a golden spiral around a scene, aimed at its center.

    Consecutive cameras have well separated azimuths, so that every n-th view is a hold-out from all sides.

    Args:
        scene: A single scene.
        num_views: Number of cameras.
        width: Image width in pixels.
        height: Image height in pixels.
    """
    number = torch.arange(num_views)
    azimuth = GOLDEN_ANGLE * number
    # The elevation passes through its range twice, so that every side is visible from low and from high elevations.
    share = (number * 2 / num_views) % 1
    low, high = (math.sin(math.radians(e)) for e in ELEVATIONS)
    elevation = torch.asin(low + (high - low) * share)
    offset = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    target = scene.center().expand(num_views, 3)
    angle = torch.full((num_views,), math.radians(FIELD_OF_VIEW))
    return look_at(target + DISTANCE * offset, target, angle, width, height)


def render_views(scene: Scene, cameras: Camera) -> UInt8[Tensor, "views edits h w 3"]:
    """Render all views of a single scene after each of EDITS."""
    views = []
    for first in range(0, len(cameras.pose), _CHUNK):
        part = slice(first, first + _CHUNK)
        chunk = Camera(cameras.pose[part], cameras.focal[part], cameras.width, cameras.height)
        views.append(render_edits(scene.repeat(len(chunk.pose)), chunk))
    return torch.cat(views)


def write_demo_scene(folder: Path, *, seed: int = 0, width: int = 80, height: int = 64, num_views: int = 48) -> Path:
    """Write a toy scene with its ground truth.

    Args:
        folder: Output folder: `transforms.json`, `images/`, `ground_truth/edits.json` and, per edit,
            `ground_truth/<slug>/images/` and `ground_truth/<slug>/masks/` (255 where a pixel changes).
        seed: Seed of the scene, at least 0. The scenes were not used to train or test the demo editor.
        width: Image width in pixels, a multiple of 8.
        height: Image height in pixels, a multiple of 8.
        num_views: Number of views.

    Returns:
        The folder.

    Raises:
        ValueError: If the size or the seed is invalid.
    """
    if width % 8 or height % 8 or width <= 0 or height <= 0:
        raise ValueError(f"--width and --height must be positive multiples of 8, not {width} and {height}.")
    if not 0 <= seed < len(DEMO_SEEDS):
        raise ValueError(f"--seed must be between 0 and {len(DEMO_SEEDS) - 1}, not {seed}.")
    scene = sample_scenes([DEMO_SEEDS[seed]])
    cameras = demo_cameras(scene, num_views, width, height)
    with torch.no_grad():
        views = render_views(scene, cameras).numpy()
    before = views[:, [edit.slug for edit in EDITS].index("no-change")]
    names = [f"frame_{number + 1:05d}.png" for number in range(num_views)]
    _write_images(folder / "images", names, before)
    ground_truth = folder / "ground_truth"
    entries = []
    for number, edit in enumerate(EDITS):
        if edit.slug in GROUND_TRUTH:
            after = views[:, number]
            _write_images(ground_truth / edit.slug / "images", names, after)
            _write_images(ground_truth / edit.slug / "masks", names, (after != before).any(-1).astype(np.uint8) * 255)
            entries.append(
                {
                    "slug": edit.slug,
                    "instruction": edit.wordings[0],
                    "caption_before": CAPTION,
                    "caption_after": edit.caption,
                }
            )
    (ground_truth / "edits.json").write_text(json.dumps(entries, indent=2) + "\n")
    (folder / "transforms.json").write_text(json.dumps(_transforms(cameras, names), indent=2) + "\n")
    return folder


def _write_images(folder: Path, names: list[str], images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images):
        Image.fromarray(image).save(folder / name)


def _transforms(cameras: Camera, names: list[str]) -> dict:
    bottom = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    return {
        "camera_model": "OPENCV",
        "w": cameras.width,
        "h": cameras.height,
        "fl_x": float(cameras.focal[0]),
        "fl_y": float(cameras.focal[0]),
        "cx": cameras.width / 2,
        "cy": cameras.height / 2,
        "frames": [
            {"file_path": f"images/{name}", "transform_matrix": torch.cat([pose, bottom]).tolist()}
            for name, pose in zip(names, cameras.pose)
        ],
    }
