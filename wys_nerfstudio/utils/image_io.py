"""Lossless image input and output for edits: pixels that are not edited keep their exact 8-bit values."""

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
"""Suffixes of the files that are read from a folder."""
MIN_SIDE = 16
"""Minimum side length in pixels."""
EXTRAS = ("relevance", "mask", "side_by_side")
"""Files written beside an edited image `x.png`: `x_relevance.png` and so on."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_MASK_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageFile:
    """Content of an image file, upright and in RGB."""

    rgb: Float[Tensor, "h w 3"]
    """8-bit values divided by 255, not multiplied by alpha."""
    alpha: Optional[UInt8[np.ndarray, "h w"]] = None
    """Alpha channel, if the file has transparency."""
    icc_profile: Optional[bytes] = None
    """Color profile."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rgb.shape[0], self.rgb.shape[1]


def read_image(path: "str | Path") -> ImageFile:
    """Read a PNG, JPEG or WebP file with 8 bits per channel, rotated by its EXIF orientation and converted to RGB.

    Raises:
        WysError: If the file is missing, damaged, animated or too small, or has another bit depth or color space.
    """
    path = Path(path)
    if not path.is_file():
        raise WysError(f'There is no image "{path}".')
    try:
        with path.open("rb") as file:
            head = file.read(25)
        with Image.open(path, formats=_FORMATS) as opened:
            # Pillow reduces 16-bit color to 8 bits without a warning; byte 24 of the header is the bit depth.
            if head.startswith(_PNG_SIGNATURE) and head[24] == 16:
                raise WysError(
                    f'"{path}" has 16 bits per channel, but edits have 8: convert it first, for example with '
                    "`magick IN.png -depth 8 OUT.png`."
                )
            # JPEG files of phones may contain further images (MPO); the first is the photograph.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                raise WysError(f'"{path}" is an animation: extract its frames as single images.')
            if opened.mode == "CMYK":
                raise WysError(
                    f'"{path}" is a CMYK image: convert it to RGB first, for example with '
                    "`magick IN.jpg -colorspace sRGB OUT.png`."
                )
            profile = opened.info.get("icc_profile") if opened.mode in ("RGB", "RGBA") else None
            upright = ImageOps.exif_transpose(opened)
            pixels = np.array(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WysError(
            f'The image "{path}" cannot be read ({error}): give an undamaged PNG, JPEG or WebP file.'
        ) from error
    height, width, channels = pixels.shape
    if min(height, width) < MIN_SIDE:
        raise WysError(f'"{path}" has {width}x{height} pixels: each side of an image must have at least {MIN_SIDE}.')
    rgb = torch.from_numpy(pixels[..., :3].astype(np.float32)) / 255
    return ImageFile(rgb, pixels[..., 3].copy() if channels == 4 else None, profile)


def write_image(
    path: "str | Path",
    rgb: Float[Tensor, "h w 3"],
    like: Optional[ImageFile] = None,
    origin: Optional[Mapping[str, str]] = None,
) -> None:
    """Write RGB values in [0, 1] atomically as an 8-bit PNG.

    Args:
        path: The file.
        rgb: RGB values.
        like: Image whose alpha channel and color profile are copied.
        origin: Metadata, as returned by `provenance`.
    """
    pixels = to_uint8(rgb)
    if like is not None and like.alpha is not None:
        pixels = np.concatenate([pixels, like.alpha[..., None]], axis=-1)
    profile = None if like is None else like.icc_profile
    save_png(Path(path), Image.fromarray(pixels), icc_profile=profile, texts=origin)


def provenance(instruction: str, editor: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata that marks an image as edited (supplement H): PNG text chunks.

    Args:
        instruction: Instruction of the edit.
        editor: Hub id, folder or "embedded"; folders are reduced to their name.
        settings: All other settings of the edit.

    Returns:
        The standard keywords Software and Description, and `wys-nerfstudio` with all arguments as JSON.
    """
    software = f"wys-nerfstudio {__version__}"
    editor = Path(editor).name if Path(editor).is_dir() else editor
    arguments = {"instruction": instruction, "editor": editor, **settings}
    return {
        "Software": software,
        "Description": f'edited with {software}: "{instruction}"',
        "wys-nerfstudio": json.dumps(arguments, ensure_ascii=False),
    }


def read_mask(path: Path) -> Bool[Tensor, "h w"]:
    """Read the mask of an image edit.

    Raises:
        WysError: As in `load_mask`, or if the file is missing or nothing is inside.
    """
    if not path.is_file():
        raise WysError(f'There is no mask "{path}": --mask takes an image that is white in the region to edit.')
    mask = load_mask(path)
    if not mask.any():
        raise WysError(
            f'The mask "{path}" is all black: nothing would be edited. White pixels mark the region to edit.'
        )
    return mask


def load_mask(path: Path, upright: bool = True) -> Bool[Tensor, "h w"]:
    """Read a mask: True inside, which is white in an opaque image and opaque in a cut-out, whatever its colors.

    Args:
        path: An image of 8 bits per channel. It is a cut-out if it has pixels that are more transparent than opaque.
        upright: Apply the file's EXIF orientation.

    Raises:
        WysError: If the file is damaged or of another kind, if its inside is ambiguous, or if it has values of 1 to 127 only, as
            masks of 0 and 1 have.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode not in _MASK_MODES or (opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1):
                raise WysError(
                    f'The mask "{path}" is not a single image of 8 bits per channel in gray or RGB: convert it, for example '
                    f"with `magick {path.name} -colorspace gray -depth 8 {path.stem}.png`."
                )
            image = (ImageOps.exif_transpose(opened) if upright else opened).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WysError(f'The mask "{path}" cannot be read as an image: replace it with an undamaged file.') from error
    brightness, opacity = np.array(image.convert("L")), np.array(image)[..., 3]
    opaque = opacity > 127
    values = brightness if opaque.all() else opacity
    tones = brightness[opaque]
    if values is opacity and 0 in tones and 255 in tones and np.isin(tones, (0, 255)).mean() > 0.9:
        raise WysError(
            f'The mask "{path}" has white, black and transparent pixels: make it opaque, or fill what is inside with one '
            "color."
        )
    if 0 < values.max() <= 127:
        kind = "is a 0/1 mask" if values.max() == 1 else f"has no value above {values.max()} of 255, as class ids have"
        raise WysError(f'The mask "{path}" {kind}: what is inside must be 255; multiply a 0/1 mask by 255.')
    return torch.from_numpy(values > 127)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Replace folders by the image files in them, sorted by name.

    Args:
        paths: Image files and folders.

    Raises:
        WysError: If a path is missing or a folder contains no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)
            if not images:
                raise WysError(f'There is no image in the folder "{path}": supported are PNG, JPEG and WebP files.')
            files += images
        elif path.is_file():
            files.append(path)
        else:
            raise WysError(f'There is no image "{path}".')
    return files


def plan_outputs(paths: Sequence[Path], images: Sequence[Path], output: Path) -> list[Path]:
    """Return the output files: `output` itself for a single file, else files in the folder `output`.

    Args:
        paths: Files and folders that the user gave.
        images: The image files in them.
        output: A .png file or a folder.

    Returns:
        One file per image.

    Raises:
        WysError: If `output` does not fit the input, a file would be written twice, or an input would be overwritten.
    """
    single = len(paths) == 1 and paths[0].is_file()
    if single and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise WysError(
                f'Edited images are written as lossless PNG files: give -o "{output.stem}.png" instead of "{output.name}".'
            )
        outputs = [output]
    else:
        if output.is_file() or (output.suffix and not output.is_dir()):
            raise WysError(f'Several images are written to a folder: give -o a folder instead of the file "{output}".')
        outputs = [output / f"{path.stem}.png" for path in images]
    inputs = {path.resolve() for path in images}
    sources: dict[Path, Path] = {}
    for image, file in zip(images, outputs):
        for target in (file, *(extra_file(file, extra) for extra in EXTRAS)):
            if target.resolve() in inputs:
                raise WysError(f'"{target}" would overwrite an input image: give -o another path.')
            if target in sources:
                raise WysError(
                    f'"{sources[target]}" and "{image}" would both be written to "{target}": rename one of them.'
                )
            sources[target] = image
    return outputs


def extra_file(output: Path, extra: str) -> Path:
    """Return the path of one of the EXTRAS of an edited image."""
    return output.with_name(f"{output.stem}_{extra}.png")
