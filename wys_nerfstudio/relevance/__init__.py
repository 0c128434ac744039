"""Relevance maps of single views, their fusion in space, and edit masks.

The functions of `maps` are re-exported here; they depend on torch only.
"""

from wys_nerfstudio.relevance.maps import (
    OUTLIER_FACTOR,
    clamp_outliers,
    composite,
    dilate,
    expectile_loss,
    latent_mask,
    min_max,
    noise_difference,
    normalize,
    resize,
    sample,
    threshold,
    upsample,
)

__all__ = [
    "OUTLIER_FACTOR",
    "upsample",
    "clamp_outliers",
    "composite",
    "expectile_loss",
    "dilate",
    "latent_mask",
    "min_max",
    "noise_difference",
    "normalize",
    "resize",
    "sample",
    "threshold",
]
