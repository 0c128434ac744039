"""Views of toy scenes before and after every edit."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from wys_nerfstudio.demo.instructions import EDITS, apply
from wys_nerfstudio.demo.tracer import shade, to_bytes, trace
from wys_nerfstudio.demo.world import Camera, Scene


def render_edits(scene: Scene, camera: Camera) -> UInt8[Tensor, "b edits h w 3"]:
    """One view per scene, after each of EDITS; the last edit is "no change", hence the picture before.

    Args:
        scene: b scenes.
        camera: b cameras.

    Returns:
        Pictures of all scenes and edits. All edits share one trace, because none of them moves anything.
    """
    hits = trace(scene, camera)
    pictures = []
    for edit in EDITS:
        color, _, _ = shade(apply(edit, scene), hits)
        pictures.append(to_bytes(color.view(len(scene), camera.height, camera.width, -1, 3).mean(-2)))
    return torch.stack(pictures, 1)
