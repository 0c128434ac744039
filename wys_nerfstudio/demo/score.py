"""How well a run on a toy scene did, against the scene's ground truth, which training never reads.

Needs a scene written by `scene.py` (or one of the same layout) and a finished run; draws nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from rich.table import Table
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.metrics import average_precision, intersection_over_union, psnr
from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, model_state, read_checkpoint


def load_captured_scene(pipeline: WysPipeline, run: Path) -> None:
    """Puts the weights from before the first edit back into a loaded pipeline."""
    pipeline.model.load_state_dict(model_state(read_checkpoint(run / "wys" / CAPTURED_SCENE)), strict=True)


@torch.no_grad()
def render_views(pipeline: WysPipeline, cameras: Cameras) -> list[dict[str, Tensor]]:
    """Renders cameras as any user of the finished scene would: eval mode, average appearance."""
    pipeline.eval()
    outputs = []
    for i in range(len(cameras)):
        render = pipeline.model.get_outputs_for_camera(cameras[i : i + 1].to(pipeline.device))
        outputs.append({key: render[key].cpu() for key in ("rgb", "relevance_value")})
    return outputs


@dataclass
class Score:
    """Figures of a run, means over views; PSNR in dB."""

    outside_before: float
    """Unedited reconstruction against the edited truth, outside the true mask."""
    outside_after: float
    """Edited scene against the edited truth, outside the true mask."""
    inside_before: float
    """Unedited reconstruction against the edited truth, inside the true mask."""
    inside_after: float
    """Edited scene against the edited truth, inside the true mask."""
    inside_original: float
    """Edited scene against the captured view, inside the true mask."""
    field_precision: float
    """Average precision of the rendered relevance."""
    field_iou: float
    """Intersection over union of the edit mask with the true mask."""

    def table(self) -> Table:
        """The figures as a table for the terminal."""
        table = Table(title="Against the ground truth", title_justify="left")
        for column, side in (("", "left"), ("before", "right"), ("after", "right")):
            table.add_column(column, justify=side)  # type: ignore
        rows = [
            ("PSNR outside the true mask (untouched?)", self.outside_before, self.outside_after, " dB"),
            ("PSNR inside, to the edited truth (done?)", self.inside_before, self.inside_after, " dB"),
            ("PSNR inside, to the captured view", None, self.inside_original, " dB"),
            ("average precision of the relevance field", None, self.field_precision, ""),
            ("IoU of the edit mask", None, self.field_iou, ""),
        ]
        for name, before, after, unit in rows:
            digits = 1 if unit else 2
            table.add_row(name, "" if before is None else f"{before:.{digits}f}{unit}", f"{after:.{digits}f}{unit}")
        return table


def score(
    truth: GroundTruth,
    captured: list[Float[Tensor, "h w 3"]],
    names: list[str],
    before: list[dict[str, Tensor]],
    after: list[dict[str, Tensor]],
    mask_threshold: float,
) -> Score:
    """Compares renders from before and after the edit with the truth.

    Args:
        truth: The edit's ground truth.
        captured: The views as captured.
        names: Their file names.
        before: Renders of the unedited reconstruction, as of `render_views`.
        after: Renders of the edited scene.
        mask_threshold: tau of the edit.
    """
    rows: list[list[float]] = []
    for name, view, first, last in zip(names, captured, before, after):
        wanted, mask = truth.edited(name), truth.mask(name)
        if not mask.any() or mask.all():
            continue
        # Localization is judged on the captured geometry: that is what the masks of the first edits were cut from.
        located = first["relevance_value"][..., 0]
        rows.append(
            [
                psnr(first["rgb"], wanted, ~mask),
                psnr(last["rgb"], wanted, ~mask),
                psnr(first["rgb"], wanted, mask),
                psnr(last["rgb"], wanted, mask),
                psnr(last["rgb"], view, mask),
                average_precision(located, mask),
                intersection_over_union(relevance.threshold(located, mask_threshold), mask),
            ]
        )
    return Score(*torch.tensor(rows).mean(dim=0).tolist())
