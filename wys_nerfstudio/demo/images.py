"""Single pictures of the toy world and a list of edits of them, for `wys sweep`.

Scenes of the test split, which neither the demo editor nor the demo CLIP has seen. Edits of one object only: a mask has
nothing to say about an edit of everything.
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
"""Far from the test scenes that figures of the model cards come from."""
SIDE = 64
SMALLEST_CHANGE = 0.01
"""Share of the pixels that an edit must change to be worth asking for: what is hidden cannot be painted."""
LOCAL = [number for number, edit in enumerate(EDITS) if edit.kind in LOCAL_KINDS]


def write_demo_images(folder: Path, count: int) -> Path:
    """Writes pictures of 64 x 64 pixels and `list.csv`, each picture with the next of the local edits.

    Args:
        folder: Where they go.
        count: How many.

    Returns:
        The list.
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
    """Test scenes after each of EDITS, the last one being the scene as it is: one for each of some edits in turn, such that
    the edit shows in it.

    Args:
        edits: Indices into EDITS.
    """
    seeds = iter(TEST_SEEDS[FIRST_SCENE:])
    for edit in cycle(edits):
        shown = 0.0
        while shown < SMALLEST_CHANGE:
            seed = next(seeds)
            scene = sample_scenes([seed])
            with torch.no_grad():
                view = render_edits(scene, sample_cameras(scene, [seed], SIDE, SIDE))[0]
            shown = float((view[edit] != view[-1]).any(-1).float().mean())
        yield view
