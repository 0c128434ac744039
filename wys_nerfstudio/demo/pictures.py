"""Single pictures of the toy world and a list of edits of them, for `wys sweep`.

Scenes of the test split, which neither the demo editor nor the demo CLIP has seen. Edits of one object only: a mask has
nothing to say about an edit of everything.
"""

import csv
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from wys_nerfstudio.demo.instructions import CAPTION, EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.training_data import render_edits
from wys_nerfstudio.demo.world import TEST_SEEDS, sample_cameras, sample_scenes
from wys_nerfstudio.sweep_files import COLUMNS

FIRST_SCENE = 5000
"""Far from the test scenes that figures of the model cards come from."""
SIDE = 64
SMALLEST_CHANGE = 0.01
"""Share of the pixels that an edit must change to be worth asking for: what is hidden cannot be painted."""
LOCAL = [number for number, edit in enumerate(EDITS) if edit.kind in LOCAL_KINDS]


def write_demo_pictures(folder: Path, count: int) -> Path:
    """Writes pictures of 64 x 64 pixels and `list.csv`, each picture with the next of the local edits.

    Args:
        folder: Where they go.
        count: How many.

    Returns:
        The list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = iter(TEST_SEEDS[FIRST_SCENE:])
    with (folder / "list.csv").open("w", encoding="utf8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for number in range(count):
            chosen = LOCAL[number % len(LOCAL)]
            edit, view = EDITS[chosen], _view(next(seeds))
            while (view[chosen] != view[-1]).any(-1).float().mean() < SMALLEST_CHANGE:
                view = _view(next(seeds))
            name = f"{number:03d}_{edit.slug}.png"
            Image.fromarray(view[-1].numpy()).save(folder / name)
            table.writerow([name, edit.wordings[0], CAPTION, edit.caption])
    return folder / "list.csv"


def _view(seed: int) -> UInt8[Tensor, "edits h w 3"]:
    scene = sample_scenes([seed])
    with torch.no_grad():
        return render_edits(scene, sample_cameras(scene, [seed], SIDE, SIDE))[0]
