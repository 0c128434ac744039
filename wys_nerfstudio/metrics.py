"""Measures of an edit and of its localisation, on images in [0, 1] and float relevance maps.

Only what compares pictures with pictures lives here; rendering and file handling do not.
"""

from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision


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


def intersection_over_union(mask: Bool[Tensor, "*b h w"], truth: Bool[Tensor, "*b h w"]) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def average_precision(relevance: Float[Tensor, "*b h w"], truth: Bool[Tensor, "*b h w"]) -> float:
    """Area under precision over recall of "this pixel changes", pixels ranked by relevance; NaN without a true pixel.

    A constant or random map scores the share of true pixels, a perfect one 1.
    """
    return float(binary_average_precision(relevance.flatten(), truth.flatten().long())) if truth.any() else float("nan")


def roc_auc(relevance: Float[Tensor, "*b h w"], truth: Bool[Tensor, "*b h w"]) -> float:
    """Chance that a changed pixel has more relevance than an unchanged one; 0.5 is chance, NaN if one kind is missing."""
    if truth.all() or not truth.any():
        return float("nan")
    return float(binary_auroc(relevance.flatten(), truth.flatten().long()))
