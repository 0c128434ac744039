"""The embedded editor with the numerics of a full-size InstructPix2Pix: it predicts eps, under the rounding noise of its dtype.

The embedded UNet predicts v, so that rounding at t_rel reaches eps damped by sqrt(alpha) = 0.19, and is too small to accumulate
much of it. Its stored weights are float16 numbers; here they are not, as those of published checkpoints.
"""

import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from wys_nerfstudio.editing import EMBEDDED, load_editor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor

ROUNDING_NOISE = {torch.float32: 0.0, torch.float16: 0.0018, torch.bfloat16: 0.015}
"""Noise of eps(T) - eps("") relative to rms(eps): InstructPix2Pix's UNet with random weights, against float32."""


class EpsNetwork(nn.Module):
    """A UNet that predicts v, as one that predicts eps with rounding noise.

    Args:
        unet: diffusers' UNet2DConditionModel.
        alphas_cumprod: Its noise schedule.
    """

    def __init__(self, unet: Any, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self.alphas_cumprod = alphas_cumprod

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, inputs: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        velocity = self.unet(inputs, timestep, encoder_hidden_states=encoder_hidden_states).sample.float()
        alphas = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noises = alphas.sqrt() * velocity + (1 - alphas).sqrt() * inputs[:, : velocity.shape[1]].float()
        # Two branches with independent noise: their difference has twice the variance.
        share = ROUNDING_NOISE[self.dtype] / 2**0.5
        draws = [standard_normal(*pair) for pair in zip(noises, encoder_hidden_states.float())]
        scale = share * noises.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return SimpleNamespace(sample=noises + scale * torch.stack(draws))


def standard_normal(noise: Tensor, text: Tensor) -> Tensor:
    """Return a draw of the shape of `noise`, seeded by both tensors, so that it depends on nothing else in the batch."""
    content = noise.numpy().tobytes() + text.numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    return torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed))


def eps_editor(dtype: torch.dtype) -> StableDiffusionEditor:
    """Return the embedded editor as one that predicts eps, with weights of a dtype."""
    embedded: Any = load_editor(EMBEDDED)
    for network in (embedded.unet, embedded.vae, embedded.text_encoder):
        for weights in network.parameters():
            weights.mul_(1 + 2**-12)  # no float16 numbers
        nn.Module.to(network, dtype)
    unet = EpsNetwork(embedded.unet, embedded.alphas_cumprod)
    return replace(embedded, name=f"eps-{dtype}", unet=unet, prediction_type="epsilon")
