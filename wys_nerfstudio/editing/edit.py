"""Relevance maps and local edits of images, for any `Editor` (the paper's section on images).

The images of a batch do not influence each other: a batch gives the same results as its images one by one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, Optional

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing.editor import (
    Branch,
    EditDefaults,
    Editor,
    ImageEncoding,
    NoiseLevel,
    resize_images,
)
from wys_nerfstudio.editing.sampling import (
    Denoiser,
    ProgressCallback,
    add_noise,
    apply_guidance,
    edit_seed,
    masked_denoise,
    needed_branches,
    no_progress,
    seeded_noise,
)
from wys_nerfstudio.editing.sds import sds_optimize
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import to_float

WITH_AND_WITHOUT_TEXT = (Branch(text=True, image=True, scale=1.0), Branch(text=False, image=True, scale=1.0))
"""The two branches whose difference is the relevance; their scales are unused. Of distilled models, too: the distance of the
prediction with text from the image itself takes one branch, but also shows what an editor changes without being told to."""


def _as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class EditOptions:
    """Options of an edit, as they are typed. The defaults are those of the paper's images (supplement D)."""

    guidance_scale: Optional[float] = None
    """How strongly the edit follows the instruction (S_T). Default: the editor's own, 7.5 for InstructPix2Pix."""
    image_guidance_scale: Optional[float] = None
    """How strongly the edit keeps to the input (S_I). Default: the editor's own, 0.8 for InstructPix2Pix."""
    diffusion_steps: Optional[int] = None
    """Denoising steps. Default: the editor's own, 100 for InstructPix2Pix."""
    solver_order: Optional[Literal[1, 2]] = None
    """Sampler: 1 is DDIM (of flow matching, Euler), 2 is DPM-Solver++(2M), which needs fewer steps. Default: the editor's
    own, 1 for InstructPix2Pix."""
    resolution: Optional[int] = None
    """Longer side in pixels at which the image is edited. Default: the editor's own, 512 for InstructPix2Pix."""
    mask_threshold: float = 0.4
    """Pixels of at least this relevance are edited (tau); 0 edits everything, which is the plain editor."""
    relevance_noise_level: Optional[float] = None
    """Noise level of the relevance map (t_rel), as a share of the diffusion. Default: the editor's own, 0.8 for
    InstructPix2Pix."""
    relevance_num_samples: int = 1
    """Noise draws averaged in the relevance map; more is less noisy."""
    relevance_outlier_factor: float = relevance.OUTLIER_FACTOR
    """Relevance is clamped at Q3 + this many interquartile ranges; more suits editors whose maps are clean and small."""
    method: Literal["local", "sds"] = "local"
    """Denoise under the mask, or descend along the signed relevance (supplement E; lower quality)."""

    def resolve(self, defaults: EditDefaults) -> "EditSettings":
        """Return the settings of an edit: an editor's defaults where nothing is typed."""
        typed = {option.name: getattr(self, option.name) for option in fields(EditOptions)}
        known = {name: value for name, value in typed.items() if value is not None}
        return EditSettings(**{**asdict(defaults), **known})

    def check(self, flag: Callable[[str], str] = _as_flag) -> None:
        """Validate the options.

        Args:
            flag: From a setting's name to the command-line flag that errors name.

        Raises:
            WysError: For the first invalid option.
        """
        if not 0 <= self.mask_threshold <= 1:
            raise WysError(f"{flag('mask_threshold')} must be between 0 and 1, not {self.mask_threshold}.")
        if self.relevance_noise_level is not None and not 0 < self.relevance_noise_level < 1:
            raise WysError(
                f"{flag('relevance_noise_level')} must be above 0 and below 1, not {self.relevance_noise_level}."
            )
        if not self.relevance_outlier_factor >= 0:
            raise WysError(
                f"{flag('relevance_outlier_factor')} must be at least 0, not {self.relevance_outlier_factor}."
            )
        for name in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise WysError(f"{flag(name)} must be a finite number of at least 0, not {value}.")
        for name in ("diffusion_steps", "relevance_num_samples", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WysError(f"{flag(name)} must be at least 1, not {value}.")


@dataclass(frozen=True)
class EditSettings(EditOptions):
    """Settings of an edit: options without gaps. The defaults are InstructPix2Pix's."""

    guidance_scale: float = 7.5
    """How strongly the edit follows the instruction (S_T)."""
    image_guidance_scale: float = 0.8
    """How strongly the edit keeps to the input (S_I)."""
    diffusion_steps: int = 100
    """Denoising steps."""
    solver_order: Literal[1, 2] = 1
    """Sampler: 1 is DDIM (of flow matching, Euler), 2 is DPM-Solver++(2M)."""
    relevance_noise_level: float = 0.8
    """Noise level of the relevance map (t_rel), as a share of the diffusion."""

    def size_for(self, editor: Editor, height: int, width: int) -> tuple[int, int]:
        """Height and width at which an image of the given size is edited."""
        return editor.editing_size(height, width, self.resolution)


def relevance_maps(
    editor: Editor,
    images: Shaped[Tensor, "b h w 3"],
    instruction: str,
    *,
    noise_level: float = 0.8,
    num_samples: int = 1,
    seeds: Sequence[int],
    resolution: Optional[int] = None,
    batch_size: int = 8,
) -> Iterator[Float[Tensor, "n lh lw"]]:
    """Raw relevance maps of images, batch by batch: the difference that the instruction makes to the prediction.

    They are computed in `Editor.full_precision`; a caller that enters it before casts the networks once for all batches.

    Args:
        editor: The editor.
        images: Images in [0, 1] or with 8-bit values, of any size.
        instruction: What to change.
        noise_level: t_rel, as a share of the diffusion, in (0, 1).
        num_samples: Noise draws that are averaged (1 in the paper).
        seeds: One per image.
        resolution: As in `EditSettings`.
        batch_size: Images per network pass (each in two branches).

    Yields:
        Raw maps of the next `n <= batch_size` images, at the latents' size; see `relevance.normalize`.
    """
    for first in range(0, len(images), batch_size):
        with editor.full_precision():  # not across the yield: callers may edit in between
            encoding = encode_images(editor, images[first : first + batch_size], images, resolution)
            clean = encoding.latents
            level = editor.noise_level(noise_level, latent_size(clean))
            noise = seeded_noise(seeds[first : first + batch_size], (num_samples, *clean.shape[1:]), editor.device)
            predict = editor.predictor(encoding.condition, instruction, WITH_AND_WITHOUT_TEXT)
            total = torch.zeros_like(clean[:, 0])
            for draw in range(num_samples):
                noisy = add_noise(clean, noise[:, draw], level)
                total += relevance.noise_difference(
                    *(editor.split(prediction, noisy, level)[1] for prediction in predict(noisy, level))
                )
        yield total / num_samples


def edit_images(
    editor: Editor,
    images: Float[Tensor, "b start_h start_w 3"],
    reference: Float[Tensor, "b h w 3"],
    mask: Bool[Tensor, "b h w"],
    instruction: str,
    settings: EditSettings,
    *,
    strength: float,
    seeds: Sequence[int],
    encoded_reference: Optional[ImageEncoding] = None,
    on_progress: ProgressCallback = no_progress,
) -> Float[Tensor, "b h w 3"]:
    """Edit images inside a mask.

    Args:
        editor: The editor.
        images: What the edit starts from (a scene's current renders; for a single image, the image), of any size.
        reference: The editor's image condition, and the result outside the mask.
        mask: Where the images may change. All True is the plain editor.
        instruction: What to change.
        settings: Guidance, steps, resolution.
        strength: Noise that `images` start from, as a share of the diffusion in [0, 1]; 1 is pure noise.
        seeds: One per image.
        encoded_reference: Encoding of `reference` if there is one, from `encode_images`.
        on_progress: Called after each step.

    Returns:
        Edited images in [0, 1] on the device of `reference`; outside the mask equal to `reference`, bit for bit.
    """
    decoded = _local_edit(
        editor,
        images,
        reference,
        mask,
        instruction,
        settings,
        strength=strength,
        seeds=seeds,
        encoded_reference=encoded_reference,
        on_progress=on_progress,
    )
    return _composite(decoded, reference, mask)


def _local_edit(
    editor: Editor,
    images: Shaped[Tensor, "b start_h start_w 3"],
    reference: Shaped[Tensor, "b h w 3"],
    mask: Bool[Tensor, "b h w"],
    instruction: str,
    settings: EditSettings,
    *,
    strength: float,
    seeds: Sequence[int],
    encoded_reference: Optional[ImageEncoding] = None,
    on_progress: ProgressCallback,
) -> Float[Tensor, "b edit_h edit_w 3"]:
    """Edit images inside a mask at latent resolution; arguments as in `edit_images`.

    Returns:
        Decoded images at the editing size, also outside the mask.
    """
    start = encode_images(editor, images, reference, settings.resolution)
    kept = encoded_reference or encode_images(editor, reference, reference, settings.resolution)
    edited = masked_denoise(
        start=start.latents,
        reference=kept.latents,
        mask=_latent_mask(mask, kept.latents),
        noise=seeded_noise(seeds, start.latents.shape[1:], editor.device),
        levels=editor.noise_levels(strength, settings.diffusion_steps, latent_size(kept.latents)),
        denoise=guided_denoiser(editor, kept, instruction, settings),
        report=on_progress,
        solver_order=settings.solver_order,
    )
    return editor.decode(edited)


def sds_edit_images(
    editor: Editor,
    reference: Shaped[Tensor, "b h w 3"],
    mask: Bool[Tensor, "b h w"],
    instruction: str,
    settings: EditSettings,
    *,
    seeds: Sequence[int],
    on_progress: ProgressCallback = no_progress,
) -> Float[Tensor, "b edit_h edit_w 3"]:
    """Edit images by descending along their signed relevance (supplement E, eq. 13) instead of denoising them.

    The latents are optimized, not the pixels: a gradient through the VAE's encoder draws checkerboard patterns that only
    the encoder responds to. There are `diffusion_steps` steps of size `guidance_scale / diffusion_steps` each. Image
    guidance does not apply: both terms of eq. 13 are conditioned on the image. Eq. 13 has no mask; here the mask confines
    the result as in `edit_images`.

    Args:
        editor: The editor.
        reference: The input: start and condition.
        mask: Where the images may change. All True is eq. 13 unchanged.
        instruction: What to change.
        settings: Step size, steps, resolution.
        seeds: One per image.
        on_progress: Called after each step.

    Returns:
        Decoded images at the editing size, also outside the mask.
    """
    encoding = encode_images(editor, reference, reference, settings.resolution)
    predict = editor.predictor(encoding.condition, instruction, WITH_AND_WITHOUT_TEXT)

    def signed_relevance(latents: Tensor, level: NoiseLevel) -> Tensor:
        with_text, without_text = (editor.split(p, latents, level)[1] for p in predict(latents, level))
        return with_text - without_text

    levels = editor.noise_levels(1.0, settings.diffusion_steps, latent_size(encoding.latents))[:-1]
    noise = seeded_noise(seeds, (len(levels), *encoding.latents.shape[1:]), editor.device)
    edited = sds_optimize(
        start=encoding.latents,
        mask=_latent_mask(mask, encoding.latents),
        noise=noise.transpose(0, 1),
        levels=levels,
        signed_relevance=signed_relevance,
        step_size=settings.guidance_scale / len(levels),
        report=on_progress,
    )
    return editor.decode(edited)


@dataclass(frozen=True)
class ImageEditOutput:
    """An edited image, its relevance map and its mask."""

    edited: Shaped[Tensor, "h w 3"]
    """The edited image, with the input's type; outside the mask equal to the input, bit for bit."""
    relevance: Float[Tensor, "h w"]
    """Relevance of each pixel to the instruction, in [0, 1]."""
    mask: Bool[Tensor, "h w"]
    """Pixels that were edited."""
    unmasked: Optional[Float[Tensor, "edit_h edit_w 3"]] = None
    """The editor's edit of the whole image with the same noise, at the editing size; None unless requested."""


def edit_image(
    editor: Editor,
    image: Shaped[Tensor, "h w 3"],
    instruction: str,
    options: Optional[EditOptions] = None,
    *,
    mask: Optional[Bool[Tensor, "mask_h mask_w"]] = None,
    seed: int = 0,
    with_unmasked: bool = False,
    on_progress: ProgressCallback = no_progress,
) -> ImageEditOutput:
    """Edit the region of an image that the instruction refers to (the paper's section on images).

    Args:
        editor: The editor, from `load_editor`.
        image: The image in [0, 1] or with 8-bit values, of any size. With 8 bits, large images take less memory.
        instruction: What to change.
        options: Options or settings of the edit; by default the editor's own.
        mask: Replaces the mask of the relevance map and `mask_threshold`.
        seed: Seed of all noise; equal seeds give equal edits.
        with_unmasked: Also edit the whole image, for comparison: twice the denoising steps.
        on_progress: Called with the number of finished steps and the number of all steps.

    Returns:
        The edited image, its relevance map and its mask, on the image's device.

    Raises:
        WysError: If an option is invalid, the instruction is empty or not supported by the editor, the mask's size differs
            from the image's, or the result is NaN or infinite.
    """
    settings = (options or EditOptions()).resolve(editor.profile.of_images)
    settings.check()
    if not instruction.strip():
        raise WysError('There is no instruction: describe what to change, for example "turn the bear into a panda".')
    height, width = image.shape[:2]
    if mask is not None and mask.shape != image.shape[:2]:
        raise WysError(f"The mask has {mask.shape[1]}x{mask.shape[0]} pixels, but the image has {width}x{height}.")
    check_supported(editor, [instruction], settings)

    num_samples = settings.relevance_num_samples
    raw = relevance_maps(
        editor,
        image[None],
        instruction,
        noise_level=settings.relevance_noise_level,
        num_samples=num_samples,
        seeds=[edit_seed(seed, -1)],
        resolution=settings.resolution,
    )
    factor, raw_map = settings.relevance_outlier_factor, next(raw)
    check_finite(raw_map, ["the relevance map"], "Use --editor-dtype float32.")
    relevance_map = relevance.upsample(raw_map, height, width, outlier_factor=factor)[0].to(image.device)
    if mask is None:
        mask = relevance.threshold(relevance_map, settings.mask_threshold)
    if not mask.any():
        return ImageEditOutput(image, relevance_map, mask)

    reference, seeds = image[None], [edit_seed(seed, 0)]
    runs = 2 if with_unmasked and (settings.method == "sds" or not mask.all()) else 1

    def denoise(mask: Tensor, run: int) -> Tensor:
        def step_done(done: int, total: int) -> None:
            on_progress(num_samples + run * total + done, num_samples + runs * total)

        if settings.method == "sds" and run == 0:
            small = sds_edit_images(editor, reference, mask, instruction, settings, seeds=seeds, on_progress=step_done)
        else:
            small = _local_edit(
                editor,
                reference,
                reference,
                mask,
                instruction,
                settings,
                strength=1.0,
                seeds=seeds,
                on_progress=step_done,
            )
        check_finite(small, ["the edit"], "Lower the guidance scales, or use --editor-dtype float32.")
        return small

    small = denoise(mask[None], 0)
    unmasked = small if runs == 1 else denoise(torch.ones_like(mask[None]), 1)
    edited = _composite(small, reference, mask[None])[0]
    return ImageEditOutput(edited, relevance_map, mask, unmasked[0].to(image.device) if with_unmasked else None)


def check_finite(values: Float[Tensor, "b ..."], names: Sequence[str], remedy: str) -> None:
    """Refuse results of an editor that are NaN or infinite, which half precision or extreme guidance can cause.

    Args:
        values: One result per name.
        names: What the results are, such as "the edit of view_1".
        remedy: What to change.

    Raises:
        WysError: For the first such result.
    """
    finite = values.flatten(1).isfinite().all(dim=1).tolist()
    if not all(finite):
        raise WysError(f"The editor failed: {names[finite.index(False)]} became NaN or Inf. {remedy}")


def check_supported(editor: Editor, instructions: Sequence[str], settings: EditSettings) -> None:
    """Refuse what an editor does not support, before the first edit.

    Args:
        editor: The editor.
        instructions: What to change.
        settings: Guidance and steps.

    Raises:
        WysError: If a guidance scale, an instruction or the number of steps is not supported.
    """
    editor.profile.check_guidance(editor.name, settings.guidance_scale, settings.image_guidance_scale)
    for instruction in instructions:
        editor.encode_text(instruction)
    editor.noise_levels(1.0, settings.diffusion_steps, (1, 1))


def guided_denoiser(editor: Editor, encoding: ImageEncoding, instruction: str, settings: EditSettings) -> Denoiser:
    """Denoiser of a batch of images under the settings' guidance; branches that cancel out are not computed.

    Args:
        editor: The editor.
        encoding: The images.
        instruction: What to change.
        settings: Guidance.
    """
    branches = needed_branches(editor.branches(settings.guidance_scale, settings.image_guidance_scale))
    predict = editor.predictor(encoding.condition, instruction, branches)

    def denoise(latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return editor.split(apply_guidance(predict(latents, level), branches), latents, level)

    return denoise


def encode_images(
    editor: Editor,
    images: Shaped[Tensor, "b image_h image_w 3"],
    reference: Shaped[Tensor, "references h w 3"],
    resolution: Optional[int],
) -> ImageEncoding:
    """Encode images at the editing size of the reference. That of a render, which has other proportions by up to 2 %, can differ.

    Args:
        editor: The editor.
        images: Images in [0, 1] or with 8-bit values, of any size.
        reference: The images themselves, or those that they are edits of.
        resolution: As in `EditSettings`.
    """
    size = editor.editing_size(reference.shape[1], reference.shape[2], resolution)
    images = images.to(editor.device)
    return editor.encode(resize_images(to_float(images), *size))


def latent_size(latents: Float[Tensor, "b c h w"]) -> tuple[int, int]:
    """Height and width of latents."""
    return latents.shape[2], latents.shape[3]


def _latent_mask(mask: Tensor, latents: Tensor) -> Optional[Tensor]:
    """The mask at the latents' size; None if it is True everywhere."""
    return None if bool(mask.all()) else relevance.latent_mask(mask.to(latents.device), *latents.shape[-2:])


def _composite(decoded: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Decoded images, resized and with the reference's type, inside the mask, the reference outside."""
    result = torch.empty_like(reference)
    for channel in range(3):  # one after the other: a large image has few bytes, but four times as many as floats
        pixels = resize_images(decoded[..., channel : channel + 1], *reference.shape[1:3])
        if not reference.is_floating_point():
            pixels = (pixels * 255).round_().to(reference.dtype)
        kept = reference[..., channel : channel + 1]
        result[..., channel : channel + 1] = relevance.composite(pixels.to(kept.device), kept, mask)
    return result
