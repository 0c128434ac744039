"""Metrics of an edited scene on its training views: per view, and against ground truth where available."""

import math
from collections.abc import Iterable, Sequence
from typing import Optional

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import ClipEncoder, load_clip
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import Lpips
from wys_nerfstudio.evaluation.niqe import NiqeParams, niqe
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.progress import track

Metrics = dict[str, list[float]]
"""Values per metric: one per view or per pair of neighboring views; NaN where a metric is undefined."""


def evaluate_edit(
    views: Iterable[tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 3"]]],
    names: Sequence[str],
    perceptual: Optional[Lpips] = None,
    niqe_params: Optional[NiqeParams] = None,
    ground_truth: Optional[GroundTruth] = None,
    captions: Optional[tuple[str, str]] = None,
    clip_model: Optional[str] = None,
    masks: Optional[Bool[Tensor, "n h w"]] = None,
) -> Metrics:
    """Compute every available metric of an edited scene on its training views, one view after the other.

    Args:
        views: Each view as captured, in capture order, and the render of the edited scene at its camera; both in [0, 1].
        names: File names of the views.
        perceptual: Required for `edit_lpips`.
        niqe_params: Required for `edit_niqe`.
        ground_truth: Required for the metrics of `ground_truth_metrics`.
        captions: Descriptions of the scene before and after the edit; by default those of `ground_truth`.
        clip_model: Name of the CLIP model for `clip_metrics`. If it cannot be loaded, a message is printed and the CLIP
            metrics are omitted.
        masks: Required for `edit_psnr_outside`: the pixels of each view that may change; in main memory.

    Returns:
        One list of values per metric.
    """
    clip = _load_clip(clip_model)
    by_view: list[dict[str, float]] = []
    embeddings: list[tuple[Tensor, Tensor]] = []
    bar = track(zip(names, views), description="Metrics of the edited views", total=len(names))
    for i, (name, (captured, edited)) in enumerate(bar):
        values = edit_metrics(captured, edited, perceptual)
        if masks is not None:
            values["edit_psnr_outside"] = metrics.psnr(edited, captured, ~masks[i].to(edited.device))
        if niqe_params is not None:
            values["edit_niqe"] = niqe(edited.cpu(), niqe_params)
        if ground_truth is not None:
            values |= ground_truth_metrics(ground_truth, name, edited)
        by_view.append(values)
        if clip is not None:
            embeddings.append((clip.embed_images(captured[None]), clip.embed_images(edited[None])))
    results: Metrics = {name: [values[name] for values in by_view] for name in by_view[0]}
    if clip is not None:
        captions = captions or (ground_truth.captions if ground_truth is not None else None)
        before, after = (torch.cat(parts) for parts in zip(*embeddings))
        results |= clip_metrics(clip, before, after, captions)
    return results


def _load_clip(name: Optional[str]) -> Optional[ClipEncoder]:
    if name is None:
        return None
    try:
        return load_clip(name)
    except WysError as error:
        CONSOLE.print(f"CLIP metrics are omitted. {error}", markup=False)
        return None


def edit_metrics(
    captured: Float[Tensor, "h w 3"], edited: Float[Tensor, "h w 3"], perceptual: Optional[Lpips] = None
) -> dict[str, float]:
    """Compute the distances between an edited and the captured view.

    Args:
        captured: The captured view in [0, 1].
        edited: Render of the edited scene at the same camera.
        perceptual: Required for `edit_lpips`; on the device of the views.

    Returns:
        `edit_psnr` in dB (the paper's Edit PSNR, in floating point), `edit_ssim`, `edit_lpips`.
    """
    results = {"edit_psnr": metrics.psnr(edited, captured), "edit_ssim": metrics.ssim(edited, captured)}
    if perceptual is not None:
        results["edit_lpips"] = float(perceptual(*(view.permute(2, 0, 1)[None] for view in (edited, captured))))
    return results


def clip_metrics(
    clip: ClipEncoder,
    before: Float[Tensor, "n d"],
    after: Float[Tensor, "n d"],
    captions: Optional[tuple[str, str]],
) -> Metrics:
    """Compute the CLIP metrics of an edit.

    Args:
        clip: The CLIP model.
        before: Embeddings of the captured views, in capture order.
        after: Embeddings of the renders of the edited scene at the same cameras.
        captions: Descriptions of the scene before and after the edit; required for the text metrics.

    Returns:
        `clip_image_similarity`, `clip_text_image_similarity`, `clip_direction_similarity` per view,
        `clip_direction_consistency`, `clip_frame_consistency` per pair of neighboring views.

    Raises:
        WysError: If a caption exceeds the token limit of the CLIP model.
    """
    results: dict[str, Tensor] = {"clip_image_similarity": metrics.image_similarity(before, after)}
    if captions is not None:
        texts = clip.embed_texts(captions)
        results["clip_text_image_similarity"] = metrics.text_image_similarity(after, texts[1])
        results["clip_direction_similarity"] = metrics.direction_similarity(before, after, texts[0], texts[1])
    results["clip_direction_consistency"] = metrics.direction_consistency(before, after)
    results["clip_frame_consistency"] = metrics.frame_consistency(after)
    return {name: values.tolist() for name, values in results.items()}


def ground_truth_metrics(ground_truth: GroundTruth, name: str, edited: Float[Tensor, "h w 3"]) -> dict[str, float]:
    """Compute the distances between an edited view and its ground truth.

    Args:
        ground_truth: Ground truth of the edit.
        name: File name of the view.
        edited: Render of the edited scene.

    Returns:
        `truth_psnr_inside` and `truth_psnr_outside` the ground-truth mask, in dB; NaN where that region is empty.

    Raises:
        WysError: If the ground truth of that view is missing, damaged or of another size.
    """
    target, mask, edited = ground_truth.edited(name), ground_truth.mask(name), edited.cpu()
    for height, width in (target.shape[:2], mask.shape):
        if (height, width) != edited.shape[:2]:
            raise WysError(
                f"The ground truth of {name} has another size than the view: {width}x{height} instead of "
                f"{edited.shape[1]}x{edited.shape[0]}."
            )
    return {
        "truth_psnr_inside": metrics.psnr(edited, target, mask),
        "truth_psnr_outside": metrics.psnr(edited, target, ~mask),
    }


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
