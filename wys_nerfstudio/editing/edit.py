"""Relevance maps and local edits of image batches: the paper's section on images, for any `Editor`.

One image of a batch never influences another, so a batch gives what its images would give one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing.editor import Editor, resize_images
from wys_nerfstudio.editing.sampling import (
    ProgressCallback,
    add_noise,
    apply_guidance,
    masked_denoise,
    no_progress,
    timesteps,
)
from wys_nerfstudio.editing.sds import sds_optimize


@dataclass
class EditSettings:
    """How an image is edited, apart from the instruction and the mask."""

    guidance_scale: float = 7.5
    """How strongly the text is followed (S_T)."""
    image_guidance_scale: float = 1.5
    """How strongly the captured image is kept (S_I)."""
    diffusion_steps: int = 20
    """DDIM steps of an edit that starts from pure noise; others take their share."""
    resolution: Optional[int] = None
    """Longer side in pixels at which images are edited; by default the one that the editor was made for."""

    def size_for(self, editor: Editor, height: int, width: int) -> "tuple[int, int]":
        """Height and width at which an image of the given size is edited."""
        return editor.editing_size(height, width, self.resolution or editor.native_resolution)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Float[Tensor, "b ..."]:
    """Standard normal noise, one seed per image, the same on every device."""
    draws = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)


def relevance_maps(
    editor: Editor,
    images: Float[Tensor, "b h w 3"],
    instruction: str,
    *,
    noise_level: float = 0.8,
    num_samples: int = 1,
    seeds: Sequence[int],
    resolution: Optional[int] = None,
    batch_size: int = 8,
) -> Iterator[Float[Tensor, "n lh lw"]]:
    """Raw relevance |eps(z_t, I, T) - eps(z_t, I, "")| of images, batch by batch so that progress can be shown.

    Args:
        editor: The editor whose opinion is asked.
        images: Pictures in [0, 1], of any size.
        instruction: What to change.
        noise_level: t_rel, the timestep's share of the diffusion, in (0, 1).
        num_samples: Noise draws that are averaged (1 in the paper).
        seeds: One per image.
        resolution: As in `EditSettings`.
        batch_size: Images that go through the UNet together (each in two branches).

    Yields:
        Raw maps of the next `n <= batch_size` images, at the latents' size; see `relevance.normalize`.
    """
    height, width = EditSettings(resolution=resolution).size_for(editor, *images.shape[1:3])
    text = torch.cat([editor.encode_text(instruction), editor.encode_text("")])
    t = min(round(noise_level * editor.num_train_timesteps), editor.num_train_timesteps - 1)
    for first in range(0, len(images), batch_size):
        part = resize_images(images[first : first + batch_size].to(editor.device), height, width)
        condition = editor.encode_images(part)
        clean = condition * editor.vae.config.scaling_factor
        noise = seeded_noise(seeds[first : first + batch_size], (num_samples, *clean.shape[1:]), editor.device)
        states = text.repeat_interleave(len(part), dim=0)
        total = torch.zeros_like(clean[:, 0])
        for draw in range(num_samples):
            latents = add_noise(clean, noise[:, draw], editor.alphas_cumprod[t])
            both = editor.predict_noise(latents.repeat(2, 1, 1, 1), t, condition.repeat(2, 1, 1, 1), states)
            total += relevance.noise_difference(*both.chunk(2))
        yield total / num_samples


def edit_images(
    editor: Editor,
    images: Float[Tensor, "b start_h start_w 3"],
    captured: Float[Tensor, "b h w 3"],
    mask: Bool[Tensor, "b h w"],
    instruction: str,
    settings: EditSettings,
    *,
    start_timestep: int,
    seeds: Sequence[int],
    report: ProgressCallback = no_progress,
) -> Float[Tensor, "b h w 3"]:
    """Edits images inside a mask.

    Args:
        editor: The editor.
        images: What the edit starts from (a scene's current renders; for a single picture, the picture), at any size.
        captured: The editor's condition, and what holds outside the mask.
        mask: Where the images may change. All True is plain InstructPix2Pix.
        instruction: What to change.
        settings: Guidance, steps, resolution.
        start_timestep: Timestep that `images` are noised to, in [1, num_train_timesteps).
        seeds: One per image.
        report: Called after each step.

    Returns:
        Edited images in [0, 1] on the device of `images`; outside the mask equal to `captured`, bit for bit.
    """
    scale = editor.vae.config.scaling_factor
    start, condition = (_encode(editor, x, settings) for x in (images, captured))
    edited = masked_denoise(
        start=start * scale,
        reference=condition * scale,
        mask=_latent_mask(mask, condition),
        noise=seeded_noise(seeds, start.shape[1:], editor.device),
        timesteps=timesteps(start_timestep, settings.diffusion_steps, editor.num_train_timesteps),
        alphas_cumprod=editor.alphas_cumprod,
        final_alpha=editor.final_alpha,
        predict_noise=GuidedPredictor(editor, condition, instruction, settings),
        report=report,
    )
    return _decode(editor, edited / scale, captured, mask)


def sds_edit_images(
    editor: Editor,
    captured: Float[Tensor, "b h w 3"],
    mask: Bool[Tensor, "b h w"],
    instruction: str,
    settings: EditSettings,
    *,
    seeds: Sequence[int],
    report: ProgressCallback = no_progress,
) -> Float[Tensor, "b h w 3"]:
    """Edits images by descending along their signed relevance (supplement E, eq. 13) instead of denoising them.

    The latents are optimised, not the pixels: a gradient through the VAE's encoder draws chequered patterns that only the
    encoder sees as the edit. `diffusion_steps` steps of size `guidance_scale / diffusion_steps` each; there is no guidance
    by the image, which eq. 13 has in both of its terms. Eq. 13 knows no mask; the mask confines the result as it does that
    of `edit_images`.

    Args:
        editor: The editor.
        captured: The input: start, condition, and what holds outside the mask.
        mask: Where the images may change. All True is eq. 13 as it stands.
        instruction: What to change.
        settings: Step size, steps, resolution.
        seeds: One per image.
        report: Called after each step.

    Returns:
        Edited images in [0, 1] on the device of `captured`; outside the mask equal to `captured`, bit for bit.
    """
    scale = editor.vae.config.scaling_factor
    condition = _encode(editor, captured, settings)
    states = torch.cat([editor.encode_text(text) for text in (instruction, "")])
    states = states.repeat_interleave(len(condition), dim=0)

    def signed_relevance(latents: Tensor, t: int) -> Tensor:
        both = editor.predict_noise(latents.repeat(2, 1, 1, 1), t, condition.repeat(2, 1, 1, 1), states)
        with_instruction, without = both.chunk(2)
        return with_instruction - without

    last = editor.num_train_timesteps - 1
    steps = timesteps(last, settings.diffusion_steps, editor.num_train_timesteps)
    noise = seeded_noise(seeds, (len(steps), *condition.shape[1:]), editor.device)
    edited = sds_optimize(
        start=condition * scale,
        mask=_latent_mask(mask, condition),
        noise=noise.transpose(0, 1),
        timesteps=steps,
        alphas_cumprod=editor.alphas_cumprod,
        signed_relevance=signed_relevance,
        step_size=settings.guidance_scale / len(steps),
        report=report,
    )
    return _decode(editor, edited / scale, captured, mask)


def _encode(editor: Editor, images: Tensor, settings: EditSettings) -> Tensor:
    """Unscaled latents at the editing resolution."""
    size = settings.size_for(editor, *images.shape[1:3])
    return editor.encode_images(resize_images(images.to(editor.device), *size))


def _latent_mask(mask: Tensor, latents: Tensor) -> Optional[Tensor]:
    """The mask at the latents' size; None for a mask of everything."""
    return None if bool(mask.all()) else relevance.latent_mask(mask.to(latents.device), *latents.shape[-2:])


def _decode(editor: Editor, latents: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Images of unscaled latents inside the mask, the reference outside."""
    pixels = resize_images(editor.decode(latents), *reference.shape[1:3]).to(reference.device)
    return relevance.composite(pixels, reference, mask)


class GuidedPredictor:
    """The guidance branches of a batch as one UNet call; conditions are stacked once, not at every step.

    With an image guidance scale of 1 the branch without image and text cancels out and is not computed, and if the text's is
    1 too the branch without text neither.
    """

    def __init__(self, editor: Editor, condition: Tensor, instruction: str, settings: EditSettings) -> None:
        branches = [(instruction, condition)]
        if settings.guidance_scale != 1 or settings.image_guidance_scale != 1:
            branches.append(("", condition))
        if settings.image_guidance_scale != 1:
            branches.append(("", torch.zeros_like(condition)))
        states = torch.cat([editor.encode_text(text) for text, _ in branches])
        self.text = states.repeat_interleave(len(condition), dim=0)
        self.condition = torch.cat([image for _, image in branches])
        self.branches, self.editor, self.settings = len(branches), editor, settings

    def __call__(self, latents: Tensor, t: int) -> Tensor:
        repeated = latents.repeat(self.branches, 1, 1, 1)
        predictions = self.editor.predict_noise(repeated, t, self.condition, self.text).chunk(self.branches)
        return apply_guidance(
            predictions[0],
            predictions[min(1, self.branches - 1)],
            predictions[-1],
            self.settings.guidance_scale,
            self.settings.image_guidance_scale,
        )
