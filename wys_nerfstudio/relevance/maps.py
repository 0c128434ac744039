"""From two noise predictions to a mask: the mathematics of the relevance map, in torch alone.

A relevance map says how much the editor's noise prediction changes when it hears the instruction (supplement, eq. 13).
Shapes: a stack of views is ``(b, h, w)``, latents are ``(b, c, h, w)``, images are ``(b, h, w, 3)`` in [0, 1].
Nothing here knows a network, a scene or a file; making the predictions is the business of `editing`.
"""

import math
from typing import Literal, Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

OUTLIER_FACTOR = 1.5
"""Values above Q3 + 1.5 (Q3 - Q1) are outliers (Tukey's fence, the paper's choice)."""


def noise_difference(
    noise_with_instruction: Float[Tensor, "b c h w"], noise_without: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    """Absolute difference of two noise predictions, averaged over the latent channels (eq. 13 without its sign).

    Args:
        noise_with_instruction: eps(z_t, I, T).
        noise_without: eps(z_t, I, ""), the same latents and image under the empty instruction.

    Returns:
        Raw relevance, at least 0, not yet normalised.
    """
    return (noise_with_instruction.float() - noise_without.float()).abs().mean(dim=1)


def clamp_outliers(raw: Float[Tensor, "*batch n"], factor: float = OUTLIER_FACTOR) -> Float[Tensor, "*batch n"]:
    """Clamps what lies above Q3 + factor IQR of the last dimension; small values stay (the fence is one-sided).

    Args:
        raw: Values of any scale. The quartiles are taken over the last dimension.
    """
    ordered = raw.sort(dim=-1).values
    q1, q3 = (_quantile(ordered, q) for q in (0.25, 0.75))
    return torch.minimum(raw, q3 + factor * (q3 - q1))


def _quantile(ordered: Float[Tensor, "*batch n"], q: float) -> Float[Tensor, "*batch 1"]:
    # torch.quantile refuses more than 16 M values, which a scene of many large views exceeds.
    position = q * (ordered.shape[-1] - 1)
    below, above = math.floor(position), math.ceil(position)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], position - below)


def min_max(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Stretches the last dimension to [0, 1]; where all values are the same there is nothing to see: zeros, never NaN."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    spread = high - low
    # Differences at the level of rounding are no relevance; stretching them would invent a mask.
    flat = spread <= 1e-6 * high.abs().clamp_min(1e-6)
    return torch.where(
        flat, torch.zeros_like(values), (values - low) / torch.where(flat, torch.ones_like(spread), spread)
    )


def normalize(
    raw: Float[Tensor, "b h w"],
    over: Literal["view", "scene"] = "view",
    outlier_factor: Optional[float] = OUTLIER_FACTOR,
) -> Float[Tensor, "b h w"]:
    """Outlier clamp, then min-max to [0, 1].

    Args:
        raw: Raw relevance of all views.
        over: "view" treats each view by itself (the paper). "scene" uses one fence and one range for all views, so that
            a view which does not show the object gets an empty map instead of amplified noise.
        outlier_factor: Width of the outlier fence in interquartile ranges; None clamps nothing.

    Returns:
        Relevance in [0, 1]; zeros where the raw map is flat.
    """
    flat = raw.flatten(1) if over == "view" else raw.reshape(1, -1)
    clamped = flat if outlier_factor is None else clamp_outliers(flat, outlier_factor)
    return min_max(clamped).reshape(raw.shape)


def resize(relevance: Float[Tensor, "b h w"], height: int, width: int) -> Float[Tensor, "b height width"]:
    """Bilinear resize of maps, for instance from the latents' size to the image's."""
    return F.interpolate(relevance[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def upsample(
    raw: Float[Tensor, "b h w"],
    height: int,
    width: int,
    over: Literal["view", "scene"] = "view",
    outlier_factor: float = OUTLIER_FACTOR,
) -> Float[Tensor, "b height width"]:
    """Relevance in [0, 1] at the images' size, from raw maps at the latents' size; arguments as in `normalize`."""
    # Interpolation rounds, by which it may leave the range.
    return resize(normalize(raw, over, outlier_factor), height, width).clamp(0, 1)


def expectile_loss(
    rendered: Float[Tensor, "*batch"], maps: Float[Tensor, "*batch"], agreement: float
) -> Float[Tensor, ""]:
    """Mean squared error whose two sides weigh differently (expectiles; Newey and Powell, 1987).

    A point is seen by many views, and their maps are blurred: around an object each calls other surroundings relevant.
    Where a share p of the views says 1 and the others 0, the least loss is at p (1 - a) / (p (1 - a) + (1 - p) a), with a
    the `agreement`: one half where p = a.

    Args:
        rendered: Relevance of rays in [0, 1].
        maps: What the views' maps say of them, in [0, 1].
        agreement: Weight of what is rendered too high, against 1 - agreement for what is too low, in (0, 1); 0.5 gives
            the squared error.
    """
    weights = torch.where(rendered > maps, agreement, 1 - agreement)
    return 2 * (weights * (rendered - maps) ** 2).mean()


def threshold(relevance: Float[Tensor, "*batch h w"], tau: float) -> Bool[Tensor, "*batch h w"]:
    """The edit mask R >= tau. With tau = 0 it is every pixel, hence plain InstructPix2Pix (supplement A)."""
    return relevance >= tau


def dilate(mask: Bool[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """A mask and all eight neighbours of each of its pixels."""
    return F.max_pool2d(mask[:, None].float(), kernel_size=3, stride=1, padding=1)[:, 0] > 0.5


def latent_mask(mask: Bool[Tensor, "b height width"], h: int, w: int) -> Bool[Tensor, "b h w"]:
    """A pixel mask at the latents' size: a latent is edited if any of its pixels is.

    Erring to this side lets the decoder see edited latents on both sides of the mask's border; the pixels outside are
    put back afterwards by `composite`.
    """
    return F.adaptive_max_pool2d(mask[:, None].float(), (h, w))[:, 0] > 0.5


def composite(
    edited: Float[Tensor, "b h w 3"], reference: Float[Tensor, "b h w 3"], mask: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b h w 3"]:
    """The edit inside the mask; outside it the reference, bit for bit."""
    return torch.where(mask[..., None], edited, reference)
