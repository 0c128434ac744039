"""The `Editor` protocol: what relevance maps and edits need of an image editor, whatever its family.

Images are (b, h, w, 3) in [0, 1], latents (b, c, h, w). A noise level is a pair (signal, noise): a noisy latent is
`signal * clean + noise * eps`. That covers eps- and v-prediction (DDIM) and flow matching (Euler) with the same step.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Optional, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.utils.errors import WysError

EMBEDDED = "embedded"
"""Name of the small InstructPix2Pix of toy images that comes with the package."""
EMBEDDED_FLOW = "embedded-flow"
"""Name of the small flow-matching editor of toy images that comes with the package."""
MAX_SQUEEZE = 0.02
"""Largest change of an image's proportions by the size at which it is edited."""


@dataclass(frozen=True)
class EditDefaults:
    """Settings of an edit that differ between editors; each is used where the user gives none."""

    guidance_scale: float
    """How strongly the edit follows the instruction (S_T)."""
    image_guidance_scale: float
    """How strongly the edit keeps to the input (S_I)."""
    diffusion_steps: int
    """Denoising steps from pure noise."""
    solver_order: int
    """Order of the sampler, as in `EditSettings`."""
    relevance_noise_level: float
    """Noise level of relevance maps (t_rel), as a share of the diffusion."""


@dataclass(frozen=True)
class EditorProfile:
    """What is known of an editor before its networks are loaded."""

    of_images: EditDefaults
    """Defaults of edits of single images."""
    of_scenes: EditDefaults
    """Defaults of edits of a scene's views."""
    half_precision: str
    """Name of the half-precision torch dtype that the networks were trained for."""
    relevance_batch_size: int
    """Images per network pass for relevance maps, for which a GPU that holds the networks has memory."""
    has_guidance: bool = True
    """Whether a guidance scale other than 1 has a meaning."""
    has_image_guidance: bool = True
    """Whether an image guidance scale other than 1 has a meaning."""

    def check_guidance(self, name: str, guidance_scale: Optional[float], image_guidance_scale: Optional[float]) -> None:
        """Refuse guidance that the editor does not have.

        Args:
            name: The editor's name, for the error.
            guidance_scale: S_T; None is the editor's default.
            image_guidance_scale: S_I; None is the editor's default.

        Raises:
            WysError: If a scale other than 1 has no meaning for the editor.
        """
        if not self.has_guidance and guidance_scale not in (None, 1):
            raise WysError(
                f'The editor "{name}" is distilled to run without guidance: leave out --guidance-scale, or give it 1, not '
                f"{guidance_scale:g}. --mask-threshold and --diffusion-steps apply."
            )
        if not self.has_image_guidance and image_guidance_scale not in (None, 1):
            applies = "--guidance-scale and --mask-threshold apply" if self.has_guidance else "--mask-threshold applies"
            raise WysError(
                f'The editor "{name}" has no image guidance: leave out --image-guidance-scale (wys sweep: give '
                f"--image-guidance-scales 1), or give it 1, not {image_guidance_scale:g}. {applies}."
            )


@dataclass(frozen=True)
class NoiseLevel:
    """Share of signal and noise in noisy latents, and the time that the editor's network takes for it."""

    signal: float
    """Factor of the clean latents."""
    noise: float
    """Factor of the noise."""
    time: "int | float"
    """The model's own time: an integer timestep for Stable Diffusion, the noise itself for flow matching."""

    @property
    def log_ratio(self) -> float:
        """Logarithm of signal over noise, for a level with noise; minus infinity without signal."""
        return math.log(self.signal / self.noise) if self.signal else -math.inf


@dataclass(frozen=True)
class ImageEncoding:
    """Images as an editor takes them."""

    latents: Float[Tensor, "b c h w"]
    """Clean latents at the scale at which they are noised."""
    condition: Any
    """The editor's own image condition, for `Editor.predictor`: a tensor or a named tuple of tensors, with a row per image."""


@dataclass(frozen=True)
class Branch:
    """One guidance branch: which conditions it has, and the scale of its difference to the next branch."""

    text: bool
    """Whether it is conditioned on the instruction."""
    image: bool
    """Whether it is conditioned on the image."""
    scale: float
    """Guidance scale of this branch against the next one; unused in the last branch."""
    keeps_norm: bool = False
    """Whether guidance against the next branch keeps the norm over channels that this branch's prediction has at each latent."""


Predictor = Callable[[Tensor, NoiseLevel], Sequence[Tensor]]
"""From noisy latents (b, c, h, w) and their level to one prediction per branch, each of the latents' shape."""


@runtime_checkable
class Editor(Protocol):
    """An instruction-conditioned image editor that works on latents."""

    name: str
    """Hub id, folder or name of an embedded editor, as given by the user."""
    profile: EditorProfile
    """Its defaults, and which guidance it has."""

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        ...

    @property
    def network(self) -> torch.nn.Module:
        """The network of the predictions, in which edits spend most of their time."""
        ...

    def editing_size(self, height: int, width: int, resolution: Optional[int]) -> tuple[int, int]:
        """Height and width at which an image is edited.

        Args:
            height: Of the image, in pixels.
            width: Of the image, in pixels.
            resolution: Longer side at which it is edited, in pixels; None is the editor's choice.
        """
        ...

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of images of an editing size."""
        ...

    def full_precision(self) -> AbstractContextManager[None]:
        """Context in which images are encoded and predictions computed in float32 arithmetic, whatever the editor's dtype.

        For relevance, the small difference of two large predictions, which half precision covers with rounding noise. A
        compiled network is called without its graphs, which are those of the edits' precision and numbers of rows.
        """
        ...

    def encode_text(self, instruction: str) -> Tensor:
        """Validate and encode an instruction; results are cached.

        Raises:
            WysError: If the editor does not support the instruction.
        """
        ...

    def encode(self, images: Float[Tensor, "b h w 3"]) -> ImageEncoding:
        """Encode images of an editing size in one pass."""
        ...

    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Decode clean latents to images, float32 in [0, 1]."""
        ...

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """The level of a relevance map, which has signal and noise.

        Args:
            strength: Share of the diffusion, in (0, 1).
            size: Height and width of the latents, on which the levels of flow matching depend.
        """
        ...

    def noise_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> list[NoiseLevel]:
        """Strictly descending levels of a denoising run; the last is the final, clean level.

        Args:
            strength: First level, as a share of the diffusion in [0, 1]; 1 is pure noise.
            num_steps: Steps of a run from pure noise; a run from less noise takes its share of them.
            size: Height and width of the latents.

        Raises:
            WysError: If the editor does not have as many levels.
        """
        ...

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        """Guidance branches, most conditioned first; scales that mean nothing to the editor are 1 (`profile`)."""
        ...

    def predictor(self, condition: Any, instruction: str, branches: Sequence[Branch]) -> Predictor:
        """Bind the conditions of a batch of images.

        Args:
            condition: `ImageEncoding.condition` of the images.
            instruction: What to change.
            branches: Branches that are computed.
        """
        ...

    def split(
        self, prediction: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], level: NoiseLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Split noisy latents into clean latents and noise, given the prediction at their level."""
        ...


def join_encodings(encodings: Sequence[ImageEncoding], device: "str | torch.device") -> ImageEncoding:
    """Encodings of batches of images as that of one batch.

    Args:
        encodings: Of one editor and size.
        device: Device of the result.
    """

    def join(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.cat([part.to(device) for part in parts])
        return type(parts[0])(*map(join, zip(*parts)))

    latents = join([encoding.latents for encoding in encodings])
    if all(encoding.condition is encoding.latents for encoding in encodings):
        return ImageEncoding(latents, latents)
    return ImageEncoding(latents, join([encoding.condition for encoding in encodings]))


def size_in_cells(height: int, width: int, longer_side: int, cell: int) -> tuple[int, int]:
    """Height and width of an image at about a resolution: its own proportions, in whole cells.

    The longer side is at most `longer_side`, and shorter by up to an eighth where that keeps the proportions within
    `MAX_SQUEEZE`.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        longer_side: Longer side of the result, in pixels.
        cell: Side of a cell, of which both sides are multiples, in pixels.
    """
    aspect = min(height, width) / max(height, width)
    longest = max(1, round(longer_side / cell))
    sizes = [(longer, max(1, round(longer * aspect))) for longer in range(longest, max(1, longest * 7 // 8) - 1, -1)]
    squeezes = [max(shorter / longer / aspect, longer * aspect / shorter) - 1 for longer, shorter in sizes]
    within = [size for size, squeeze in zip(sizes, squeezes) if squeeze <= MAX_SQUEEZE]
    longer, shorter = within[0] if within else sizes[squeezes.index(min(squeezes))]
    return (shorter * cell, longer * cell) if height <= width else (longer * cell, shorter * cell)


def resize_images(images: Float[Tensor, "b h w c"], height: int, width: int) -> Float[Tensor, "b height width c"]:
    """Bicubic, antialiased resize, clamped to [0, 1]; returns the same tensor if the size is already right."""
    if images.shape[1:3] == (height, width):
        return images
    channels_first = F.interpolate(
        images.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return channels_first.permute(0, 2, 3, 1).clamp_(0, 1)
