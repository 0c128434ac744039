"""Metrics of an edited scene on its training views: per view, and against ground truth where available."""

import math
from collections.abc import Sequence
from typing import Optional

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import ClipEncoder, load_clip
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import Lpips
from wys_nerfstudio.evaluation.niqe import NiqeParams, niqe
from wys_nerfstudio.utils.errors import WysError

Metrics = dict[str, list[float]]
"""Values per metric: one per view or per pair of neighboring views; NaN where a metric is undefined."""


def evaluate_edit(
    captured: Float[Tensor, "n h w 3"],
    edited: Float[Tensor, "n h w 3"],
    names: Sequence[str],
    perceptual: Optional[Lpips] = None,
    niqe_params: Optional[NiqeParams] = None,
    ground_truth: Optional[GroundTruth] = None,
    captions: Optional[tuple[str, str]] = None,
    clip_model: Optional[str] = None,
) -> Metrics:
    """Compute every available metric of an edited scene on its training views.

    Args:
        captured: Captured views in [0, 1], in capture order.
        edited: Renders of the edited scene at the same cameras.
        names: File names of the views.
        perceptual: Required for `edit_lpips`.
        niqe_params: Required for `edit_niqe`.
        ground_truth: Required for the metrics of `ground_truth_metrics`.
        captions: Descriptions of the scene before and after the edit; by default those of `ground_truth`.
        clip_model: Name of the CLIP model for `clip_metrics`. If it cannot be loaded, a message is printed and the CLIP
            metrics are omitted.

    Returns:
        One list of values per metric.
    """
    results = edit_metrics(captured, edited, perceptual)
    if niqe_params is not None:
        results["edit_niqe"] = [niqe(view, niqe_params) for view in edited]
    if ground_truth is not None:
        results |= ground_truth_metrics(ground_truth, names, edited)
        captions = captions or ground_truth.captions
    if clip_model is not None:
        try:
            results |= clip_metrics(load_clip(clip_model), captured, edited, captions)
        except WysError as error:
            CONSOLE.print(f"CLIP metrics are omitted. {error}", markup=False)
    return results


def edit_metrics(
    captured: Float[Tensor, "n h w 3"], edited: Float[Tensor, "n h w 3"], perceptual: Optional[Lpips] = None
) -> Metrics:
    """Compute the distances between edited and captured views.

    Args:
        captured: Captured views in [0, 1].
        edited: Renders of the edited scene at the same cameras.
        perceptual: Required for `edit_lpips`.

    Returns:
        `edit_psnr` in dB (the paper's Edit PSNR, in floating point), `edit_ssim`, `edit_lpips`.
    """
    pairs = list(zip(edited, captured))
    results: Metrics = {
        "edit_psnr": [metrics.psnr(after, before) for after, before in pairs],
        "edit_ssim": [metrics.ssim(after, before) for after, before in pairs],
    }
    if perceptual is not None:
        channels_first = [(after.permute(2, 0, 1)[None], before.permute(2, 0, 1)[None]) for after, before in pairs]
        results["edit_lpips"] = [float(perceptual(after, before)) for after, before in channels_first]
    return results


def clip_metrics(
    clip: ClipEncoder,
    captured: Float[Tensor, "n h w 3"],
    edited: Float[Tensor, "n h w 3"],
    captions: Optional[tuple[str, str]],
) -> Metrics:
    """Compute the CLIP metrics of an edit.

    Args:
        clip: The CLIP model.
        captured: Captured views in [0, 1], in capture order.
        edited: Renders of the edited scene at the same cameras.
        captions: Descriptions of the scene before and after the edit; required for the text metrics.

    Returns:
        `clip_image_similarity`, `clip_text_image_similarity`, `clip_direction_similarity` per view,
        `clip_direction_consistency`, `clip_frame_consistency` per pair of neighboring views.

    Raises:
        WysError: If a caption exceeds the token limit of the CLIP model.
    """
    before, after = (torch.cat([clip.embed_images(view[None]) for view in views]) for views in (captured, edited))
    results: dict[str, Tensor] = {"clip_image_similarity": metrics.image_similarity(before, after)}
    if captions is not None:
        texts = clip.embed_texts(captions)
        results["clip_text_image_similarity"] = metrics.text_image_similarity(after, texts[1])
        results["clip_direction_similarity"] = metrics.direction_similarity(before, after, texts[0], texts[1])
    results["clip_direction_consistency"] = metrics.direction_consistency(before, after)
    results["clip_frame_consistency"] = metrics.frame_consistency(after)
    return {name: values.tolist() for name, values in results.items()}


def ground_truth_metrics(ground_truth: GroundTruth, names: Sequence[str], edited: Float[Tensor, "n h w 3"]) -> Metrics:
    """Compute the distances between edited views and ground truth.

    Args:
        ground_truth: Ground truth of the edit.
        names: File names of the views.
        edited: Renders of the edited scene.

    Returns:
        `truth_psnr_inside` and `truth_psnr_outside` the ground-truth mask, in dB; NaN where that region of a view is empty.
    """
    results: Metrics = {"truth_psnr_inside": [], "truth_psnr_outside": []}
    for name, view in zip(names, edited):
        target, mask = ground_truth.edited(name), ground_truth.mask(name)
        results["truth_psnr_inside"].append(metrics.psnr(view, target, mask))
        results["truth_psnr_outside"].append(metrics.psnr(view, target, ~mask))
    return results


def means(results: Metrics) -> dict[str, float]:
    """Return the mean of each metric over its defined values; metrics without any are omitted."""
    defined = {name: [value for value in values if not math.isnan(value)] for name, values in results.items()}
    return {name: sum(values) / len(values) for name, values in defined.items() if values}


def per_view(results: Metrics, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Group the values by view; those of a pair are listed under the first view."""
    return {
        name: {metric: values[i] for metric, values in results.items() if i < len(values)}
        for i, name in enumerate(names)
    }
