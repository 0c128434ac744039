"""The toy world as training data: every scene's picture before and after every edit, rendered once and kept on disk.

Here: rendering and reading that folder. Not here: the networks and their training (`train_editor.py`).
"""

from pathlib import Path

import numpy as np
import torch

from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.world import sample_cameras, sample_scenes

SIZES = ((80, 64, 0.72), (64, 80, 0.14), (64, 64, 0.08), (96, 72, 0.06))
"""Width, height and share of the training scenes."""
_CHUNK = 16


def render_array(file: Path, seeds: range, width: int, height: int, *, compiled: bool = True) -> None:
    """Renders all edits of all seeds into one .npy file of shape "scenes edits h w 3", unless it is there already.

    Args:
        file: where the array goes.
        seeds: the scenes, a multiple of 16.
        width: picture width in pixels.
        height: picture height in pixels.
        compiled: whether to compile the ray tracer (four times faster, half a minute to start).
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
    """Renders all edits of all seeds into one array per picture size, once.

    Args:
        folder: where the arrays go; those that are there already are kept.
        seeds: the scenes.
        compiled: as in `render_array`.

    Returns:
        One .npy file per picture size, of shape "scenes edits h w 3".
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, start = [], seeds.start
    for width, height, share in SIZES:
        count = max(round(share * len(seeds)) // _CHUNK, 1) * _CHUNK
        files.append(folder / f"{width}x{height}.npy")
        render_array(files[-1], range(start, start + count), width, height, compiled=compiled)
        start += count
    return files
