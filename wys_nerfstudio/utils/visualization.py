"""Pictures for people: PNG files, heat maps, the contact sheet. Nothing is computed from them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps as matplotlib_colormaps
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wys_nerfstudio.utils.atomic_io import atomic_write


def to_uint8(image: Tensor) -> np.ndarray:
    """[0, 1] floats to 8 bit, rounded; the inverse of dividing by 255."""
    return (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def write_png(path: Path, image: Tensor) -> None:
    """Writes an image (h, w), (h, w, 1) or (h, w, 3) in [0, 1] as an 8-bit PNG, whole or not at all."""
    save_png(path, Image.fromarray(to_uint8(image.squeeze(-1) if image.shape[-1] == 1 else image)))


def save_png(
    path: Path,
    image: Image.Image,
    icc_profile: Optional[bytes] = None,
    texts: Optional[Mapping[str, str]] = None,
) -> None:
    """Saves a picture as PNG, whole or not at all.

    Args:
        path: The file.
        image: The picture.
        icc_profile: What its colors mean.
        texts: What the file says about itself, as PNG's texts of any language (iTXt) by keyword.
    """
    chunks = PngInfo()
    for keyword, text in (texts or {}).items():
        chunks.add_itxt(keyword, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", icc_profile=icc_profile, pnginfo=chunks)
    atomic_write(path, buffer.getbuffer())


def read_png(path: Path) -> Float[Tensor, "h w 3"]:
    """Reads an 8-bit image as RGB in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def apply_colormap(relevance: Float[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """Relevance in [0, 1] as colors on a fixed scale, dark to bright."""
    colors = matplotlib_colormaps["inferno"](relevance.detach().clamp(0, 1).cpu().numpy())[..., :3]
    return torch.from_numpy(colors).float()


def contact_sheet(
    titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Tensor]]], min_height: int = 160
) -> Image.Image:
    """Lays pictures out in rows under column titles.

    Args:
        titles: One per column.
        rows: A name and the row's pictures, each (h, w, 3) in [0, 1], all of one size.
        min_height: Smaller pictures are enlarged by whole factors until they are at least this high.
    """
    height, width = rows[0][1][0].shape[:2]
    factor = -(-min_height // height)
    cell_height, cell_width, gap, header = height * factor, width * factor, 4, 18
    sheet = Image.new(
        "RGB",
        (gap + (cell_width + gap) * len(titles), header + (cell_height + header + gap) * len(rows)),
        (255, 255, 255),
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell_width + gap), 3), title, fill=(0, 0, 0), font=font)
    for i, (name, pictures) in enumerate(rows):
        top = header + i * (cell_height + header + gap)
        for column, picture in enumerate(pictures):
            cell = Image.fromarray(to_uint8(picture)).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(cell, (gap + column * (cell_width + gap), top))
        draw.text((gap, top + cell_height + 2), name, fill=(90, 90, 90), font=font)
    return sheet


def evenly_spaced(count: int, total: int) -> list[int]:
    """Up to `count` indices, evenly spread over `range(total)`."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
