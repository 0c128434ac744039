"""The demo scene: one toy scene seen from all round, in nerfstudio's format, with the ground truth of every edit.

Here: which views there are, and the files. Not here: how a view is rendered (`tracer.py`). Nothing under `ground_truth/` is
read by training; it is there to measure what training has done.
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

GOLDEN_TURN = math.pi * (3 - math.sqrt(5))
SHORT_SIDE_DEGREES = 48.0
DISTANCE = 3.1
ELEVATIONS = (14.0, 48.0)
GROUND_TRUTH = (
    "ball-blue", "ball-red", "block-red", "block-yellow", "panda", "polar-bear", "hat", "sunglasses", "snow", "night",
    "no-change",
)  # fmt: skip
"""Edits whose result is written beside the scene."""
_CHUNK = 8


def demo_cameras(scene: Scene, num_views: int, width: int, height: int) -> Camera:
    """Cameras all round one scene, aimed at its middle, evenly spread over the elevations of ELEVATIONS.

    Args:
        scene: one scene.
        num_views: how many cameras.
        width: picture width in pixels.
        height: picture height in pixels.

    Returns:
        The cameras. Any few consecutive ones look from well separated sides (a golden spiral), so that a hold-out of
        every n-th view is held out all round.
    """
    number = torch.arange(num_views)
    azimuth = GOLDEN_TURN * number
    # Elevation walks the range twice, out of step with the azimuth, so that no side is only seen from above.
    share = (number * 2 / num_views) % 1
    low, high = (math.sin(math.radians(e)) for e in ELEVATIONS)
    elevation = torch.asin(low + (high - low) * share)
    offset = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    target = scene.center().expand(num_views, 3)
    angle = torch.full((num_views,), math.radians(SHORT_SIDE_DEGREES))
    return look_at(target + DISTANCE * offset, target, angle, width, height)


def render_views(scene: Scene, cameras: Camera) -> UInt8[Tensor, "views edits h w 3"]:
    """All views of one scene after each of EDITS, as stored."""
    views = []
    for first in range(0, len(cameras.pose), _CHUNK):
        part = slice(first, first + _CHUNK)
        some = Camera(cameras.pose[part], cameras.focal[part], cameras.width, cameras.height)
        views.append(render_edits(scene.repeat(len(some.pose)), some))
    return torch.cat(views)


def write_demo_scene(folder: Path, *, seed: int = 0, width: int = 80, height: int = 64, num_views: int = 48) -> Path:
    """Writes one toy scene with its ground truth.

    Args:
        folder: created if need be: `transforms.json`, `images/`, `ground_truth/edits.json` and, per edit,
            `ground_truth/<slug>/images/` and `ground_truth/<slug>/masks/` (255 where a pixel of the stored picture differs).
        seed: which scene, at least 0. Whatever it is, the scene is none that the demo editor was trained or tested on.
        width: picture width in pixels, a multiple of 8.
        height: picture height in pixels, a multiple of 8.
        num_views: how many views.

    Returns:
        The folder.

    Raises:
        ValueError: if a side is no multiple of 8, or there is no such seed.
    """
    if width % 8 or height % 8 or width <= 0 or height <= 0:
        raise ValueError(f"The demo editor works on sides that are multiples of 8, not on {width} x {height}.")
    if not 0 <= seed < len(DEMO_SEEDS):
        raise ValueError(f"The demo scene's seed is a number from 0 to {len(DEMO_SEEDS) - 1}, not {seed}.")
    scene = sample_scenes([DEMO_SEEDS[seed]])
    cameras = demo_cameras(scene, num_views, width, height)
    with torch.no_grad():
        views = render_views(scene, cameras).numpy()
    before = views[:, [edit.slug for edit in EDITS].index("no-change")]
    names = [f"frame_{number + 1:05d}.png" for number in range(num_views)]
    _write_pictures(folder / "images", names, before)
    truth = folder / "ground_truth"
    listed = []
    for number, edit in enumerate(EDITS):
        if edit.slug in GROUND_TRUTH:
            after = views[:, number]
            _write_pictures(truth / edit.slug / "images", names, after)
            _write_pictures(truth / edit.slug / "masks", names, (after != before).any(-1).astype(np.uint8) * 255)
            listed.append(
                {
                    "slug": edit.slug,
                    "instruction": edit.wordings[0],
                    "caption_before": CAPTION,
                    "caption_after": edit.caption,
                }
            )
    (truth / "edits.json").write_text(json.dumps(listed, indent=2) + "\n")
    (folder / "transforms.json").write_text(json.dumps(_transforms(cameras, names), indent=2) + "\n")
    return folder


def _write_pictures(folder: Path, names: list[str], pictures: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, pictures):
        Image.fromarray(picture).save(folder / name)


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
