"""Held-out images of the toy world and a list of their edits, for `wys sweep`.

Scenes are of the test split, which was not used to train the demo editor or the demo CLIP model. Edits are local, because masks
have no effect on global edits.
"""

import csv
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from wys_nerfstudio.demo.instructions import CAPTION, EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.world import TEST_SEEDS, sample_cameras, sample_scenes

FIRST_SCENE = 5000
"""Index of the first test scene used; the model cards use earlier ones."""
SIDE = 64
"""Height and width of the images in pixels."""
MIN_CHANGE = 0.01
"""Minimum share of changed pixels: the edited object must be visible."""
LOCAL = [number for number, edit in enumerate(EDITS) if edit.kind in LOCAL_KINDS]


def write_demo_images(folder: Path, count: int) -> Path:
    """Write images of 64 x 64 pixels and `list.csv`, which assigns one of the local edits to each image.

    Args:
        folder: Output folder.
        count: Number of images.

    Returns:
        The list file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "list.csv").open("w", encoding="utf8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "instruction", "caption_before", "caption_after"])
        for number, view in zip(range(count), held_out_views(LOCAL)):
            edit = EDITS[LOCAL[number % len(LOCAL)]]
            name = f"{number:03d}_{edit.slug}.png"
            Image.fromarray(view[-1].numpy()).save(folder / name)
            table.writerow([name, edit.wordings[0], CAPTION, edit.caption])
    return folder / "list.csv"


def held_out_views(edits: Sequence[int]) -> Iterator[UInt8[Tensor, "edits h w 3"]]:
    """Yield held-out views after each of EDITS, cycling through the given edits; the next edit is visible in each view.

    Args:
        edits: Indices into EDITS.
    """
    seeds = iter(TEST_SEEDS[FIRST_SCENE:])
    for edit in cycle(edits):
        changed = 0.0
        while changed < MIN_CHANGE:
            seed = next(seeds)
            scene = sample_scenes([seed])
            with torch.no_grad():
                view = render_edits(scene, sample_cameras(scene, [seed], SIDE, SIDE))[0]
            changed = float((view[edit] != view[-1]).any(-1).float().mean())
        yield view
