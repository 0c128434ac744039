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

from wys_nerfstudio.utils.data_checks import check_image
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import read_png

KEYS = ("slug", "instruction", "caption_before", "caption_after")
"""Keys of an edit in edits.json."""


@dataclass
class GroundTruth:
    """The ground truth of one edit."""

    folder: Path
    """Folder of the edit, with `images` and `masks`."""
    captions: tuple[str, str]
    """Descriptions of the scene before and after the edit."""

    @staticmethod
    def find(scene: Path, instruction: str) -> "GroundTruth | None":
        """Find the ground truth of an instruction, ignoring case and punctuation; None if there is none.

        Raises:
            WysError: If edits.json is damaged.
        """
        index = scene / "ground_truth" / "edits.json"
        if not index.is_file():
            return None
        try:
            for edit in json.loads(index.read_text("utf8")):
                slug, instructed, before, after = (str(edit[key]) for key in KEYS)
                if _normalize(instruction) == _normalize(instructed):
                    return GroundTruth(scene / "ground_truth" / slug, (before, after))
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise WysError(
                f'"{index}" is not a list of edits with {", ".join(KEYS)}: correct it, or remove it to evaluate without ground '
                "truth."
            ) from error
        return None

    def edited(self, name: str) -> Float[Tensor, "h w 3"]:
        """Read the edited view with a given file name.

        Raises:
            WysError: If it is missing or damaged.
        """
        check_image(self.folder / "images" / name, "the ground truth", decode=True)
        return read_png(self.folder / "images" / name)

    def mask(self, name: str) -> Bool[Tensor, "h w"]:
        """Read the mask of the pixels that change in a view.

        Raises:
            WysError: If it is missing or damaged.
        """
        check_image(self.folder / "masks" / name, "the ground truth", decode=True)
        with Image.open(self.folder / "masks" / name) as image:
            return torch.from_numpy(np.array(image.convert("L"))) > 127


def _normalize(instruction: str) -> str:
    return " ".join("".join(c for c in instruction.lower() if c.isalnum() or c.isspace() or c == "'").split())
