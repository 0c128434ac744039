"""Metrics of edits and localization, computed from images in [0, 1], relevance maps and CLIP embeddings.

LPIPS is in `lpips`, NIQE in `niqe`; `clip` computes the embeddings. Similarities are cosines in [-1, 1]; the cosine with a zero
vector, such as the change of an unchanged view, is 0. torchmetrics is slow to import and therefore imported on first use.
"""

from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def psnr(
    image: Float[Tensor, "*b h w 3"], reference: Float[Tensor, "*b h w 3"], mask: Optional[Tensor] = None
) -> float:
    """Compute the peak signal-to-noise ratio, -10 log10 of the mean squared error, in float64.

    Args:
        image: Images in [0, 1].
        reference: Reference images.
        mask: Bool ``(*b, h, w)``: pixels to include; by default all.

    Returns:
        Decibels; infinity for equal images, NaN for an empty mask.
    """
    squared = (image.double() - reference.double()) ** 2
    if mask is not None:
        squared = squared[mask]
    return float(-10.0 * torch.log10(squared.mean()))


def ssim(image: Float[Tensor, "h w 3"], reference: Float[Tensor, "h w 3"]) -> float:
    """Compute the structural similarity (Wang et al., 2004) with a Gaussian window of 11 pixels; 1 for equal images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = image.permute(2, 0, 1)[None], reference.permute(2, 0, 1)[None]
    return float(structural_similarity_index_measure(first, second, data_range=1.0))  # type: ignore


def text_image_similarity(images: Float[Tensor, "b d"], text: Float[Tensor, " d"]) -> Float[Tensor, " b"]:
    """Return cos(E(image), E(caption after)) per image: agreement with the target caption (the paper's Txt-Img Sim).

    Args:
        images: Embeddings of the edited images.
        text: Embedding of the caption of the edited scene.
    """
    return F.cosine_similarity(images, text.expand_as(images), dim=-1)


def image_similarity(before: Float[Tensor, "b d"], after: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return cos(E(after), E(before)) per image: preservation of the scene (the paper's Image Sim)."""
    return F.cosine_similarity(after, before, dim=-1)


def direction_similarity(
    before: Float[Tensor, "b d"],
    after: Float[Tensor, "b d"],
    text_before: Float[Tensor, " d"],
    text_after: Float[Tensor, " d"],
) -> Float[Tensor, " b"]:
    """Return cos(E(after) - E(before), E(caption after) - E(caption before)) per image.

    CLIP text-image direction similarity, as in InstructPix2Pix and in Fig. 6 and 12 of the paper.
    """
    return F.cosine_similarity(after - before, (text_after - text_before).expand_as(after), dim=-1)


def direction_consistency(before: Float[Tensor, "b d"], after: Float[Tensor, "b d"]) -> Float[Tensor, " b-1"]:
    """Return cos(E(after_k) - E(before_k), E(after_k+1) - E(before_k+1)) of neighboring views.

    Consistency metric of Instruct-NeRF2NeRF. Views must be ordered along a camera path.
    """
    change = after - before
    return F.cosine_similarity(change[:-1], change[1:], dim=-1)


def frame_consistency(after: Float[Tensor, "b d"]) -> Float[Tensor, " b-1"]:
    """Return cos(E(after_k), E(after_k+1)) of neighboring edited views."""
    return F.cosine_similarity(after[:-1], after[1:], dim=-1)


def intersection_over_union(mask: Bool[Tensor, "*b h w"], target: Bool[Tensor, "*b h w"]) -> float:
    """Compute the intersection over union of two masks; 1 if both are empty."""
    union = (mask | target).sum()
    return float((mask & target).sum() / union) if union else 1.0


def average_precision(relevance: Float[Tensor, "*b h w"], target: Bool[Tensor, "*b h w"]) -> float:
    """Compute the average precision of relevance as a score for changed pixels; NaN for an empty target.

    A perfect map scores 1, a constant or random map the share of changed pixels.
    """
    from torchmetrics.functional.classification import binary_average_precision

    if not target.any():
        return float("nan")
    return float(binary_average_precision(relevance.flatten(), target.flatten().long()))


def roc_auc(relevance: Float[Tensor, "*b h w"], target: Bool[Tensor, "*b h w"]) -> float:
    """Compute the area under the ROC curve of relevance as a score for changed pixels; NaN if all or none changed.

    It is the probability that a changed pixel has a higher relevance than an unchanged pixel; 0.5 for a random map.
    """
    from torchmetrics.functional.classification import binary_auroc

    if target.all() or not target.any():
        return float("nan")
    return float(binary_auroc(relevance.flatten(), target.flatten().long()))
