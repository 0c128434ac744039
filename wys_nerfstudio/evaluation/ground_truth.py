"""What an edit should have done, where a scene brings it along: a folder `ground_truth` beside the captured views.

`ground_truth/edits.json` lists edits, each a `slug`, an `instruction`, a `caption_before` and a `caption_after`;
`ground_truth/SLUG/images` and `ground_truth/SLUG/masks` hold the edited views and which of their pixels change, under the names of
the captured views. Training never reads them.
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
    """What the scene shows before and after."""

    @staticmethod
    def find(scene: Path, instruction: str) -> "GroundTruth | None":
        """The truth of an instruction, whatever its case and punctuation; None if the scene has none."""
        index = scene / "ground_truth" / "edits.json"
        if not index.is_file():
            return None
        for edit in json.loads(index.read_text("utf8")):
            if _plain(instruction) == _plain(edit["instruction"]):
                folder = scene / "ground_truth" / edit["slug"]
                return GroundTruth(folder, (edit["caption_before"], edit["caption_after"]))
        return None

    def edited(self, name: str) -> Float[Tensor, "h w 3"]:
        """A view, by its file's name, as it should look."""
        return read_png(self.folder / "images" / name)

    def mask(self, name: str) -> Bool[Tensor, "h w"]:
        """Which pixels of a view change."""
        with Image.open(self.folder / "masks" / name) as image:
            return torch.from_numpy(np.array(image.convert("L"))) > 127


def _plain(instruction: str) -> str:
    return " ".join("".join(c for c in instruction.lower() if c.isalnum() or c.isspace() or c == "'").split())
