"""Picture files in, edited PNG files out, such that a pixel that is not edited has the very value it had in the file.

Here: which files are read, what of them is kept, where results go. Not here: the edit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from wys_nerfstudio import __version__
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import save_png, to_uint8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Files of a folder that are taken for pictures."""
MIN_SIDE = 16
"""Pixels; what is smaller shows nothing that an editor could recognize."""
EXTRAS = ("relevance", "mask", "side_by_side")
"""What is written beside an edited picture `x.png`: `x_relevance.png` and so on."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageFile:
    """A picture file as it is shown: upright, in color."""

    rgb: Float[Tensor, "h w 3"]
    """Colors in [0, 1], each a 255th part of the file's 8-bit value; what lies under transparency is as in the file."""
    alpha: Optional[UInt8[np.ndarray, "h w"]] = None
    """The file's transparency."""
    icc_profile: Optional[bytes] = None
    """What the file says about the meaning of its colors."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rgb.shape[0], self.rgb.shape[1]


def read_image(path: "str | Path") -> ImageFile:
    """Reads a PNG, JPEG or WebP file of 8 bits per channel, turned upright as its EXIF orientation says.

    Gray and palette pictures become RGB, since an edit may bring color.

    Raises:
        WysError: If there is no such file, it cannot be read, has another bit depth or color space, moves, or is too small.
    """
    path = Path(path)
    if not path.is_file():
        raise WysError(f'There is no picture "{path}".')
    try:
        with path.open("rb") as file:
            head = file.read(25)
        with Image.open(path, formats=_FORMATS) as opened:
            # Pillow opens 16-bit color as 8-bit without a word, so the header is asked: byte 24 is the bit depth.
            if head.startswith(_PNG_SIGNATURE) and head[24] == 16:
                raise WysError(
                    f'"{path}" has 16 bits per channel and edits have 8: convert it first, for instance with '
                    "`magick IN.png -depth 8 OUT.png`."
                )
            # A phone's JPEG may hold further pictures (MPO); the first is what is shown.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                raise WysError(f'"{path}" is an animation: give its frames as single pictures.')
            if opened.mode == "CMYK":
                raise WysError(
                    f'"{path}" has the colors of a printing press (CMYK): convert it to RGB first, for instance with '
                    "`magick IN.jpg -colorspace sRGB OUT.png`."
                )
            profile = opened.info.get("icc_profile") if opened.mode in ("RGB", "RGBA") else None
            upright = ImageOps.exif_transpose(opened)
            pixels = np.array(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WysError(
            f'The picture "{path}" cannot be read ({error}): give an undamaged PNG, JPEG or WebP file.'
        ) from error
    height, width, channels = pixels.shape
    if min(height, width) < MIN_SIDE:
        raise WysError(
            f'"{path}" has {width}x{height} pixels: pictures need at least {MIN_SIDE} along each side to be edited.'
        )
    rgb = torch.from_numpy(pixels[..., :3].astype(np.float32)) / 255
    return ImageFile(rgb, pixels[..., 3].copy() if channels == 4 else None, profile)


def write_image(
    path: "str | Path",
    rgb: Float[Tensor, "h w 3"],
    like: Optional[ImageFile] = None,
    origin: Optional[Mapping[str, str]] = None,
) -> None:
    """Writes colors in [0, 1] as an 8-bit PNG, whole or not at all.

    Args:
        path: The file.
        rgb: Colors.
        like: The picture whose transparency and color profile it gets.
        origin: As of `provenance`.
    """
    pixels = to_uint8(rgb)
    if like is not None and like.alpha is not None:
        pixels = np.concatenate([pixels, like.alpha[..., None]], axis=-1)
    profile = None if like is None else like.icc_profile
    save_png(Path(path), Image.fromarray(pixels), icc_profile=profile, texts=origin)


def provenance(instruction: str, editor: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """What an edited file says about where it comes from (supplement H): PNG's keywords Software and Description for
    people, and `wys-nerfstudio` with everything as JSON.

    Args:
        instruction: What was changed.
        editor: Hub id, folder or "embedded"; of a folder only the name is told.
        settings: Everything else that made the edit.
    """
    software = f"wys-nerfstudio {__version__}"
    editor = Path(editor).name if Path(editor).is_dir() else editor
    made = {"instruction": instruction, "editor": editor, **settings}
    return {
        "Software": software,
        "Description": f'edited with {software}: "{instruction}"',
        "wys-nerfstudio": json.dumps(made, ensure_ascii=False),
    }


def read_mask(path: Path) -> Bool[Tensor, "h w"]:
    """A mask picture: brighter than half is inside.

    Raises:
        WysError: As in `read_image`, or if nothing is inside.
    """
    if not path.is_file():
        raise WysError(f'There is no mask "{path}": --mask takes a picture that is bright where it may be edited.')
    mask = read_image(path).rgb.mean(dim=-1) > 0.5
    if not mask.any():
        raise WysError(
            f'The mask "{path}" is dark everywhere, so nothing would be edited: make it bright where it may be.'
        )
    return mask


def find_images(given: Sequence[Path]) -> list[Path]:
    """The picture files that are meant: files as they are, folders by the pictures in them, in the order of their names.

    Raises:
        WysError: If a file or folder is not there, or a folder has no pictures.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)
            if not inside:
                raise WysError(f'There is no picture in the folder "{path}": PNG, JPEG and WebP files are edited.')
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise WysError(f'There is no picture "{path}".')
    return found


def place_outputs(given: Sequence[Path], pictures: Sequence[Path], output: Path) -> list[Path]:
    """Where the edited pictures go: `output` itself for a single file, else files in the folder `output`.

    Args:
        given: What the user named: files and folders.
        pictures: The pictures in them.
        output: A .png file or a folder.

    Returns:
        One file per picture.

    Raises:
        WysError: If `output` does not fit the input, a file would be written twice, or an input would be overwritten.
    """
    single = len(given) == 1 and given[0].is_file()
    if single and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise WysError(
                f'The edited picture is a PNG file, which alone keeps every pixel as it was: give -o "{output.stem}.png" '
                f'instead of "{output.name}".'
            )
        outputs = [output]
    else:
        if output.is_file() or (output.suffix and not output.is_dir()):
            raise WysError(f'Several pictures are edited into a folder: give -o a folder, not the file "{output}".')
        outputs = [output / f"{path.stem}.png" for path in pictures]
    inputs = {path.resolve(): path for path in pictures}
    taken: dict[Path, Path] = {}
    for picture, file in zip(pictures, outputs):
        for target in (file, *(extra_file(file, extra) for extra in EXTRAS)):
            if target.resolve() in inputs:
                raise WysError(f'"{target}" would overwrite a picture that is edited: give -o another place.')
            if target in taken:
                raise WysError(
                    f'"{taken[target]}" and "{picture}" would both be written to "{target}": rename one of them.'
                )
            taken[target] = picture
    return outputs


def extra_file(output: Path, extra: str) -> Path:
    """One of EXTRAS' files beside an edited picture."""
    return output.with_name(f"{output.stem}_{extra}.png")
