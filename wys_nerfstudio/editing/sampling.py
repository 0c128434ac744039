"""Masked DDIM denoising: pure torch, for any function that predicts noise.

The timesteps are given as a list and the noise schedule as a tensor, so no scheduler object is ever changed.
"""

import random
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NoisePredictor = Callable[[Tensor, int], Tensor]
"""From noisy latents (b, c, h, w) and their timestep to the predicted noise, of the latents' shape."""

ProgressCallback = Callable[[int, int], None]
"""Is told how many steps are done, and of how many."""


def no_progress(done: int, total: int) -> None:
    """The report that nobody reads."""


def edit_seed(seed: int, edit_number: int) -> int:
    """Seed of one edit. Depends on nothing but the run's seed and the edit's number, so a resumed run edits alike."""
    return random.Random(f"{seed}/{edit_number}").getrandbits(62)


def timesteps(start: int, full_steps: int, num_train_timesteps: int) -> list[int]:
    """Timesteps of a denoising run that starts at `start`, largest first, evenly spaced down to (but without) 0.

    The number of steps is in proportion to the noise: `full_steps` for a start at the end of the diffusion's length,
    half of them for a start half way, always at least one.

    Args:
        start: First timestep, in [1, num_train_timesteps).
        full_steps: Steps that a start from pure noise would take, at least 1.
        num_train_timesteps: Length of the diffusion, 1000 as a rule.

    Returns:
        Strictly decreasing timesteps; the first is `start`, all are at least 1.

    Raises:
        ValueError: If `start` or `full_steps` is out of range.
    """
    if not 1 <= start < num_train_timesteps:
        raise ValueError(f"the first timestep must be in [1, {num_train_timesteps - 1}], not {start}")
    if full_steps < 1:
        raise ValueError(f"the number of diffusion steps must be at least 1, not {full_steps}")
    count = min(start, max(1, round(full_steps * start / num_train_timesteps)))
    return [start - (i * start) // count for i in range(count)]


def add_noise(
    latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], alpha: Float[Tensor, ""]
) -> Float[Tensor, "b c h w"]:
    """sqrt(alpha) latents + sqrt(1 - alpha) noise, alpha being the cumulative product at the wanted timestep."""
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def ddim_step(
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    alpha: Float[Tensor, ""],
    next_alpha: Float[Tensor, ""],
) -> Float[Tensor, "b c h w"]:
    """One deterministic DDIM step (eta = 0) from the level `alpha` to the cleaner level `next_alpha`."""
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return add_noise(clean, noise, next_alpha)


def apply_guidance(
    with_both: Float[Tensor, "b c h w"],
    with_image: Float[Tensor, "b c h w"],
    with_neither: Float[Tensor, "b c h w"],
    guidance_scale: float,
    image_guidance_scale: float,
) -> Float[Tensor, "b c h w"]:
    """InstructPix2Pix's three-way guidance: e(0,0) + S_I (e(I,0) - e(0,0)) + S_T (e(I,T) - e(I,0))."""
    return with_neither + image_guidance_scale * (with_image - with_neither) + guidance_scale * (with_both - with_image)


def v_to_epsilon(
    velocity: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], alpha: Float[Tensor, ""]
) -> Float[Tensor, "b c h w"]:
    """The noise that a v-prediction stands for: sqrt(alpha) v + sqrt(1 - alpha) z_t."""
    return alpha.sqrt() * velocity + (1 - alpha).sqrt() * latents


def masked_denoise(
    start: Float[Tensor, "b c h w"],
    reference: Float[Tensor, "b c h w"],
    mask: Optional[Bool[Tensor, "b h w"]],
    noise: Float[Tensor, "b c h w"],
    timesteps: Sequence[int],
    alphas_cumprod: Float[Tensor, " train_timesteps"],
    final_alpha: Float[Tensor, ""],
    predict_noise: NoisePredictor,
    report: ProgressCallback = no_progress,
) -> Float[Tensor, "b c h w"]:
    """Noises `start` to the first timestep and denoises it, holding what lies outside the mask to the reference.

    After each step the latents outside the mask are replaced by the reference's latents, noised by the same noise to
    the timestep just entered; after the last step they are the reference itself.

    Args:
        start: Clean latents that the edit starts from (the current render's).
        reference: Clean latents that hold outside the mask (the captured view's).
        mask: Where the latents may change; None is everywhere.
        noise: Standard normal, shared by the start and the background.
        timesteps: Strictly decreasing; the first is the level that `start` is noised to.
        alphas: Cumulative products of the noise schedule, indexed by timestep.
        final_alpha: Level after the last step: 1, or that of timestep 0 (diffusers' `set_alpha_to_one`).
        predict_noise: The guided noise prediction.
        report: Called after each step.

    Returns:
        Clean edited latents.
    """
    latents = add_noise(start, noise, alphas_cumprod[timesteps[0]])
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        next_alpha = final_alpha if last else alphas_cumprod[timesteps[i + 1]]
        latents = ddim_step(latents, predict_noise(latents, t), alphas_cumprod[t], next_alpha)
        if mask is not None:
            background = reference if last else add_noise(reference, noise, next_alpha)
            latents = torch.where(mask[:, None], latents, background)
        report(i + 1, len(timesteps))
    return latents
