"""Evaluation of a finished run on a toy scene against the scene's ground truth."""

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
    """Restore the weights from before the first edit in a loaded pipeline."""
    pipeline.model.load_state_dict(model_state(read_checkpoint(run / "wys" / CAPTURED_SCENE)), strict=True)


@torch.no_grad()
def render_views(pipeline: WysPipeline, cameras: Cameras) -> list[dict[str, Tensor]]:
    """Render `rgb` of cameras in eval mode, with the mean appearance embedding, and `relevance_value` unless only colors are
    rendered."""
    pipeline.eval()
    outputs = []
    for i in range(len(cameras)):
        render = pipeline.model.get_outputs_for_camera(cameras[i : i + 1].to(pipeline.device))
        outputs.append({key: render[key].cpu() for key in ("rgb", "relevance_value") if key in render})
    return outputs


@dataclass
class Score:
    """Metrics of a run, means over views; PSNR in dB, inside and outside the ground-truth mask."""

    outside_before: float
    """PSNR of the unedited reconstruction and the edited ground truth, outside the mask."""
    outside_after: float
    """PSNR of the edited scene and the edited ground truth, outside the mask."""
    inside_before: float
    """PSNR of the unedited reconstruction and the edited ground truth, inside the mask."""
    inside_after: float
    """PSNR of the edited scene and the edited ground truth, inside the mask."""
    inside_original: float
    """PSNR of the edited scene and the captured view, inside the mask."""
    field_precision: float
    """Average precision of the rendered relevance."""
    field_iou: float
    """Intersection over union of the edit mask and the ground-truth mask."""

    def table(self) -> Table:
        """Return the metrics as a table for the terminal."""
        table = Table(title="Comparison with the ground truth", title_justify="left")
        for column, side in (("", "left"), ("before", "right"), ("after", "right")):
            table.add_column(column, justify=side)  # type: ignore
        rows = [
            ("PSNR outside the mask (preservation)", self.outside_before, self.outside_after, " dB"),
            ("PSNR inside the mask (edit)", self.inside_before, self.inside_after, " dB"),
            ("PSNR inside the mask, to the captured view", None, self.inside_original, " dB"),
            ("average precision of the relevance field", None, self.field_precision, ""),
            ("IoU of the edit mask", None, self.field_iou, ""),
        ]
        for name, before, after, unit in rows:
            digits = 1 if unit else 2
            table.add_row(name, "" if before is None else f"{before:.{digits}f}{unit}", f"{after:.{digits}f}{unit}")
        return table


def score(
    ground_truth: GroundTruth,
    captured: list[Float[Tensor, "h w 3"]],
    names: list[str],
    before: list[dict[str, Tensor]],
    after: list[dict[str, Tensor]],
    mask_threshold: float,
) -> Score:
    """Compare renders from before and after the edit with the ground truth.

    Args:
        ground_truth: Ground truth of the edit.
        captured: Captured views in [0, 1].
        names: File names of the views.
        before: Renders of the unedited reconstruction, from `render_views`.
        after: Renders of the edited scene, from `render_views`.
        mask_threshold: tau of the edit.
    """
    rows: list[list[float]] = []
    for name, view, unedited, edited in zip(names, captured, before, after):
        target, mask = ground_truth.edited(name), ground_truth.mask(name)
        if not mask.any() or mask.all():
            continue
        # Localization is evaluated on the captured geometry, from which the masks of the first edits are rendered.
        rendered_relevance = unedited["relevance_value"][..., 0]
        rows.append(
            [
                psnr(unedited["rgb"], target, ~mask),
                psnr(edited["rgb"], target, ~mask),
                psnr(unedited["rgb"], target, mask),
                psnr(edited["rgb"], target, mask),
                psnr(edited["rgb"], view, mask),
                average_precision(rendered_relevance, mask),
                intersection_over_union(relevance.threshold(rendered_relevance, mask_threshold), mask),
            ]
        )
    return Score(*torch.tensor(rows).mean(dim=0).tolist())
