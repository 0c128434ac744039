"""Training data: images of toy scenes after every edit, rendered once and stored on disk."""

from pathlib import Path

import numpy as np
import torch

from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.world import sample_cameras, sample_scenes

SIZES = ((80, 64, 0.72), (64, 80, 0.14), (64, 64, 0.08), (96, 72, 0.06))
"""Width, height and share of the training scenes, per image size."""
_CHUNK = 16


def render_array(file: Path, seeds: range, width: int, height: int, *, compiled: bool = True) -> None:
    """Render all edits of all scenes into a .npy file of shape "scenes edits h w 3", unless it exists.

    Args:
        file: Output file.
        seeds: Seeds of the scenes; a multiple of 16.
        width: Image width in pixels.
        height: Image height in pixels.
        compiled: Whether to compile the ray tracer (four times faster after half a minute).
    """
    if file.exists():
        return
    render = torch.compile(render_edits, dynamic=False) if compiled else render_edits
    part = file.with_suffix(".part")
    array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(seeds), len(EDITS), height, width, 3))
    with torch.inference_mode():
        for first in range(0, len(seeds), _CHUNK):
            chunk = seeds[first : first + _CHUNK]
            scene = sample_scenes(chunk)
            array[first : first + _CHUNK] = render(scene, sample_cameras(scene, chunk, width, height)).numpy()
    array.flush()
    part.rename(file)


def render_data_set(folder: Path, seeds: range, *, compiled: bool = True) -> list[Path]:
    """Render all edits of all scenes into one array per image size.

    Args:
        folder: Output folder; existing arrays are not rendered again.
        seeds: Seeds of the scenes.
        compiled: As in `render_array`.

    Returns:
        One .npy file per image size, of shape "scenes edits h w 3".
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, start = [], seeds.start
    for width, height, share in SIZES:
        count = max(round(share * len(seeds)) // _CHUNK, 1) * _CHUNK
        files.append(folder / f"{width}x{height}.npy")
        render_array(files[-1], range(start, start + count), width, height, compiled=compiled)
        start += count
    return files
