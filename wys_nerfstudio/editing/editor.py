"""The `Editor` protocol: what relevance maps and edits need of an image editor, whatever its family.

Images are (b, h, w, 3) in [0, 1], latents (b, c, h, w). A noise level is a pair (signal, noise): a noisy latent is
`signal * clean + noise * eps`. That covers eps- and v-prediction (DDIM) and flow matching (Euler) with the same step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EMBEDDED = "embedded"
"""Name of the small editor of toy images that comes with the package."""


@dataclass(frozen=True)
class NoiseLevel:
    """Share of signal and noise in noisy latents, and the time that the editor's network takes for it."""

    signal: float
    """Factor of the clean latents."""
    noise: float
    """Factor of the noise."""
    time: "int | float"
    """The model's own time: an integer timestep for Stable Diffusion."""


@dataclass(frozen=True)
class ImageEncoding:
    """Images as an editor takes them."""

    latents: Float[Tensor, "b c h w"]
    """Clean latents at the scale at which they are noised."""
    condition: Any
    """The editor's own image condition, for `Editor.predictor`."""


@dataclass(frozen=True)
class Branch:
    """One guidance branch: which conditions it has, and the scale of its difference to the next branch."""

    text: bool
    """Whether it is conditioned on the instruction."""
    image: bool
    """Whether it is conditioned on the image."""
    scale: float
    """Guidance scale of this branch against the next one; unused in the last branch."""


Predictor = Callable[[Tensor, NoiseLevel], Sequence[Tensor]]
"""From noisy latents (b, c, h, w) and their level to one prediction per branch, each of the latents' shape."""


@runtime_checkable
class Editor(Protocol):
    """An instruction-conditioned image editor that works on latents."""

    name: str
    """Hub id, folder or "embedded", as given by the user."""

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        ...

    @property
    def native_resolution(self) -> int:
        """Longer side, in pixels, of the images that the editor was trained on."""
        ...

    def editing_size(self, height: int, width: int, resolution: int) -> tuple[int, int]:
        """Height and width at which an image is edited.

        Args:
            height: Of the image, in pixels.
            width: Of the image, in pixels.
            resolution: Longer side at which it is edited, in pixels.
        """
        ...

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of images of an editing size."""
        ...

    def full_precision(self) -> AbstractContextManager[None]:
        """Context in which images are encoded and predictions computed in float32 arithmetic, whatever the editor's dtype.

        For relevance, the small difference of two large predictions, which half precision covers with rounding noise.
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

    def noise_level(self, strength: float) -> NoiseLevel:
        """The level at a share of the diffusion, in (0, 1)."""
        ...

    def noise_levels(self, strength: float, num_steps: int) -> list[NoiseLevel]:
        """Strictly descending levels of a denoising run; the last is the final, clean level.

        Args:
            strength: First level, as a share of the diffusion in [0, 1]; 1 is pure noise.
            num_steps: Steps of a run from pure noise; a run from less noise takes its share of them.
        """
        ...

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        """Guidance branches, most conditioned first.

        Raises:
            WysError: If the editor does not support these scales.
        """
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


def resize_images(images: Float[Tensor, "b h w c"], height: int, width: int) -> Float[Tensor, "b height width c"]:
    """Bicubic, antialiased resize, clamped to [0, 1]; returns the same tensor if the size is already right."""
    if images.shape[1:3] == (height, width):
        return images
    channels_first = F.interpolate(
        images.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return channels_first.permute(0, 2, 3, 1).clamp_(0, 1)
