"""What an edit did to the views of a scene: the paper's measures, per view, and against the truth where there is one.

Puts `metrics`, `niqe`, `clip`, `perceptual` and `truth` together; the measures themselves are there.
"""

import math
from collections.abc import Sequence
from typing import Optional

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import ClipEncoder, load_clip
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import MIN_LPIPS_PATCH, Lpips, lpips_is_cached
from wys_nerfstudio.evaluation.niqe import NiqeParams, niqe
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.options import WysOptions
from wys_nerfstudio.utils.errors import WysError

Metrics = dict[str, list[float]]
"""Per measure one number per view, or per pair of neighbouring views; NaN where a measure says nothing."""


@torch.no_grad()
def evaluate_edit(options: WysOptions, model: WysModel, data: WysDataManager) -> Metrics:
    """What became of the training views, with every measure that can be had.

    Args:
        options: The run's; captions and CLIP are taken from them.
        model: The edited scene, in eval mode.
        data: The captured views.

    Returns:
        The measures of `edit_metrics`, `edit_niqe` if its parameters are given, those of `ground_truth_metrics` where the scene
        brings its truth, and of `clip_metrics` where there is a CLIP.
    """
    everything = range(data.num_views)
    captured = data.captured_views(everything).cpu()
    cameras = data.train_dataset.cameras
    edited = torch.stack([model.render_view(cameras, view)["rgb"].clamp(0, 1).cpu() for view in everything])
    perceptual = None
    if lpips_is_cached(options.model.lpips_weights) and min(data.view_size) >= MIN_LPIPS_PATCH:
        perceptual = model.perceptual_distance().cpu()
    figures = edit_metrics(captured, edited, perceptual)
    if options.niqe_params is not None:
        natural = NiqeParams.read(options.niqe_params)
        figures["edit_niqe"] = [niqe(view, natural) for view in edited]
    truth = GroundTruth.find(data.get_datapath(), options.instruction)
    captions = (options.caption_before, options.caption_after) if options.caption_after else None
    if truth is not None:
        names = [path.name for path in data.train_dataset.image_filenames]
        figures |= ground_truth_metrics(truth, names, edited)
        captions = captions or truth.captions
    if options.clip_model is not None:
        try:
            figures |= clip_metrics(load_clip(options.clip_model), captured, edited, captions)
        except WysError as error:
            CONSOLE.print(f"CLIP's measures are left out. {error}", markup=False)
    return figures


def edit_metrics(
    captured: Float[Tensor, "n h w 3"], edited: Float[Tensor, "n h w 3"], perceptual: Optional[Lpips] = None
) -> Metrics:
    """How far the edited views are from the captured ones.

    Args:
        captured: Views as captured, in [0, 1].
        edited: The same views of the edited scene.
        perceptual: For `edit_lpips`, which is left out without it.

    Returns:
        `edit_psnr` in dB (the paper's Edit PSNR, in floating point), `edit_ssim`, `edit_lpips`.
    """
    pairs = list(zip(edited, captured))
    figures: Metrics = {
        "edit_psnr": [metrics.psnr(after, before) for after, before in pairs],
        "edit_ssim": [metrics.ssim(after, before) for after, before in pairs],
    }
    if perceptual is not None:
        channels_first = [(after.permute(2, 0, 1)[None], before.permute(2, 0, 1)[None]) for after, before in pairs]
        figures["edit_lpips"] = [float(perceptual(after, before)) for after, before in channels_first]
    return figures


def clip_metrics(
    clip: ClipEncoder,
    captured: Float[Tensor, "n h w 3"],
    edited: Float[Tensor, "n h w 3"],
    captions: Optional[tuple[str, str]],
) -> Metrics:
    """What CLIP says of the edit.

    Args:
        clip: The judge.
        captured: Views as captured, in [0, 1], in the order in which a camera would pass them.
        edited: The same views of the edited scene.
        captions: What the scene shows before and after; without them the measures that need text are left out.

    Returns:
        `clip_image_similarity`, `clip_text_image_similarity`, `clip_direction_similarity` per view,
        `clip_direction_consistency`, `clip_frame_consistency` per pair of neighbours.

    Raises:
        WysError: If a caption is longer than CLIP reads.
    """
    before, after = (torch.cat([clip.embed_images(view[None]) for view in views]) for views in (captured, edited))
    figures: dict[str, Tensor] = {"clip_image_similarity": metrics.image_similarity(before, after)}
    if captions is not None:
        texts = clip.embed_texts(captions)
        figures["clip_text_image_similarity"] = metrics.text_image_similarity(after, texts[1])
        figures["clip_direction_similarity"] = metrics.direction_similarity(before, after, texts[0], texts[1])
    figures["clip_direction_consistency"] = metrics.direction_consistency(before, after)
    figures["clip_frame_consistency"] = metrics.frame_consistency(after)
    return {name: values.tolist() for name, values in figures.items()}


def ground_truth_metrics(truth: GroundTruth, names: Sequence[str], edited: Float[Tensor, "n h w 3"]) -> Metrics:
    """How far the edited views are from what they should be.

    Args:
        truth: The edit's ground truth.
        names: File names of the views.
        edited: The views of the edited scene.

    Returns:
        `truth_psnr_inside` and `truth_psnr_outside` the true mask, in dB; NaN where that part of a view is empty.
    """
    figures: Metrics = {"truth_psnr_inside": [], "truth_psnr_outside": []}
    for name, view in zip(names, edited):
        wanted, mask = truth.edited(name), truth.mask(name)
        figures["truth_psnr_inside"].append(metrics.psnr(view, wanted, mask))
        figures["truth_psnr_outside"].append(metrics.psnr(view, wanted, ~mask))
    return figures


def means(figures: Metrics) -> dict[str, float]:
    """Mean of each measure over the views of which it says something; measures that say nothing are left out."""
    said = {name: [value for value in values if not math.isnan(value)] for name, values in figures.items()}
    return {name: sum(values) / len(values) for name, values in said.items() if values}


def per_view(figures: Metrics, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The same numbers by view; those of neighbours are under the first view's name."""
    return {
        name: {measure: values[i] for measure, values in figures.items() if i < len(values)}
        for i, name in enumerate(names)
    }
