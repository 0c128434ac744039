"""PNG files, color maps and contact sheets."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps as matplotlib_colormaps
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio import __version__
from wys_nerfstudio.utils.atomic_io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOFTWARE = f"wys-nerfstudio {__version__}"
"""Value of the text chunk Software of every PNG."""
FONT = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
"""Font of contact sheets, which comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic and more, but no Chinese, Japanese
or Korean. matplotlib's own search for fonts would delay every command."""
SHEET_VIEWS = 6
"""Number of views in the contact sheet of a run."""
SHEET_SIDE = 384
"""Largest longer side in pixels of an image in the contact sheet of a run, which has six columns."""


@dataclass(frozen=True)
class PngMetadata:
    """Metadata of an image that a PNG can store."""

    icc_profile: Optional[bytes] = None
    """Color profile."""
    dpi: Optional[tuple[float, float]] = None
    """Horizontal and vertical pixels per inch."""
    chunks: Mapping[bytes, bytes] = field(default_factory=dict)
    """Chunks gAMA, cHRM and sRGB by name."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Text chunks (iTXt) by keyword."""


def to_uint8(image: Tensor) -> np.ndarray:
    """Convert floats in [0, 1] to rounded 8-bit values, the inverse of dividing by 255; keep 8-bit values."""
    if image.dtype == torch.uint8:
        return image.cpu().numpy()
    return image.detach().clamp(0, 1).mul_(255).round_().to(torch.uint8).cpu().numpy()


def to_float(image: Tensor) -> Tensor:
    """Convert 8-bit values to floats in [0, 1]; keep floats."""
    return image if image.is_floating_point() else image.float().div_(255)


def write_png(path: Path, image: Tensor, description: str = "") -> None:
    """Write an image (h, w), (h, w, 1) or (h, w, 3) in [0, 1] atomically as an 8-bit PNG.

    Args:
        path: The file.
        image: The image.
        description: What it shows, as in `save_png`.
    """
    save_png(path, Image.fromarray(to_uint8(image.squeeze(-1) if image.shape[-1] == 1 else image)), description)


def save_png(path: Path, image: Image.Image, description: str = "", metadata: Optional[PngMetadata] = None) -> None:
    """Write an image atomically as PNG, with this package as its Software.

    Args:
        path: The file.
        image: The image.
        description: What it shows, as its Description.
        metadata: Further metadata.
    """
    metadata = metadata or PngMetadata()
    described = {"Description": description} if description else {}
    info = PngInfo()
    for keyword, text in {**metadata.texts, **described, "Software": SOFTWARE}.items():
        info.add_itxt(keyword, text)
    for name, content in metadata.chunks.items():
        info.add(name, content)
    options = {} if metadata.dpi is None else {"dpi": metadata.dpi}
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", icc_profile=metadata.icc_profile, pnginfo=info, **options)
    atomic_write(path, buffer.getbuffer())


def save_figure(path: Path, figure: "Figure", description: str) -> None:
    """Write a chart atomically as PNG; `description` as in `save_png`."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    with Image.open(buffer) as image:
        save_png(path, image, description)


def read_png(path: Path) -> Float[Tensor, "h w 3"]:
    """Read an 8-bit image as RGB in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def apply_colormap(relevance: Float[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """Map relevance in [0, 1] to colors of a fixed scale, dark to bright."""
    colors = matplotlib_colormaps["inferno"](relevance.detach().clamp(0, 1).cpu().numpy())[..., :3]
    return torch.from_numpy(colors).float()


def limited_size(height: int, width: int, longer_side: int) -> tuple[int, int]:
    """Return height and width of an image that is reduced, if necessary, to at most `longer_side` pixels."""
    scale = min(1.0, longer_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def reduce(image: Float[Tensor, "h w c"], longer_side: int) -> Float[Tensor, "some_height some_width c"]:
    """Reduce an image to `limited_size` by averaging areas; a smaller image is returned as it is."""
    height, width = image.shape[:2]
    size = limited_size(height, width, longer_side)
    if size == (height, width):
        return image
    return F.interpolate(image.permute(2, 0, 1)[None], size=size, mode="area")[0].permute(1, 2, 0)


def overlay(image: Float[Tensor, "h w 3"], mask: Float[Tensor, "h w 1"]) -> Float[Tensor, "h w 3"]:
    """Tint an image inside a mask and dim it outside, as `relevance_overlay` does.

    Args:
        image: RGB values in [0, 1].
        mask: 1 inside, 0 outside, and values between them at the border of a reduced mask.
    """
    tint = torch.tensor(matplotlib_colormaps["inferno"](1.0)[:3], dtype=image.dtype)
    return torch.lerp(0.4 * image, 0.5 * image + 0.5 * tint, mask)


def printable(text: str) -> str:
    """Return text in which unprintable characters and those that `FONT` lacks are escaped as in Python's string literals."""
    known = FT2Font(FONT).get_charmap()
    shown = (
        char if char.isprintable() and ord(char) in known else char.encode("unicode_escape").decode() for char in text
    )
    return "".join(shown)


def contact_sheet(
    titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Tensor]]], min_height: int = 160
) -> Image.Image:
    """Arrange images in rows under column titles.

    Args:
        titles: One title per column.
        rows: Name and images of each row; images (h, w, 3) in [0, 1], all of one size.
        min_height: Images are enlarged by the smallest whole factor that makes them at least this high, in pixels.
    """
    height, width = rows[0][1][0].shape[:2]
    factor = -(-min_height // height)
    cell_height, cell_width, gap, header = height * factor, width * factor, 4, 18
    sheet = Image.new(
        "RGB",
        (gap + (cell_width + gap) * len(titles), header + (cell_height + header + gap) * len(rows)),
        (255, 255, 255),
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, size=11)
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell_width + gap), 2), printable(title), fill=(0, 0, 0), font=font)
    for i, (name, images) in enumerate(rows):
        top = header + i * (cell_height + header + gap)
        for column, image in enumerate(images):
            cell = Image.fromarray(to_uint8(image)).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(cell, (gap + column * (cell_width + gap), top))
        draw.text((gap, top + cell_height + 2), printable(name), fill=(90, 90, 90), font=font)
    return sheet


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return up to `count` evenly spaced indices of `range(total)`."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
