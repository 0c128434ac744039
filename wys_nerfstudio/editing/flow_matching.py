"""What editors of the flow-matching families share: sizes, precision, noise levels and the loading of their scheduler.

x_s = (1 - s) x_0 + s eps, and a transformer predicts v = eps - x_0 from tokens of 2x2 latents of the VAE. Outside the
transformer, latents are (b, c, h, w) with these 2x2 as channels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from wys_nerfstudio.editing.editor import EditorProfile, NoiseLevel, size_in_cells
from wys_nerfstudio.editing.parts import read_json
from wys_nerfstudio.editing.precision import in_float32, in_float32_by_layer, without_tf32
from wys_nerfstudio.utils.errors import WysError

MAX_PIXELS = 1024 * 1024
"""Pixels of the largest images that the models were trained on."""

MIN_SIDE = 64
"""Smallest side of an edited image, in pixels."""

RELEVANCE_NOISE_LEVEL = 0.84
"""The noise of the paper's relevance maps: t_rel = 0.8 of Stable Diffusion (alphas_cumprod 0.037) has the signal-to-noise ratio of
s = 0.84."""


@dataclass
class FlowMatchingEditor:
    """Base of the flow-matching editors. Families add text, images, the levels of a run, and predictions."""

    name: str
    """Hub id or folder, as given by the user."""
    profile: EditorProfile
    """Its defaults, and which guidance it has."""
    transformer: Any
    """diffusers' transformer of the family."""
    vae: Any
    """diffusers' autoencoder of the family."""
    text_encoder: Any
    """transformers' model whose states are the text."""
    scheduler: Any
    """diffusers' FlowMatchEulerDiscreteScheduler, for the noise levels."""
    _in_full_precision: bool = field(default=False, init=False, repr=False)
    """Whether predictions are computed in float32."""
    overflow_reported: bool = field(default=False, init=False, repr=False)
    """Whether the overflow of the VAE in half precision has been logged."""

    @property
    def device(self) -> torch.device:
        """Device of transformer and VAE."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        return next(self.transformer.parameters())

    @property
    def _dtype(self) -> torch.dtype:
        """Precision of the transformer's inputs."""
        return torch.float32 if self._in_full_precision else self._weight.dtype

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one side: those of the VAE's latents, of which 2x2 are one."""
        raise NotImplementedError

    def editing_size(self, height: int, width: int, resolution: Optional[int]) -> tuple[int, int]:
        """Height and width at which an image is edited.

        Args:
            height: Of the image, in pixels.
            width: Of the image, in pixels.
            resolution: Longer side at which it is edited, in pixels; None is the image's own, at most `MAX_PIXELS` in all.
        """
        own = max(height, width) * min(1.0, math.sqrt(MAX_PIXELS / (height * width)))
        least = MIN_SIDE * max(height, width) / min(height, width)
        return size_in_cells(height, width, math.ceil(max(resolution or own, least)), self.latent_factor)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of images of an editing size."""
        return height // self.latent_factor, width // self.latent_factor

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Context in which transformer and VAE compute in float32. The transformer's weights are cast layer by layer, because
        all of them would need twice the memory. Text states keep the text encoder's precision."""
        before = self._in_full_precision
        with without_tf32(), in_float32(self.vae), in_float32_by_layer(self.transformer):
            self._in_full_precision = True
            try:
                yield
            finally:
                self._in_full_precision = before

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """The level whose share of noise is `strength`.

        Args:
            strength: Share of noise in the latents, s.
            size: Height and width of the latents.
        """
        return flow_level(strength)

    def split(
        self, prediction: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], level: NoiseLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Split noisy latents into clean latents and noise, given the velocity at their level."""
        return latents - level.noise * prediction, latents + level.signal * prediction


def flow_level(noise: float) -> NoiseLevel:
    """The level of a share of noise, which is also the transformer's time."""
    return NoiseLevel(signal=1.0 - noise, noise=noise, time=noise)


def pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens c"]:
    """Latents as tokens, row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Float[Tensor, "b tokens c"], height: int, width: int) -> Float[Tensor, "b c height width"]:
    """The first tokens as float32 latents; those of the reference follow them."""
    return tokens[:, : height * width].float().transpose(1, 2).unflatten(2, (height, width))


def load_scheduler(name: str, source: str) -> Any:
    """Load the scheduler, of which only the levels of plain flow matching are supported.

    Args:
        name: The editor's name.
        source: Folder or hub id of its parts.

    Raises:
        WysError: If it is not supported.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    config = read_json(source, "scheduler/scheduler_config.json") or {}
    kind = config.get("_class_name")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise WysError(
            f'The editor "{name}" uses {kind or "an unnamed scheduler"}, which is not supported. Supported: '
            "FlowMatchEulerDiscreteScheduler."
        )
    for option in ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(option):
            raise WysError(f'The editor "{name}" uses {kind} with {option}, which is not supported.')
    count = config.get("num_train_timesteps", 1000)
    if count != 1000:
        raise WysError(
            f'The scheduler_config.json of the editor "{name}" has {count} as num_train_timesteps: supported is 1000.'
        )
    return FlowMatchEulerDiscreteScheduler.from_config(config)
