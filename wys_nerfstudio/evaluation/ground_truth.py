"""Ground truth of edits: an optional folder `ground_truth` beside the captured views.

`ground_truth/edits.json` lists edits, each a `slug`, an `instruction`, a `caption_before` and a `caption_after`;
`ground_truth/SLUG/images` and `ground_truth/SLUG/masks` hold the edited views and the masks of the
changed pixels, under the file names of the captured views. Training does not use them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from wys_nerfstudio.utils.visualization import read_png


@dataclass
class GroundTruth:
    """The ground truth of one edit."""

    folder: Path
    """Folder of the edit, with `images` and `masks`."""
    captions: tuple[str, str]
    """Descriptions of the scene before and after the edit."""

    @staticmethod
    def find(scene: Path, instruction: str) -> "GroundTruth | None":
        """Find the ground truth of an instruction, ignoring case and punctuation; None if there is none."""
        index = scene / "ground_truth" / "edits.json"
        if not index.is_file():
            return None
        for edit in json.loads(index.read_text("utf8")):
            if _normalize(instruction) == _normalize(edit["instruction"]):
                folder = scene / "ground_truth" / edit["slug"]
                return GroundTruth(folder, (edit["caption_before"], edit["caption_after"]))
        return None

    def edited(self, name: str) -> Float[Tensor, "h w 3"]:
        """Read the edited view with a given file name."""
        return read_png(self.folder / "images" / name)

    def mask(self, name: str) -> Bool[Tensor, "h w"]:
        """Read the mask of the pixels that change in a view."""
        with Image.open(self.folder / "masks" / name) as image:
            return torch.from_numpy(np.array(image.convert("L"))) > 127


def _normalize(instruction: str) -> str:
    return " ".join("".join(c for c in instruction.lower() if c.isalnum() or c.isspace() or c == "'").split())
