"""A Stable Diffusion editor presented as a flow-matching model: x_s = (1 - s) x_0 + s eps, prediction v = eps - x_0.

The same networks in another parametrization: latents x_s = x_t (1 - s) / signal with
s / (1 - s) = noise / signal, so that a level of the wrapped editor and its flow level have the same signal-to-noise ratio.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Optional

import torch

from wys_nerfstudio.editing.editor import Branch, EditorProfile, ImageEncoding, NoiseLevel, Predictor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor


@dataclass
class FlowEditor:
    """`Editor` for flow matching; does not inherit from the wrapped editor."""

    wrapped: StableDiffusionEditor
    name: str = "flow"

    @property
    def device(self) -> torch.device:
        return self.wrapped.device

    @property
    def network(self) -> torch.nn.Module:
        return self.wrapped.network

    @property
    def profile(self) -> EditorProfile:
        return self.wrapped.profile

    def editing_size(self, height: int, width: int, resolution: Optional[int]) -> tuple[int, int]:
        return self.wrapped.editing_size(height, width, resolution)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return self.wrapped.latent_size(height, width)

    def full_precision(self) -> AbstractContextManager[None]:
        return self.wrapped.full_precision()

    def encode_text(self, instruction: str) -> torch.Tensor:
        return self.wrapped.encode_text(instruction)

    def encode(self, images: torch.Tensor) -> ImageEncoding:
        return self.wrapped.encode(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.wrapped.decode(latents)

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        return as_flow(self.wrapped.noise_level(strength, size))

    def noise_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> list[NoiseLevel]:
        # The final level is only decoded. The embedded editor's final level is that of timestep 0, not quite clean; it is not
        # converted, so that both editors decode the same latents.
        *levels, final = self.wrapped.noise_levels(strength, num_steps, size)
        return [*(as_flow(level) for level in levels), final]

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        return self.wrapped.branches(guidance_scale, image_guidance_scale)

    def predictor(self, condition: Any, instruction: str, branches: Sequence[Branch]) -> Predictor:
        predict = self.wrapped.predictor(condition, instruction, branches)

        def velocities(latents: torch.Tensor, level: NoiseLevel) -> list[torch.Tensor]:
            # The level in the variance-preserving parametrization, from s alone: signal^2 + noise^2 = 1.
            s = level.time
            norm = ((1 - s) ** 2 + s**2) ** 0.5
            timestep = self.timestep(s)
            original = NoiseLevel((1 - s) / norm, s / norm, timestep)
            scaled = latents / norm
            parts = (self.wrapped.split(prediction, scaled, original) for prediction in predict(scaled, original))
            return [noise - clean for clean, noise in parts]

        return velocities

    def timestep(self, s: float) -> int:
        """Return the timestep with the signal-to-noise ratio of s."""
        alphas = self.wrapped.alphas_cumprod.double()
        return int((((1 - alphas) / alphas).sqrt() - s / (1 - s)).abs().argmin())

    def split(
        self, prediction: torch.Tensor, latents: torch.Tensor, level: NoiseLevel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return latents - level.time * prediction, latents + (1 - level.time) * prediction


def as_flow(level: NoiseLevel) -> NoiseLevel:
    """Return the flow-matching level with the same signal-to-noise ratio."""
    s = level.noise / (level.noise + level.signal)
    return NoiseLevel(1 - s, s, s)
