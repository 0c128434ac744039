"""The relevance map as a gradient: descent along eq. 13 of the supplement, in torch alone.

Section E derives what an image's relevance map is without its absolute value: the direction in which the image would have
to move to become likelier under the instruction. With z = E(O) noised to z_t = alpha z + sigma eps,

    grad_O = alpha / sigma  E_eps[ eps(z_t, t, I, T) - eps(z_t, t, I, "") ]  dE(O)/dO                      (eq. 13)

The authors found such an optimisation less efficient and its images worse than the local edit's, and give no details of
theirs. Here noise levels fall from high to low, each step sees one new noise (the expectation is taken over the steps),
and the step size is constant, because the size of a step is to be in proportion to the relevance: an optimiser that
normalises its steps, such as Adam, would move everything alike.
"""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wys_nerfstudio.editing.sampling import NoisePredictor, ProgressCallback, add_noise, no_progress


def sds_gradient(
    output: Float[Tensor, "..."],
    encode: Callable[[Tensor], Tensor],
    signed_relevance: NoisePredictor,
    noise: Float[Tensor, "b c h w"],
    t: int,
    alpha: Float[Tensor, ""],
) -> Float[Tensor, "..."]:
    """The gradient of eq. 13 for one noise; nothing is differentiated but the encoder.

    Args:
        output: O, the image in whatever form it is optimised.
        encode: E, from O to clean latents (b, c, h, w) at the noise predictor's scale.
        signed_relevance: eps(z_t, t, I, T) - eps(z_t, t, I, "") of noisy latents.
        noise: Standard normal.
        t: Timestep.
        alpha: Cumulative product of the noise schedule at `t`: the square of eq. 13's alpha, and 1 minus that of its sigma.

    Returns:
        A tensor of the output's shape, to be descended along.
    """
    with torch.enable_grad():
        variable = output.detach().requires_grad_()
        latents = encode(variable)
    difference = signed_relevance(add_noise(latents.detach(), noise, alpha), t)
    weight = (alpha / (1 - alpha)).sqrt()
    return torch.autograd.grad(latents, variable, grad_outputs=weight * difference)[0]


def sds_optimize(
    start: Float[Tensor, "b c h w"],
    mask: Optional[Bool[Tensor, "b h w"]],
    noise: Float[Tensor, "steps b c h w"],
    timesteps: Sequence[int],
    alphas_cumprod: Float[Tensor, " train_timesteps"],
    signed_relevance: NoisePredictor,
    step_size: float,
    report: ProgressCallback = no_progress,
) -> Float[Tensor, "b c h w"]:
    """Descends from clean latents along eq. 13. The latents themselves are optimised, so E is the identity.

    Args:
        start: Clean latents of the input, O_0 = I.
        mask: Where they may change; None is everywhere, which is eq. 13 as it stands.
        noise: Standard normal, one for each step.
        timesteps: Noise levels, one for each step.
        alphas: Cumulative products of the noise schedule, indexed by timestep.
        signed_relevance: As in `sds_gradient`.
        step_size: What the gradient is multiplied by.
        report: Called after each step.

    Returns:
        Clean optimised latents.
    """
    latents = start
    for i, t in enumerate(timesteps):
        gradient = sds_gradient(latents, lambda x: x, signed_relevance, noise[i], t, alphas_cumprod[t])
        if mask is not None:
            gradient = gradient * mask[:, None]
        latents = latents - step_size * gradient
        report(i + 1, len(timesteps))
    return latents
