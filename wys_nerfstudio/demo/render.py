"""Views of toy scenes before and after every edit."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from wys_nerfstudio.demo.instructions import EDITS, apply
from wys_nerfstudio.demo.tracer import shade, to_bytes, trace
from wys_nerfstudio.demo.world import Camera, Scene


def render_edits(scene: Scene, camera: Camera) -> UInt8[Tensor, "b edits h w 3"]:
    """Render one view per scene after each of EDITS. The last edit is "no change": the view before the edit.

    Args:
        scene: Batch of b scenes.
        camera: Batch of b cameras.

    Returns:
        8-bit images. All edits share one ray trace, because none of them moves an object.
    """
    hits = trace(scene, camera)
    images = []
    for edit in EDITS:
        color, _, _ = shade(apply(edit, scene), hits)
        images.append(to_bytes(color.view(len(scene), camera.height, camera.width, -1, 3).mean(-2)))
    return torch.stack(images, 1)
