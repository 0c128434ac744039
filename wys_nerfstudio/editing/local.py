"""The paper's editing of single pictures: where the instruction is about, and an edit that changes nothing else."""

import math
from dataclasses import dataclass
from typing import Literal, Optional

from jaxtyping import Bool, Float
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing.edit import EditSettings, edit_images, relevance_maps, sds_edit_images
from wys_nerfstudio.editing.editor import Editor
from wys_nerfstudio.editing.sampling import ProgressCallback, edit_seed, no_progress
from wys_nerfstudio.utils.errors import WysError


@dataclass
class LocalEditSettings(EditSettings):
    """How a picture is edited. The defaults are those of the paper's pictures (supplement D)."""

    guidance_scale: float = 7.5
    """How strongly the edit follows the instruction (S_T)."""
    image_guidance_scale: float = 0.8
    """How strongly the edit keeps to the input (S_I)."""
    mask_threshold: float = 0.4
    """Pixels of at least this relevance are edited (tau); 0 edits everything, which is plain InstructPix2Pix."""
    diffusion_steps: int = 100
    """Denoising steps."""
    relevance_noise_level: float = 0.8
    """Noise level at which the editor is asked what is relevant (t_rel), as a share of the diffusion."""
    relevance_num_samples: int = 1
    """Noise draws averaged in the relevance map; more is less noisy."""
    relevance_outlier_factor: float = relevance.OUTLIER_FACTOR
    """Relevance is clamped at Q3 + this many interquartile ranges; more suits editors whose maps are clean and small."""
    resolution: Optional[int] = None
    """Longer side in pixels at which the picture is edited; by default the editor's own (512 for InstructPix2Pix)."""
    method: Literal["local", "sds"] = "local"
    """Denoise under the mask, or descend along the signed relevance (supplement E; worse pictures)."""

    def check(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            WysError: For the first such setting.
        """
        if not 0 <= self.mask_threshold <= 1:
            raise WysError(f"--mask-threshold must be between 0 and 1, not {self.mask_threshold}.")
        if not 0 < self.relevance_noise_level < 1:
            raise WysError(f"--relevance-noise-level must be above 0 and below 1, not {self.relevance_noise_level}.")
        if not self.relevance_outlier_factor >= 0:
            raise WysError(f"--relevance-outlier-factor must be at least 0, not {self.relevance_outlier_factor}.")
        for name in ("guidance_scale", "image_guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise WysError(
                    f"--{name.replace('_', '-')} must be a finite number of at least 0, not {getattr(self, name)}."
                )
        counts = {"diffusion_steps": self.diffusion_steps, "relevance_num_samples": self.relevance_num_samples}
        if self.resolution is not None:
            counts["resolution"] = self.resolution
        for name, value in counts.items():
            if value < 1:
                raise WysError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")


@dataclass(frozen=True)
class ImageEditOutput:
    """A picture after an instruction, and what confined the edit."""

    edited: Float[Tensor, "h w 3"]
    """The edited picture in [0, 1]; outside the mask the input, bit for bit."""
    relevance: Float[Tensor, "h w"]
    """How much each pixel has to do with the instruction, in [0, 1]."""
    mask: Bool[Tensor, "h w"]
    """What was edited."""


def edit_image(
    editor: Editor,
    image: Float[Tensor, "h w 3"],
    instruction: str,
    settings: Optional[LocalEditSettings] = None,
    *,
    mask: Optional[Bool[Tensor, "mask_h mask_w"]] = None,
    seed: int = 0,
    report: ProgressCallback = no_progress,
) -> ImageEditOutput:
    """Edits one picture where the instruction is about, and nowhere else (the paper's section on images).

    Args:
        editor: The editor, as `load_editor` returns it.
        image: The picture in [0, 1], of any size.
        instruction: What to change.
        settings: The paper's by default.
        mask: Your own mask, instead of the one that the relevance map and `mask_threshold` give.
        seed: Of all noise; equal seeds give equal edits.
        report: Called with the number of steps done and of all steps.

    Returns:
        The edited picture, its relevance map and its mask, on the image's device.

    Raises:
        WysError: If the settings cannot work, the instruction is empty or not to be understood by the editor, or the mask
            has another size than the image.
    """
    settings = settings or LocalEditSettings()
    settings.check()
    if not instruction.strip():
        raise WysError('There is no instruction: say what to change, for instance "turn the bear into a panda".')
    height, width = image.shape[:2]
    if mask is not None and mask.shape != image.shape[:2]:
        raise WysError(f"The mask has {mask.shape[1]}x{mask.shape[0]} pixels and the picture {width}x{height}.")

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
    factor = settings.relevance_outlier_factor
    relevance_map = relevance.upsample(next(raw), height, width, outlier_factor=factor)[0].to(image.device)
    if mask is None:
        mask = relevance.threshold(relevance_map, settings.mask_threshold)
    if not mask.any():
        return ImageEditOutput(image, relevance_map, mask)

    captured, seeds = image[None], [edit_seed(seed, 0)]

    def step_done(done: int, total: int) -> None:
        report(num_samples + done, num_samples + total)

    if settings.method == "sds":
        edited = sds_edit_images(editor, captured, mask[None], instruction, settings, seeds=seeds, report=step_done)
    else:
        edited = edit_images(
            editor,
            captured,
            captured,
            mask[None],
            instruction,
            settings,
            start_timestep=editor.num_train_timesteps - 1,
            seeds=seeds,
            report=step_done,
        )
    return ImageEditOutput(edited[0], relevance_map, mask)
