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
from torch.nn import functional as F

from wys_nerfstudio.editing.editor import EditDefaults, EditorProfile, ImageEncoding, NoiseLevel, size_in_cells
from wys_nerfstudio.editing.parts import load_network, load_text_encoder, read_json
from wys_nerfstudio.editing.precision import apply_vae, in_float32, in_float32_by_layer, without_tf32
from wys_nerfstudio.utils.errors import WysError

NETWORKS = ("transformer", "vae", "text_encoder")
"""Parts with weights."""

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
    """Hub id, folder or name of an embedded editor, as given by the user."""
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
    def network(self) -> torch.nn.Module:
        """The network of the predictions."""
        return self.transformer

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
        return size_in_cells(height, width, int(max(resolution or own, least)), self.latent_factor)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of images of an editing size."""
        return height // self.latent_factor, width // self.latent_factor

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Context in which transformer and VAE compute in float32. The transformer's weights are cast layer by layer, because
        all of them would need twice the memory. Text states keep the text encoder's precision."""
        before = self._in_full_precision
        with (
            torch.compiler.set_stance("force_eager"),
            without_tf32(),
            in_float32(self.vae),
            in_float32_by_layer(self.transformer),
        ):
            self._in_full_precision = True
            try:
                yield
            finally:
                self._in_full_precision = before

    def check_length(self, count: int, limit: int) -> None:
        """Refuse an instruction of too many tokens.

        Args:
            count: Tokens of the instruction.
            limit: Tokens that the text encoder takes.

        Raises:
            WysError: If it is too long.
        """
        if count > limit:
            raise WysError(
                f'The instruction has {count} tokens, but the text encoder of "{self.name}" takes at most {limit}: '
                "shorten it."
            )

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (1, c, 1, 1)."""
        raise NotImplementedError

    def _vae_mode(self, pixels: Float[Tensor, "b 3 *frames h w"]) -> Float[Tensor, "b vae_c *frames vae_h vae_w"]:
        return self.vae.encode(pixels).latent_dist.mode()

    def _vae_decode(self, latents: Float[Tensor, "b vae_c *frames vae_h vae_w"]) -> Float[Tensor, "b 3 *frames h w"]:
        return self.vae.decode(latents).sample

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b h w 3"]) -> ImageEncoding:
        """Mode of the VAE in blocks of 2x2, normalized, float32; the reference that edits are conditioned on is the same."""
        mode = apply_vae(self, self._vae_mode, images.permute(0, 3, 1, 2).to(self.device) * 2 - 1)
        mean, std = self._statistics()
        latents = (F.pixel_unshuffle(mode, 2) - mean) / std
        return ImageEncoding(latents, latents)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Decode clean latents to images, float32 in [0, 1]."""
        mean, std = self._statistics()
        pixels = apply_vae(self, self._vae_decode, F.pixel_shuffle(latents.to(self.device) * std + mean, 2))
        return (pixels.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """The level whose share of noise is `strength`.

        Args:
            strength: Share of noise in the latents, s.
            size: Height and width of the latents.
        """
        return flow_level(strength)

    @torch.no_grad()
    def _velocity(
        self,
        latents: Float[Tensor, "b c h w"],
        reference: Float[Tensor, "b c h w"],
        text: Float[Tensor, "b text_tokens width"],
        level: NoiseLevel,
        **positions: Any,
    ) -> Float[Tensor, "b c h w"]:
        """Velocity of noisy latents, float32.

        Args:
            latents: Noisy latents.
            reference: Latents of the reference, whose tokens follow.
            text: The text's states.
            level: Level of the latents.
            **positions: The transformer's own arguments for the positions of the tokens.
        """
        velocity = self.transformer(
            hidden_states=torch.cat([pack(latents), pack(reference)], dim=1).to(self._dtype),
            encoder_hidden_states=text.to(self._dtype),
            timestep=torch.full((len(latents),), level.time, device=self.device),
            return_dict=False,
            **positions,
        )[0]
        velocity = velocity.to(torch.float32, copy=True)  # the next call of a CUDA graph overwrites its output
        return unpack(velocity[:, : latents[0, 0].numel()], *latents.shape[2:])

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


def unpack(tokens: Float[Tensor, "b tokens c"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Latents from their tokens."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def edit_defaults(guidance_scale: float, diffusion_steps: int) -> EditDefaults:
    """Defaults of an edit; there is no image guidance."""
    return EditDefaults(guidance_scale, 1.0, diffusion_steps, 1, RELEVANCE_NOISE_LEVEL)


# ------------------------------------------------------------------------------------------------------------------ loading


def check_diffusers(name: str, model: str) -> None:
    """Refuse a diffusers without the networks of these families, or with older arguments of them.

    Args:
        name: The editor's name.
        model: What it is.

    Raises:
        WysError: If diffusers is too old.
    """
    import diffusers

    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 37):
        raise WysError(
            f'The editor "{name}" is a {model}, which diffusers {diffusers.__version__} does not support: '
            "pip install -U diffusers (0.37 or newer)."
        )


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


def load_parts(
    name: str, source: str, kinds: "tuple[Any, Any, Any]", dtype: torch.dtype, use_safetensors: Optional[bool]
) -> "dict[str, Any]":
    """Load the networks, on the CPU, and the scheduler.

    Args:
        name: The editor's name.
        source: Folder or hub id of its parts.
        kinds: Classes of `NETWORKS`.
        dtype: Precision of the networks.
        use_safetensors: Passed to diffusers and transformers.

    Raises:
        WysError: If a part cannot be loaded or is not supported.
    """
    transformer, vae, text_encoder = kinds
    weights: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": use_safetensors}
    parts = {
        "scheduler": load_scheduler(name, source),
        "transformer": load_network(name, source, "transformer", transformer, **weights),
        "vae": load_network(name, source, "vae", vae, **weights),
        "text_encoder": load_text_encoder(name, source, "text_encoder", text_encoder, dtype, use_safetensors),
    }
    parts["vae"].enable_slicing()  # image by image, as of Stable Diffusion
    for network in NETWORKS:
        parts[network].eval().requires_grad_(False)
    return parts
