"""Gradient descent along the signed relevance (supplement E, eq. 13), in torch alone.

Eq. 13 is the relevance map without its absolute value: the direction in which an image becomes likelier under the
instruction. With z = E(O) noised to z_t = signal z + noise eps,

    grad_O = signal / noise  E_eps[ eps(z_t, t, I, T) - eps(z_t, t, I, "") ]  dE(O)/dO                   (eq. 13)

The authors report that this optimization is less efficient and gives worse images than the local edit, without details.
Here noise levels fall from high to low, each step draws one noise (the expectation is taken over the steps), and the step
size is constant: steps must stay proportional to the relevance, which an optimizer that normalizes them, such as Adam,
would undo.
"""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wys_nerfstudio.editing.editor import NoiseLevel
from wys_nerfstudio.editing.sampling import ProgressCallback, add_noise, no_progress

SignedRelevance = Callable[[Tensor, NoiseLevel], Tensor]
"""eps(z_t, t, I, T) - eps(z_t, t, I, "") of noisy latents (b, c, h, w) and their level."""


def sds_gradient(
    output: Float[Tensor, "..."],
    encode: Callable[[Tensor], Tensor],
    signed_relevance: SignedRelevance,
    noise: Float[Tensor, "b c h w"],
    level: NoiseLevel,
) -> Float[Tensor, "..."]:
    """Gradient of eq. 13 for one noise; only the encoder is differentiated.

    Args:
        output: O, the image in the form in which it is optimized.
        encode: E, from O to clean latents (b, c, h, w).
        signed_relevance: Difference that the instruction makes to the predicted noise.
        noise: Standard normal.
        level: Noise level.

    Returns:
        A gradient of the output's shape, for descent.
    """
    with torch.enable_grad():
        variable = output.detach().requires_grad_()
        latents = encode(variable)
    difference = signed_relevance(add_noise(latents.detach(), noise, level), level)
    weight = level.signal / level.noise
    return torch.autograd.grad(latents, variable, grad_outputs=weight * difference)[0]


def sds_optimize(
    start: Float[Tensor, "b c h w"],
    mask: Optional[Bool[Tensor, "b h w"]],
    noise: Float[Tensor, "steps b c h w"],
    levels: Sequence[NoiseLevel],
    signed_relevance: SignedRelevance,
    step_size: float,
    report: ProgressCallback = no_progress,
) -> Float[Tensor, "b c h w"]:
    """Descend from clean latents along eq. 13. The latents themselves are optimized, so E is the identity.

    Args:
        start: Clean latents of the input, O_0 = I.
        mask: Where they may change; None is everywhere (eq. 13 unchanged).
        noise: Standard normal, one per step.
        levels: Noise levels, one per step; none may be clean.
        signed_relevance: As in `sds_gradient`.
        step_size: Factor of the gradient.
        report: Called after each step.

    Returns:
        Clean optimized latents.
    """
    latents = start
    for i, level in enumerate(levels):
        gradient = sds_gradient(latents, lambda x: x, signed_relevance, noise[i], level)
        if mask is not None:
            gradient = gradient * mask[:, None]
        latents = latents - step_size * gradient
        report(i + 1, len(levels))
    return latents
