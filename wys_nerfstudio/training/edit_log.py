"""What a run leaves in its `wys` folder while it edits: a line and a mask per edit, pictures of some views."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils import writer
from torch import Tensor

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.utils.visualization import apply_colormap, write_png

TITLES = ("captured", "relevance map", "relevance field", "mask", "edited view", "render")
"""Of the pictures of a view, from left to right; TensorBoard, which is shown every edit, does without the render."""


@dataclass
class EditRecord:
    """One edit, as `edits.jsonl` tells it."""

    edit: int
    """Its number, from 0 on."""
    step: int
    """The step that it came before."""
    view: str
    """Name of the view."""
    t: int
    """Timestep that the render was noised to."""
    steps: int
    """Diffusion steps from there."""
    mask: Bool[Tensor, "h w"]
    """Where the view was edited; if nowhere, the edit was skipped."""
    seconds: float
    """How long it took."""

    def line(self) -> str:
        """The edit as a line of JSON."""
        share = float(self.mask.float().mean())
        record = {"edit": self.edit, "step": self.step, "view": self.view, "t": self.t}
        record |= {"steps": self.steps if share else 0}
        record |= {"mask_fraction": round(share, 5), "seconds": round(self.seconds, 4)}
        return f"{json.dumps(record)}\n"


@main_process_only
def record_edit(folder: Path, edit: EditRecord) -> None:
    """Appends an edit to `edits.jsonl` in a run's `wys` folder, and puts its mask into `masks`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "edits.jsonl").open("a", encoding="utf8") as file:
        file.write(edit.line())
    write_png(folder / "masks" / f"{edit.view}.png", edit.mask.float())


def picture_row(
    data: WysDataManager, view: int, field: Float[Tensor, "h w"], mask: Bool[Tensor, "h w"]
) -> list[Float[Tensor, "h w 3"]]:
    """The pictures of a view that `TITLES` names, all but the render.

    Args:
        data: The training views.
        view: Which view.
        field: The field's relevance, seen from there.
        mask: Where it may be edited.
    """
    view_map = data.relevance_of(view) if data.relevance_state is not None else torch.zeros(data.view_size)
    return [
        data.captured_views([view])[0],
        apply_colormap(view_map),
        apply_colormap(field),
        mask.float()[..., None].expand(-1, -1, 3),
        data.current_views([view])[0],
    ]


def show_edit(step: int, row: Sequence[Float[Tensor, "h w 3"]]) -> None:
    """Sends an edit's pictures to TensorBoard and its kin."""
    strip = torch.cat([picture.to("cpu") for picture in row], dim=1)
    writer.put_image(name=f"Edit ({' | '.join(TITLES[:-1])})", image=strip, step=step)
