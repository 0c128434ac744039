"""Measures of an edit and of its localization, on images in [0, 1], float relevance maps and CLIP's embeddings.

Only what compares pictures, maps and embeddings lives here; rendering, networks and file handling do not. LPIPS is in
`perceptual`, the embeddings come from `clip`. Similarities are cosines, in [-1, 1]; a direction of no length, such as that
of a view which did not change, has the cosine 0 with everything. torchmetrics imports half of the world and is loaded when it
is needed. The paper's NIQE is in `niqe`.
"""

from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def psnr(
    image: Float[Tensor, "*b h w 3"], reference: Float[Tensor, "*b h w 3"], mask: Optional[Tensor] = None
) -> float:
    """Peak signal-to-noise ratio, -10 log10 of the mean squared difference, in floating point.

    Args:
        image: Picture(s) in [0, 1].
        reference: What it is compared with.
        mask: Bool ``(*b, h, w)``; only pixels that are True count. All of them by default.

    Returns:
        Decibels; infinity for equal pictures, NaN if the mask is empty.
    """
    squared = (image.double() - reference.double()) ** 2
    if mask is not None:
        squared = squared[mask]
    return float(-10.0 * torch.log10(squared.mean()))


def ssim(image: Float[Tensor, "h w 3"], reference: Float[Tensor, "h w 3"]) -> float:
    """Structural similarity of Wang et al. (2004), Gaussian window of 11 pixels; 1 for equal pictures in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (picture.permute(2, 0, 1)[None] for picture in (image, reference))
    return float(structural_similarity_index_measure(first, second, data_range=1.0))  # type: ignore


def text_image_similarity(images: Float[Tensor, "b d"], text: Float[Tensor, " d"]) -> Float[Tensor, " b"]:
    """cos(E(image), E(caption after)) per picture: does it show what was asked for? (The paper's Txt-Img Sim.)

    Args:
        images: Embeddings of the edited pictures.
        text: Embedding of the caption of the edited scene.
    """
    return F.cosine_similarity(images, text.expand_as(images), dim=-1)


def image_similarity(before: Float[Tensor, "b d"], after: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """cos(E(after), E(before)) per picture: is it still the same scene? (The paper's Image Sim.)"""
    return F.cosine_similarity(after, before, dim=-1)


def direction_similarity(
    before: Float[Tensor, "b d"],
    after: Float[Tensor, "b d"],
    text_before: Float[Tensor, " d"],
    text_after: Float[Tensor, " d"],
) -> Float[Tensor, " b"]:
    """cos(E(after) - E(before), E(caption after) - E(caption before)) per picture: did it change as the captions did?

    CLIP text-image direction similarity, as InstructPix2Pix and the paper's Fig. 6 and 12 use it.
    """
    return F.cosine_similarity(after - before, (text_after - text_before).expand_as(after), dim=-1)


def direction_consistency(before: Float[Tensor, "b d"], after: Float[Tensor, "b d"]) -> Float[Tensor, " b-1"]:
    """cos(E(after_k) - E(before_k), E(after_k+1) - E(before_k+1)): do neighboring views change alike?

    Instruct-NeRF2NeRF's measure of consistency. Views in the order in which a camera would pass them.
    """
    change = after - before
    return F.cosine_similarity(change[:-1], change[1:], dim=-1)


def frame_consistency(after: Float[Tensor, "b d"]) -> Float[Tensor, " b-1"]:
    """cos(E(after_k), E(after_k+1)): do neighboring edited views show the same?"""
    return F.cosine_similarity(after[:-1], after[1:], dim=-1)


def intersection_over_union(mask: Bool[Tensor, "*b h w"], truth: Bool[Tensor, "*b h w"]) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def average_precision(relevance: Float[Tensor, "*b h w"], truth: Bool[Tensor, "*b h w"]) -> float:
    """Area under precision over recall of "this pixel changes", pixels ranked by relevance; NaN without a true pixel.

    A constant or random map scores the share of true pixels, a perfect one 1.
    """
    from torchmetrics.functional.classification import binary_average_precision

    return float(binary_average_precision(relevance.flatten(), truth.flatten().long())) if truth.any() else float("nan")


def roc_auc(relevance: Float[Tensor, "*b h w"], truth: Bool[Tensor, "*b h w"]) -> float:
    """Chance that a changed pixel has more relevance than an unchanged one; 0.5 is chance, NaN if one kind is missing."""
    from torchmetrics.functional.classification import binary_auroc

    if truth.all() or not truth.any():
        return float("nan")
    return float(binary_auroc(relevance.flatten(), truth.flatten().long()))
