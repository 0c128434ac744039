"""Relevance maps and masks from noise predictions; pure functions that depend on torch only.

A relevance map is the absolute difference of the editor's noise predictions with and without the instruction (supplement,
eq. 13). Shapes: maps are ``(b, h, w)``, latents ``(b, c, h, w)``, images ``(b, h, w, 3)`` in [0, 1]. `editing` computes the
predictions.
"""

import math
from typing import Literal, Optional

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

OUTLIER_FACTOR = 1.5
"""Values above Q3 + 1.5 (Q3 - Q1) are outliers (Tukey's fence, as in the paper)."""


def noise_difference(
    noise_with_instruction: Float[Tensor, "b c h w"], noise_without: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    """Return the absolute difference of two noise predictions, averaged over the latent channels (eq. 13, unsigned).

    Args:
        noise_with_instruction: eps(z_t, I, T).
        noise_without: eps(z_t, I, ""), for the same latents and image.

    Returns:
        Raw relevance, at least 0, not normalized.
    """
    return (noise_with_instruction.float() - noise_without.float()).abs().mean(dim=1)


def clamp_outliers(raw: Float[Tensor, "*batch n"], factor: float = OUTLIER_FACTOR) -> Float[Tensor, "*batch n"]:
    """Clamp values above Q3 + factor IQR; the fence is one-sided, so that small values are unchanged.

    Args:
        raw: Values of any scale; quartiles are computed over the last dimension.
        factor: Width of the fence in interquartile ranges.
    """
    ordered = raw.sort(dim=-1).values
    q1, q3 = (_quantile(ordered, q) for q in (0.25, 0.75))
    return torch.minimum(raw, q3 + factor * (q3 - q1))


def _quantile(ordered: Float[Tensor, "*batch n"], q: float) -> Float[Tensor, "*batch 1"]:
    # torch.quantile is limited to 16 M values, which a scene of many large views exceeds.
    position = q * (ordered.shape[-1] - 1)
    below, above = math.floor(position), math.ceil(position)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], position - below)


def min_max(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Normalize the last dimension to [0, 1] by its minimum and maximum; constant values become zeros, not NaN."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    extent = high - low
    # Rounding errors are not relevance: scaling them up would produce an arbitrary mask.
    flat = extent <= 1e-6 * high.abs().clamp_min(1e-6)
    return torch.where(
        flat, torch.zeros_like(values), (values - low) / torch.where(flat, torch.ones_like(extent), extent)
    )


def normalize(
    raw: Float[Tensor, "b h w"],
    over: Literal["view", "scene"] = "view",
    outlier_factor: Optional[float] = OUTLIER_FACTOR,
) -> Float[Tensor, "b h w"]:
    """Clamp outliers, then normalize to [0, 1].

    Args:
        raw: Raw relevance of all views.
        over: "view" normalizes each view by itself (the paper); "scene" uses one fence and one range for all views, so that
            a view without the object gets an empty map instead of amplified noise.
        outlier_factor: Width of the outlier fence in interquartile ranges; None for no clamp.

    Returns:
        Relevance in [0, 1]; zeros where the raw map is flat.
    """
    flat = raw.flatten(1) if over == "view" else raw.reshape(1, -1)
    clamped = flat if outlier_factor is None else clamp_outliers(flat, outlier_factor)
    return min_max(clamped).reshape(raw.shape)


def resize(relevance: Float[Tensor, "b h w"], height: int, width: int) -> Float[Tensor, "b height width"]:
    """Resize maps bilinearly, for example from latent to image resolution."""
    return F.interpolate(relevance[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def sample(
    relevance: Float[Tensor, "b h w"], indices: Int[Tensor, "n 3"], height: int, width: int
) -> Float[Tensor, " n"]:
    """Return single pixels of resized maps, as `resize` computes them, without resizing the maps.

    Args:
        relevance: Maps of any size.
        indices: Map, row and column of each pixel at the size `height` x `width`.
        height: Height in pixels.
        width: Width in pixels.
    """
    view, row, column = indices.unbind(-1)
    (top, bottom, down), (left, right, across) = (
        _neighbors(pixel, size, wanted)
        for pixel, size, wanted in ((row, relevance.shape[1], height), (column, relevance.shape[2], width))
    )
    upper, lower = (torch.lerp(relevance[view, y, left], relevance[view, y, right], across) for y in (top, bottom))
    return torch.lerp(upper, lower, down)


def _neighbors(
    pixel: Int[Tensor, " n"], size: int, wanted: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the two entries of an axis of `size` that a pixel of the axis of `wanted` pixels lies between, and where."""
    position = ((pixel + 0.5) * (size / wanted) - 0.5).clamp(0, size - 1)
    before = position.floor().long()
    return before, (before + 1).clamp(max=size - 1), position - before


def upsample(
    raw: Float[Tensor, "b h w"],
    height: int,
    width: int,
    over: Literal["view", "scene"] = "view",
    outlier_factor: float = OUTLIER_FACTOR,
) -> Float[Tensor, "b height width"]:
    """Normalize raw maps at latent resolution and upsample them to image resolution; arguments as in `normalize`."""
    # Rounding in the interpolation can leave the range.
    return resize(normalize(raw, over, outlier_factor), height, width).clamp(0, 1)


def expectile_loss(
    rendered: Float[Tensor, "*batch"], maps: Float[Tensor, "*batch"], expectile: float
) -> Float[Tensor, ""]:
    """Expectile loss between rendered relevance and relevance maps (Newey and Powell, 1987).

    A point is visible in many views, whose blurred maps disagree around an object. Where a share p of the maps is 1 and the
    rest 0, the minimum of the loss is p (1 - a) / (p (1 - a) + (1 - p) a) with a the `expectile`: one half for p = a.

    Args:
        rendered: Rendered relevance of rays in [0, 1].
        maps: Relevance of the same pixels in the views' maps, in [0, 1].
        expectile: Weight of rays that are rendered too high, in (0, 1), against 1 - expectile for those that are too low;
            0.5 is the squared error.
    """
    weights = torch.where(rendered > maps, expectile, 1 - expectile)
    return 2 * (weights * (rendered - maps) ** 2).mean()


def threshold(relevance: Float[Tensor, "*batch h w"], tau: float) -> Bool[Tensor, "*batch h w"]:
    """Return the edit mask R >= tau; tau = 0 selects every pixel, which is plain InstructPix2Pix (supplement A)."""
    return relevance >= tau


def dilate(mask: Bool[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Dilate a mask by the eight neighbors of each pixel."""
    return F.max_pool2d(mask[:, None].float(), kernel_size=3, stride=1, padding=1)[:, 0] > 0.5


def latent_mask(mask: Bool[Tensor, "b height width"], h: int, w: int) -> Bool[Tensor, "b h w"]:
    """Reduce a pixel mask to latent resolution: a latent is edited if any of its pixels is.

    The decoder then receives edited latents on both sides of the mask's border; `composite` restores the pixels outside.
    """
    return F.adaptive_max_pool2d(mask[:, None].float(), (h, w))[:, 0] > 0.5


def composite(
    edited: Shaped[Tensor, "b h w c"], reference: Shaped[Tensor, "b h w c"], mask: Bool[Tensor, "b h w"]
) -> Shaped[Tensor, "b h w c"]:
    """Return the edit inside the mask and the unchanged reference outside, bit for bit."""
    return torch.where(mask[..., None], edited, reference)
