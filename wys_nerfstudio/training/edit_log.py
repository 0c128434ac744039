"""What a run records of its edits in its `wys` folder: a line and a mask per edit, and images for TensorBoard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from nerfstudio.configs import base_config  # noqa: F401  # imported before the writer, which it imports in a circle
from nerfstudio.utils import writer
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.training.scene import EditInput, TrainingViews
from wys_nerfstudio.utils.visualization import apply_colormap, limited_size, reduce, write_png

EDITS_FILE = "edits.jsonl"
TITLES = ("captured", "relevance map", "relevance field", "mask", "edited view", "render")
"""Columns of the contact sheet. TensorBoard, which receives every edit, shows all but the render."""
STRIP_SIDE = 256
"""Longer side in pixels of the images for TensorBoard, whose file holds those of every edit."""


@dataclass
class EditRecord:
    """One line of `edits.jsonl`."""

    edit: int
    """Number of the edit, counted from 0."""
    step: int
    """Training step before which the edit was committed."""
    view: str
    """Name of the view."""
    time: "int | float"
    """The editor's time of the level that the render was noised to: the timestep of Stable Diffusion."""
    steps: int
    """Diffusion steps from there."""
    mask: Bool[Tensor, "h w"]
    """Pixels that were edited; if there are none, the edit was skipped."""
    seconds: float
    """Duration."""

    def line(self) -> str:
        """Return the record as a line of JSON."""
        fraction = float(self.mask.float().mean())
        record = {
            "edit": self.edit,
            "step": self.step,
            "view": self.view,
            "time": self.time,
            "steps": self.steps if fraction else 0,
            "mask_fraction": round(fraction, 5),
            "seconds": round(self.seconds, 4),
        }
        return f"{json.dumps(record)}\n"


@main_process_only
def record_edit(folder: Path, edit: EditRecord) -> None:
    """Append an edit to `edits.jsonl` in a run's `wys` folder and write its mask to `masks`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EDITS_FILE).open("a", encoding="utf8") as file:
        file.write(edit.line())
    write_png(folder / "masks" / f"{edit.view}.png", edit.mask.float(), f"mask of edit {edit.edit}, view {edit.view}")


def read_edit_lines(folder: Path) -> list[bytes]:
    """Return the complete lines of `edits.jsonl` in a run's `wys` folder; the last one may be cut off in a killed run."""
    path = folder / EDITS_FILE
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def image_row(
    views: TrainingViews, view: int, field: Float[Tensor, "fh fw"], mask: Bool[Tensor, "mh mw"], longer_side: int
) -> list[Float[Tensor, "h w 3"]]:
    """Return the images of a view in the order of `TITLES`, all but the render, reduced to one size and in main memory.

    Args:
        views: The training views.
        view: Index of the view.
        field: The field's relevance, rendered from that view; at most `longer_side` pixels, or of the view's size.
        mask: Pixels that may change; of the field's or of the view's size.
        longer_side: Largest longer side of the images, in pixels.
    """
    maps = views.relevance_maps
    view_map = torch.zeros(1, 1, 1) if maps is None else maps[view][None].float()
    row = [
        views.captured_views([view])[0],
        apply_colormap(relevance.resize(view_map, *limited_size(*views.view_size, longer_side))[0]),
        apply_colormap(field),
        mask.float()[..., None].expand(-1, -1, 3),
        views.current_views([view])[0],
    ]
    return [reduce(image, longer_side).cpu() for image in row]


def show_edit(step: int, views: TrainingViews, inputs: Sequence[EditInput]) -> None:
    """Send the images of a batch's first edit to nerfstudio's writers, such as TensorBoard. Only the main process has writers.

    Args:
        step: The step that is about to be trained.
        views: The training views.
        inputs: Renders and masks of this process's edits.
    """
    if not writer.EVENT_WRITERS:
        return
    row = image_row(views, inputs[0].view, inputs[0].relevance, inputs[0].mask, STRIP_SIDE)
    strip = torch.cat(row, dim=1)
    writer.put_image(name=f"Edit ({' | '.join(TITLES[:-1])})", image=strip, step=step)
