"""FLUX.2 klein, a flow-matching editor: the networks and noise levels behind the `Editor` protocol, and their loader.

Follows diffusers' Flux2KleinPipeline, whose repositories it loads: x_s = (1 - s) x_0 + s eps, and the transformer predicts
v = eps - x_0 from the noisy latents' tokens, the reference's tokens and the text's. Base models are guided against the empty
instruction; distilled ones run without guidance, in a few steps. Latents are (b, c, h, w) outside `Flux2Editor.predictor`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio import relevance
from wys_nerfstudio.editing.editor import (
    Branch,
    EditDefaults,
    EditorProfile,
    ImageEncoding,
    NoiseLevel,
    Predictor,
    size_in_cells,
)
from wys_nerfstudio.editing.flux2_cache import KeyValueCache
from wys_nerfstudio.editing.parts import (
    INDEX,
    check_computes,
    load_network,
    load_text_encoder,
    loading_errors,
    read_json,
)
from wys_nerfstudio.editing.precision import apply_vae, in_float32, in_float32_by_layer, without_tf32
from wys_nerfstudio.utils.errors import WysError

NETWORKS = ("transformer", "vae", "text_encoder")
"""Parts with weights."""

PARTS = (*NETWORKS, "tokenizer", "scheduler")
"""Folders of a repository that are loaded."""

MAX_PIXELS = 1024 * 1024
"""Pixels of the largest images that the models were trained on."""

MIN_SIDE = 64
"""Smallest side of an edited image, in pixels."""

MAX_TOKENS = 512
"""Tokens of a text, including padding."""

REFERENCE_TIME = 10
"""Position of the reference's tokens on the time axis; the noisy tokens are at 0."""

RELEVANCE_NOISE_LEVEL = 0.84
"""The noise of the paper's relevance maps: t_rel = 0.8 of Stable Diffusion (alphas_cumprod 0.037) has the signal-to-noise ratio of
s = 0.84."""

DISTILLED_STEPS = 4
"""Steps of a distilled model, which knows only the levels of these."""


@dataclass
class Flux2Editor:
    """Networks and noise levels of a FLUX.2 klein. Implements `RegionEditor`."""

    name: str
    """Hub id or folder, as given by the user."""
    profile: EditorProfile
    """Its defaults, and which guidance it has."""
    transformer: Any
    """diffusers' Flux2Transformer2DModel."""
    vae: Any
    """diffusers' AutoencoderKLFlux2."""
    text_encoder: Any
    """transformers' Qwen3ForCausalLM. On the CPU except while a text is encoded: it is as large as the transformer."""
    tokenizer: Any
    """Its tokenizer, with a chat template."""
    scheduler: Any
    """diffusers' FlowMatchEulerDiscreteScheduler, for the noise levels."""
    _in_full_precision: bool = field(default=False, init=False, repr=False)
    """Whether predictions are computed in float32."""
    _texts: "dict[str, Tensor]" = field(default_factory=dict, init=False, repr=False)
    """Text states by instruction."""
    overflow_reported: bool = field(default=False, init=False, repr=False)
    """Whether the overflow of the VAE in half precision has been logged."""

    def __post_init__(self) -> None:
        # Per editor, and forgotten with it.
        self._levels = lru_cache(maxsize=None)(self._compute_levels)
        self._image_ids = lru_cache(maxsize=8)(self._compute_image_ids)

    @property
    def device(self) -> torch.device:
        """Device of transformer and VAE."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        return next(self.transformer.parameters())

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one side: those of the VAE's latents, of which 2x2 are one."""
        return 2 ** len(self.vae.config.block_out_channels)

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

    # ------------------------------------------------------------------------------------------------------------- text

    @torch.no_grad()
    def encode_text(self, instruction: str) -> Float[Tensor, "1 tokens width"]:
        """Text states of an instruction, with those of the padding; the empty string is guidance's empty instruction.

        Raises:
            WysError: If the instruction is too long, or has words outside the tokenizer's vocabulary.
        """
        if instruction not in self._texts:
            self._texts[instruction] = self._encode_text(instruction)
        return self._texts[instruction]

    def _encode_text(self, instruction: str) -> Tensor:
        limit = min(MAX_TOKENS, self.tokenizer.model_max_length)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        count = len(self.tokenizer(text).input_ids)
        if count > limit:
            raise WysError(
                f'The instruction has {count} tokens, but the text encoder of "{self.name}" takes at most {limit}: '
                "shorten it."
            )
        tokens = self.tokenizer(text, padding="max_length", max_length=limit, return_tensors="pt")
        self._check_words(instruction, tokens.input_ids[0].tolist())
        with self._text_encoder_on_device():
            hidden = self.text_encoder(
                input_ids=tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        # klein's three are a quarter, half and three quarters of the way through 36 layers.
        layers = self.text_encoder.config.num_hidden_layers
        parts = self.transformer.config.joint_attention_dim // self.text_encoder.config.hidden_size
        return torch.cat([hidden[layers * (i + 1) // (parts + 1)] for i in range(parts)], dim=-1)

    def _check_words(self, instruction: str, ids: list[int]) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown in (None, self.tokenizer.pad_token_id) or unknown not in ids:
            return
        words = sorted(word for word in self.tokenizer.get_vocab() if word.isalpha() and (len(word) > 1 or word == "a"))
        raise WysError(
            f'"{instruction}" has words that the editor "{self.name}" was not trained on; its words are: {", ".join(words)}. '
            "For free text choose another editor, for example --editor black-forest-labs/FLUX.2-klein-4B."
        )

    @contextmanager
    def _text_encoder_on_device(self) -> Iterator[None]:
        """Context in which the text encoder takes the transformer's place on the GPU; together they would need 16 GB."""
        device = self.device
        if device.type == "cpu":
            yield
            return
        self.transformer.to("cpu")
        try:
            self.text_encoder.to(device)
            yield
        finally:
            self.text_encoder.to("cpu")
            self.transformer.to(device)

    # ----------------------------------------------------------------------------------------------------------- images

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (1, c, 1, 1)."""
        normalization = self.vae.bn
        mean, variance = normalization.running_mean, normalization.running_var
        std = torch.sqrt(variance.float() + self.vae.config.batch_norm_eps)
        return mean.float().view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b h w 3"]) -> ImageEncoding:
        """Mode of the VAE in blocks of 2x2, normalized, float32; the reference that edits are conditioned on is the same."""
        pixels = images.permute(0, 3, 1, 2).to(self.device) * 2 - 1
        mode = apply_vae(self, lambda x: self.vae.encode(x).latent_dist.mode(), pixels)
        mean, std = self._statistics()
        latents = (F.pixel_unshuffle(mode, 2) - mean) / std
        return ImageEncoding(latents, latents)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Decode clean latents to images, float32 in [0, 1]."""
        mean, std = self._statistics()
        unpacked = F.pixel_shuffle(latents.to(self.device) * std + mean, 2)
        pixels = apply_vae(self, lambda x: self.vae.decode(x).sample, unpacked)
        return (pixels.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------------------ noise levels

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """The level whose share of noise is `strength`; of a distilled model the nearest of those that it was trained on.

        Args:
            strength: Share of noise in the latents, s.
            size: Height and width of the latents.
        """
        if self.profile.has_guidance:
            return _level(strength)
        own = self._levels(1.0, DISTILLED_STEPS, size)
        return min(own[1:-1], key=lambda level: abs(level.noise - strength))

    def noise_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> list[NoiseLevel]:
        """Strictly descending levels of a denoising run; the last is the final, clean level.

        The levels of a whole run are the scheduler's, shifted towards noise for large images and few steps. A run of less
        strength is its last part, as in diffusers' image-to-image pipelines. A base model takes any level, so it starts
        exactly there; a distilled model knows only its own levels, and starts at one of these.

        Args:
            strength: Share of a whole run's steps; 1 is pure noise.
            num_steps: Steps of a whole run.
            size: Height and width of the latents.
        """
        return list(self._levels(strength, num_steps, size))

    def _compute_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> tuple[NoiseLevel, ...]:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        count = max(1, round(strength * num_steps))
        first = strength if self.profile.has_guidance else count / num_steps
        shift = compute_empirical_mu(image_seq_len=size[0] * size[1], num_steps=num_steps)
        self.scheduler.set_timesteps(sigmas=np.linspace(first, first / count, count).tolist(), mu=shift)
        return tuple(map(_level, self.scheduler.sigmas.tolist()))

    # ------------------------------------------------------------------------------------------------------- predictions

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        """With and without text, each with the image; of a distilled model, with text only."""
        with_text = Branch(text=True, image=True, scale=guidance_scale)
        return [with_text, Branch(text=False, image=True, scale=1.0)] if self.profile.has_guidance else [with_text]

    def predictor(self, condition: Float[Tensor, "b c h w"], instruction: str, branches: Sequence[Branch]) -> Predictor:
        """Bind the conditions of a batch of images; all branches are one call of the transformer per step.

        Args:
            condition: `ImageEncoding.condition` of the images, the reference's latents.
            instruction: What to change.
            branches: Branches that are computed.
        """
        count, (height, width) = len(branches), condition.shape[2:]
        text = self._text_rows(instruction, branches, len(condition))
        reference = _pack(condition).repeat(count, 1, 1)
        image_ids = self._image_ids(height, width).to(self.device)

        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            tokens = torch.cat([_pack(latents).repeat(count, 1, 1), reference], dim=1)
            velocity = self._velocity(tokens, image_ids, text, level)
            return _unpack(velocity[:, : height * width], height, width).chunk(count)

        return predict

    def region_predictor(
        self,
        condition: Float[Tensor, "b c h w"],
        instruction: str,
        branches: Sequence[Branch],
        region: Bool[Tensor, "b h w"],
        full_pass_every: int,
    ) -> Predictor:
        """Bind the conditions of a batch of images, of which most steps predict a region only; see `RegionEditor`.

        A step computes the noisy tokens in and next to the region. The other tokens have the keys and values of the last
        step that computed all. Image by image, because regions differ in size.
        """
        count, (height, width) = len(branches), condition.shape[2:]
        predict_all = self.predictor(condition, instruction, branches)
        text = self._text_rows(instruction, branches, 1)
        image_ids = self._image_ids(height, width).to(self.device)
        inside = relevance.dilate(region).flatten(1)
        # Tokens are numbered as in a pass: text, noisy, reference.
        cached = torch.ones(len(region), text.shape[1] + len(image_ids), dtype=torch.bool, device=region.device)
        cached[:, text.shape[1] : text.shape[1] + height * width] = ~inside
        tokens = [(torch.nonzero(x)[:, 0], torch.nonzero(y)[:, 0]) for x, y in zip(inside, cached)]
        cache, steps = KeyValueCache(), itertools.count()

        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            if next(steps) % full_pass_every == 0:
                with cache.filled_by(self.transformer):
                    return predict_all(latents, level)
            noisy = _pack(latents)
            result = noisy.new_zeros(count, *noisy.shape)
            for i, (computed, others) in enumerate(tokens):
                with cache.completing(self.transformer, slice(i, None, len(noisy)), others):
                    rows = noisy[i, computed].expand(count, -1, -1)
                    result[:, i, computed] = self._velocity(rows, image_ids[computed], text[:, :0], level)
            return [_unpack(velocity, height, width) for velocity in result]

        return predict

    def _text_rows(
        self, instruction: str, branches: Sequence[Branch], images: int
    ) -> Float[Tensor, "branches_images tokens width"]:
        """Text states of each branch for each of a number of images."""
        states = torch.cat([self.encode_text(instruction if branch.text else "") for branch in branches])
        return states.to(self.device).repeat_interleave(images, dim=0)

    @torch.no_grad()
    def _velocity(
        self,
        tokens: Float[Tensor, "b image_tokens c"],
        image_ids: Int[Tensor, "image_tokens 4"],
        text: Float[Tensor, "b text_tokens width"],
        level: NoiseLevel,
    ) -> Float[Tensor, "b image_tokens c"]:
        """The transformer's prediction for image tokens, float32."""
        text_ids = torch.zeros(text.shape[1], 4, dtype=torch.long, device=self.device)
        text_ids[:, 3] = torch.arange(text.shape[1])
        dtype = torch.float32 if self._in_full_precision else self._weight.dtype
        return self.transformer(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=torch.full((len(tokens),), level.time, device=self.device),
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0].float()

    @staticmethod
    def _compute_image_ids(height: int, width: int) -> Int[Tensor, "tokens 4"]:
        """Positions (time, row, column, 0) of the noisy tokens, then of the reference's."""
        times = torch.tensor([0, REFERENCE_TIME])
        return torch.cartesian_prod(times, torch.arange(height), torch.arange(width), torch.zeros(1, dtype=torch.long))

    def split(
        self, prediction: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], level: NoiseLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Split noisy latents into clean latents and noise, given the velocity at their level."""
        return latents - level.noise * prediction, latents + level.signal * prediction


def _level(noise: float) -> NoiseLevel:
    return NoiseLevel(signal=1.0 - noise, noise=noise, time=noise)


def _pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens c"]:
    return latents.flatten(2).transpose(1, 2)


def _unpack(tokens: Float[Tensor, "b tokens c"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    return tokens.transpose(1, 2).unflatten(2, (height, width))


# ------------------------------------------------------------------------------------------------------------------ loading


def profile(index: "dict[str, Any]") -> EditorProfile:
    """What is known of an editor from its model_index.json."""
    distilled = bool(index.get("is_distilled"))
    scale, steps_of_image, steps_of_view = (1.0, DISTILLED_STEPS, DISTILLED_STEPS) if distilled else (4.0, 50, 20)

    def defaults(steps: int) -> EditDefaults:
        return EditDefaults(
            guidance_scale=scale,
            image_guidance_scale=1.0,
            diffusion_steps=steps,
            relevance_noise_level=RELEVANCE_NOISE_LEVEL,
        )

    return EditorProfile(
        of_images=defaults(steps_of_image),
        of_scenes=defaults(steps_of_view),
        half_precision="bfloat16",  # float16 overflows in large transformers of this kind
        has_guidance=not distilled,
        has_image_guidance=False,
    )


def load(
    name: str, source: str, device: "str | torch.device", dtype: torch.dtype, use_safetensors: Optional[bool]
) -> Flux2Editor:
    """Load the parts of a FLUX.2 klein; arguments as in `stable_diffusion.load`.

    Raises:
        WysError: If diffusers is too old, or a part cannot be loaded or is not supported.
    """
    import diffusers

    if not hasattr(diffusers, "Flux2KleinPipeline"):
        raise WysError(
            f'The editor "{name}" is a FLUX.2 klein, which diffusers {diffusers.__version__} does not have: '
            "pip install -U diffusers (0.37 or newer)."
        )
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    with loading_errors(name, source):
        scheduler = load_scheduler(name, source)
        weights: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": use_safetensors}
        transformer = load_network(name, source, "transformer", Flux2Transformer2DModel, **weights)
        vae = load_network(name, source, "vae", AutoencoderKLFlux2, **weights)
        text_encoder = load_text_encoder(name, source, "text_encoder", Qwen3ForCausalLM, dtype, use_safetensors)
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        check_networks(name, transformer, vae, text_encoder, tokenizer)
        vae.enable_slicing()  # image by image, as of Stable Diffusion
        for network in (transformer, vae, text_encoder):
            network.eval().requires_grad_(False)
        editor = Flux2Editor(
            name=name,
            profile=profile(read_json(source, INDEX) or {}),
            transformer=transformer.to(device),
            vae=vae.to(device),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
    check_computes(editor, source, "transformer")
    return editor


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


def check_networks(name: str, transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Refuse parts that do not fit together, before their first use fails.

    Raises:
        WysError: If the parts are not those of a FLUX.2 klein.
    """
    channels, wanted = transformer.config.in_channels, 4 * vae.config.latent_channels
    if channels != wanted:
        raise WysError(
            f'The transformer of the editor "{name}" takes {channels} channels, not the {wanted} of 2x2 latents of its VAE: '
            "download it again."
        )
    width, states = transformer.config.joint_attention_dim, text_encoder.config.hidden_size
    if width % states or not 0 < width // states < text_encoder.config.num_hidden_layers:
        raise WysError(
            f'The transformer of the editor "{name}" takes text states of width {width}, which layers of width {states} of its '
            "text encoder do not make: download it again."
        )
    if tokenizer.chat_template is None or len(tokenizer) < 2:
        raise WysError(
            f'The tokenizer of the editor "{name}" is incomplete, or has no chat template: download it again.'
        )
