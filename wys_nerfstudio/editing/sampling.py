"""Masked sampling over noise levels: pure torch, for any editor's predictions.

Levels are given as a list, so no scheduler object is involved. The step `signal' * clean + noise' * eps` is DDIM (eta = 0)
for eps- and v-prediction and Euler for flow matching. With clean latents extrapolated from the last two levels it is
DPM-Solver++(2M) (Lu et al., 2022).
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.editing.editor import Branch, NoiseLevel

Denoiser = Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor]]
"""From noisy latents (b, c, h, w) and their level to clean latents and noise, each of the latents' shape."""

ProgressCallback = Callable[[int, int], None]
"""Called with the number of finished steps and the number of all steps."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def edit_seed(seed: int, edit_number: int) -> int:
    """Seed of one edit. It depends only on the run's seed and the edit's number, so a resumed run makes the same edits."""
    return random.Random(f"{seed}/{edit_number}").getrandbits(62)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Float[Tensor, "b ..."]:
    """Standard normal noise, one seed per image, the same on every device."""
    draws = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)


def add_noise(
    latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], level: NoiseLevel
) -> Float[Tensor, "b c h w"]:
    """Noise clean latents to a level."""
    return level.signal * latents + level.noise * noise


def needed_branches(branches: Sequence[Branch]) -> list[Branch]:
    """Drop trailing branches that cancel out, because the scale of the branch before them is 1."""
    needed = list(branches)
    while len(needed) > 1 and needed[-2].scale == 1:
        needed.pop()
    return needed


def apply_guidance(
    predictions: Sequence[Float[Tensor, "b c h w"]], branches: Sequence[Branch]
) -> Float[Tensor, "b c h w"]:
    """Combine branches: p_n + s_{n-1} (p_{n-1} - p_n) + ... + s_1 (p_1 - p_2).

    For (text and image, image, none) this is InstructPix2Pix's e(0,0) + S_I (e(I,0) - e(0,0)) + S_T (e(I,T) - e(I,0)).

    Args:
        predictions: One per branch, most conditioned first.
        branches: Their scales, and which keep the norm of their prediction.
    """
    guided = predictions[-1]
    for i in reversed(range(len(predictions) - 1)):
        guided = guided + branches[i].scale * (predictions[i] - predictions[i + 1])
        if branches[i].keeps_norm:
            guided = F.normalize(guided, dim=1) * predictions[i].norm(dim=1, keepdim=True)
    return guided


def extrapolation_weight(previous: NoiseLevel, level: NoiseLevel, next_level: NoiseLevel) -> float:
    """Weight at which a second-order step adds the change of the clean latents since the previous level; 0 after pure noise.

    Args:
        previous: The level before.
        level: The level that is left; it has signal and noise.
        next_level: The level that is entered; it has noise.
    """
    last_step, step = level.log_ratio - previous.log_ratio, next_level.log_ratio - level.log_ratio
    return -math.expm1(-step) * step / (2 * last_step)


def masked_denoise(
    start: Float[Tensor, "b c h w"],
    reference: Float[Tensor, "b c h w"],
    mask: Optional[Bool[Tensor, "b h w"]],
    noise: Float[Tensor, "b c h w"],
    levels: Sequence[NoiseLevel],
    denoise: Denoiser,
    report: ProgressCallback = no_progress,
    solver_order: int = 1,
) -> Float[Tensor, "b c h w"]:
    """Noise `start` to the first level and denoise it; latents outside the mask follow the reference.

    After each step the latents outside the mask are replaced by the reference's latents, noised with the same noise to
    the level just entered; after the last step they are the reference itself.

    Args:
        start: Clean latents that the edit starts from (the current render's).
        reference: Clean latents that are kept outside the mask (the captured view's).
        mask: Where the latents may change; None is everywhere.
        noise: Standard normal, shared by the start and the background.
        levels: Strictly descending; the first is the level that `start` is noised to, the last is the final level.
        denoise: Splits noisy latents into clean latents and noise.
        report: Called after each step.
        solver_order: As in `EditSettings`. Steps are elementwise, so that latents outside the mask have no influence inside.

    Returns:
        Clean edited latents.
    """
    latents = add_noise(start, noise, levels[0])
    clean, steps = start, len(levels) - 1
    for i, (level, next_level) in enumerate(zip(levels, levels[1:]), start=1):
        previous, (clean, predicted_noise) = clean, denoise(latents, level)
        estimate = clean
        if solver_order == 2 and 1 < i < steps:  # nothing precedes the first step, and the last one removes all noise
            estimate = clean + extrapolation_weight(levels[i - 2], level, next_level) * (clean - previous)
        latents = add_noise(estimate, predicted_noise, next_level)
        if mask is not None:
            background = reference if i == steps else add_noise(reference, noise, next_level)
            latents = torch.where(mask[:, None], latents, background)
        report(i, steps)
    return latents
