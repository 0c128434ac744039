"""InstructPix2Pix on Stable Diffusion: the networks and noise schedule behind the `Editor` protocol, and their loader.

Safety checker (1.2 GB in the original repository) and feature extractor are not loaded. An editor is not a torch module on
purpose: a pipeline that holds one neither saves nor moves its networks.
"""

import json
import math
import unicodedata
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from wys_nerfstudio.editing.editor import (
    Branch,
    EditDefaults,
    EditorProfile,
    ImageEncoding,
    NoiseLevel,
    Predictor,
    size_in_cells,
)
from wys_nerfstudio.editing.parts import check_computes, load_network, load_text_encoder, loading_errors, read_json
from wys_nerfstudio.editing.precision import apply_vae, in_float32, without_tf32
from wys_nerfstudio.utils.errors import WysError

NETWORKS = ("unet", "vae", "text_encoder")
"""Parts with weights."""

PARTS = (*NETWORKS, "tokenizer", "scheduler")
"""Folders of a repository that are loaded."""

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""diffusers' schedulers over a discrete beta schedule. Their betas are read; sampling is this package's own."""

PREDICTION_TYPES = ("epsilon", "v_prediction")
"""Supported meanings of the UNet's output."""

MAX_TIMESTEPS = 100_000
"""Largest number of timesteps of a noise schedule."""

PROFILE = EditorProfile(
    of_images=EditDefaults(  # supplement D
        guidance_scale=7.5, image_guidance_scale=0.8, diffusion_steps=100, solver_order=1, relevance_noise_level=0.8
    ),
    of_scenes=EditDefaults(  # no worse than 20 DDIM steps on known edits: tests/benchmarks/sampler.py
        guidance_scale=7.5, image_guidance_scale=1.5, diffusion_steps=8, solver_order=2, relevance_noise_level=0.8
    ),
    half_precision="float16",  # the rounding noise of bfloat16 is eight times as large, and guidance amplifies it
    relevance_batch_size=8,
)
"""Defaults of InstructPix2Pix: the paper's."""


@dataclass
class StableDiffusionEditor:
    """Networks and noise schedule of an InstructPix2Pix checkpoint. Implements `Editor`."""

    name: str
    """Hub id, folder or name of an embedded editor, as given by the user."""
    unet: Any
    """diffusers' UNet2DConditionModel, with twice the VAE's latent channels as input."""
    vae: Any
    """diffusers' AutoencoderKL."""
    text_encoder: Any
    """transformers' CLIPTextModel."""
    tokenizer: Any
    """transformers' CLIPTokenizer."""
    alphas_cumprod: Tensor
    """Cumulative products of the noise schedule, float32, one per training timestep."""
    final_alpha: Tensor
    """Cumulative product after the last step: 1, or that of timestep 0 (diffusers' `set_alpha_to_one`)."""
    prediction_type: str
    """One of PREDICTION_TYPES."""
    profile: EditorProfile = field(default=PROFILE, init=False, repr=False)
    """Its defaults, and which guidance it has."""
    _texts: "dict[str, Tensor]" = field(default_factory=dict, init=False, repr=False)
    """Text states by instruction; a run needs the same two in every edit."""
    _levels: "list[NoiseLevel]" = field(init=False, repr=False)
    """Noise level of each timestep, and the final one."""
    overflow_reported: bool = field(default=False, init=False, repr=False)
    """Whether the overflow of the VAE in half precision has been logged."""

    def __post_init__(self) -> None:
        # On the CPU once: reading a number from a GPU at every step would wait for it.
        alphas = torch.cat([self.alphas_cumprod, self.final_alpha.reshape(1)]).cpu()
        times = [*range(len(self.alphas_cumprod)), 0]
        pairs = zip(alphas.sqrt().tolist(), (1 - alphas).sqrt().tolist(), times)
        self._levels = [NoiseLevel(signal, noise, time) for signal, noise, time in pairs]

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self._weight.device

    @property
    def network(self) -> torch.nn.Module:
        """The network of the predictions."""
        return self.unet

    @property
    def _weight(self) -> Tensor:
        # The first weight has the network's device and dtype; diffusers' own properties iterate over all weights.
        return next(self.unet.parameters())

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps of the diffusion."""
        return len(self.alphas_cumprod)

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Longer side, in pixels, of the images that the editor was trained on."""
        size = self.unet.config.sample_size
        return self.latent_factor * (size if isinstance(size, int) else max(size))

    def editing_size(self, height: int, width: int, resolution: Optional[int]) -> tuple[int, int]:
        """Height and width at which an image is edited; diffusers' UNet takes latents of any size.

        Args:
            height: Of the image, in pixels.
            width: Of the image, in pixels.
            resolution: Longer side at which it is edited, in pixels; None is that of the training images.
        """
        return size_in_cells(height, width, resolution or self.native_resolution, self.latent_factor)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of images of an editing size."""
        return height // self.latent_factor, width // self.latent_factor

    # -------------------------------------------------------------------------------------------------------- precision

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Context in which UNet and VAE compute in float32: 3.8 GB of weights instead of 1.9 in half precision.

        Text states keep the text encoder's precision: their rounding changes the difference between two texts in
        proportion to that difference.
        """
        with torch.compiler.set_stance("force_eager"), without_tf32(), in_float32(self.unet, self.vae):
            yield

    # ------------------------------------------------------------------------------------------------------------- text

    @torch.no_grad()
    def encode_text(self, instruction: str) -> Float[Tensor, "1 tokens width"]:
        """Text encoder states of an instruction; the empty string is guidance's empty instruction.

        Raises:
            WysError: If the instruction is too long for the text encoder, or has words outside its vocabulary.
        """
        if instruction not in self._texts:
            self._texts[instruction] = self._encode_text(instruction)
        return self._texts[instruction]

    def _encode_text(self, instruction: str) -> Tensor:
        return self.text_encoder(self._tokens(instruction, self.tokenizer))[0]

    def _tokens(self, instruction: str, tokenizer: Any) -> Tensor:
        # CLIP's own tokenizer splits unseen words into letters, and its unknown token is the end-of-text token.
        unknown = tokenizer.unk_token_id
        whole_words = unknown is not None and unknown not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
        text = known_punctuation(instruction, tokenizer.get_vocab()) if whole_words else instruction
        limit = tokenizer.model_max_length
        count = len(tokenizer(text).input_ids)
        if count > limit:
            raise WysError(
                f'The instruction has {count} tokens, but the text encoder of "{self.name}" takes at most {limit}: '
                "shorten it."
            )
        ids = tokenizer(text, padding="max_length", max_length=limit, return_tensors="pt").input_ids
        if whole_words:
            self._check_words(instruction, ids[0].tolist(), tokenizer)
        return ids.to(self.device)

    def _check_words(self, instruction: str, ids: list[int], tokenizer: Any) -> None:
        # A whole-word tokenizer also has the pieces that its words are merged from; the editor was not trained on these.
        ordinary = [token for token in ids if token not in tokenizer.all_special_ids]
        whole = all(token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(ordinary))
        if whole and tokenizer.unk_token_id not in ids:
            return
        ends = {w.removesuffix("</w>") for w in tokenizer.get_vocab() if w.endswith("</w>")}
        known = sorted(word for word in ends if word.isalpha() and (len(word) > 1 or word == "a"))
        raise WysError(
            f'"{instruction}" has words that the editor "{self.name}" was not trained on; its words are: {", ".join(known)}. '
            "For free text choose another editor, for example --editor timbrooks/instruct-pix2pix."
        )

    # ----------------------------------------------------------------------------------------------------------- images

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b h w 3"]) -> ImageEncoding:
        """Mode of the VAE, float32: scaled as clean latents, unscaled as the UNet's image condition."""
        pixels = images.permute(0, 3, 1, 2).to(self.device) * 2 - 1
        mode = apply_vae(self, lambda x: self.vae.encode(x).latent_dist.mode(), pixels)
        return ImageEncoding(mode * self.vae.config.scaling_factor, mode)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Decode clean latents to images, float32 in [0, 1]."""
        unscaled = latents.to(self.device) / self.vae.config.scaling_factor
        pixels = apply_vae(self, lambda x: self.vae.decode(x).sample, unscaled)
        return (pixels.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------------------ noise levels

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """The level at a share of the diffusion, in (0, 1); never one without signal, where all predictions are equal.

        Args:
            strength: Share of the diffusion.
            size: Unused: the levels are the same for all sizes.
        """
        last = self.num_train_timesteps - (2 if self._levels[-2].signal == 0 else 1)
        return self._levels[min(round(strength * self.num_train_timesteps), last)]

    def noise_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> list[NoiseLevel]:
        """Strictly descending levels of a denoising run; the last is the final, clean level.

        Args:
            strength: First level, as a share of the diffusion in [0, 1]; 1 is the last timestep.
            num_steps: Steps of a run from the last timestep; a run from less noise takes its share of them.
            size: Unused: the levels are the same for all sizes.

        Raises:
            WysError: If there are fewer levels than steps.
        """
        most = self.num_train_timesteps - 1
        if num_steps > most:
            raise WysError(
                f'The editor "{self.name}" has {most} noise levels: --diffusion-steps (of ns-train, '
                f"--pipeline.diffusion-steps) must be at most {most}, not {num_steps}."
            )
        start = max(1, round(strength * (self.num_train_timesteps - 1)))
        steps = timesteps(start, num_steps, self.num_train_timesteps)
        return [*(self._levels[timestep] for timestep in steps), self._levels[-1]]

    # ------------------------------------------------------------------------------------------------------- predictions

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        """InstructPix2Pix's three branches: text and image, image, none."""
        return [
            Branch(text=True, image=True, scale=guidance_scale),
            Branch(text=False, image=True, scale=image_guidance_scale),
            Branch(text=False, image=False, scale=1.0),
        ]

    def predictor(self, condition: Float[Tensor, "b c h w"], instruction: str, branches: Sequence[Branch]) -> Predictor:
        """Bind the conditions of a batch of images; all branches are one UNet call per step.

        Args:
            condition: `ImageEncoding.condition` of the images.
            instruction: What to change.
            branches: Branches that are computed.
        """
        count = len(branches)
        states = torch.cat([self.encode_text(instruction if branch.text else "") for branch in branches])
        text = states.repeat_interleave(len(condition), dim=0)
        no_image = torch.zeros_like(condition)
        conditions = torch.cat([condition if branch.image else no_image for branch in branches])

        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            return self.predict(latents.repeat(count, 1, 1, 1), level, conditions, text).chunk(count)

        return predict

    @torch.no_grad()
    def predict(
        self,
        latents: Float[Tensor, "b c h w"],
        level: NoiseLevel,
        condition: Float[Tensor, "b c h w"],
        text: Float[Tensor, "b tokens width"],
    ) -> Float[Tensor, "b c h w"]:
        """The UNet's prediction, without guidance: noise or v, see `split`.

        Args:
            latents: Noisy latents.
            level: Their noise level.
            condition: Unscaled image condition; zeros for "no image".
            text: Text states; those of "" for "no text".

        Returns:
            Prediction, float32.
        """
        inputs = torch.cat([latents, condition], dim=1).to(self._weight.dtype)
        # A tensor, not a number: diffusers would copy a number to the device in every call.
        timestep = torch.full((len(inputs),), int(level.time), device=inputs.device)
        prediction = self._predict(inputs, timestep, text.to(self._weight.dtype))
        return prediction.to(torch.float32, copy=True)  # the next call of a CUDA graph overwrites its output

    def _predict(self, inputs: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(inputs, timestep, encoder_hidden_states=text).sample

    def split(
        self, prediction: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], level: NoiseLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Split noisy latents into clean latents and the predicted noise; a v-prediction also does without any signal."""
        if self.prediction_type == "v_prediction":
            return (
                level.signal * latents - level.noise * prediction,
                level.signal * prediction + level.noise * latents,
            )
        return (latents - level.noise * prediction) / level.signal, prediction


def known_punctuation(text: str, vocabulary: Container[str]) -> str:
    """Reduce each run of punctuation to its first mark in a vocabulary of whole words, or to a space if there is none.

    Args:
        text: An instruction; apostrophes within words are kept.
        vocabulary: Tokens of a tokenizer; words end with "</w>".
    """

    def is_mark(i: int) -> bool:
        within_word = text[i] == "'" and text[i - 1 : i].isalpha() and text[i + 1 : i + 2].isalpha()
        return unicodedata.category(text[i]).startswith("P") and not within_word

    parts = [(marks, "".join(text[i] for i in group)) for marks, group in groupby(range(len(text)), is_mark)]
    return "".join(
        next((mark for mark in part if f"{mark}</w>" in vocabulary), " ") if marks else part for marks, part in parts
    )


def timesteps(start: int, full_steps: int, num_train_timesteps: int) -> list[int]:
    """Timesteps of a denoising run, largest first, evenly spaced from `start` down to (but without) 0.

    The number of steps is proportional to the noise: `full_steps` from the last timestep, half of them from half way,
    always at least one.

    Args:
        start: First timestep, in [1, num_train_timesteps).
        full_steps: Steps of a run from the last timestep, at least 1.
        num_train_timesteps: Number of timesteps of the diffusion, usually 1000.

    Returns:
        Strictly decreasing timesteps; the first is `start`, all are at least 1.

    Raises:
        ValueError: If `start` or `full_steps` is out of range.
    """
    if not 1 <= start < num_train_timesteps:
        raise ValueError(f"the first timestep must be in [1, {num_train_timesteps - 1}], not {start}")
    if full_steps < 1:
        raise ValueError(f"the number of diffusion steps must be at least 1, not {full_steps}")
    count = min(start, max(1, round(full_steps * start / (num_train_timesteps - 1))))
    return [start - (i * start) // count for i in range(count)]


# ------------------------------------------------------------------------------------------------------------------ loading


def profile(index: "dict[str, Any]") -> EditorProfile:
    """What is known of an editor from its model_index.json."""
    return PROFILE


def load(
    name: str, source: str, device: "str | torch.device", dtype: torch.dtype, use_safetensors: Optional[bool]
) -> StableDiffusionEditor:
    """Load the parts of a Stable Diffusion InstructPix2Pix.

    Args:
        name: The editor's name, for errors.
        source: Folder or hub id of its parts.
        device: Device of the networks.
        dtype: Precision of the networks.
        use_safetensors: Passed to diffusers and transformers.

    Raises:
        WysError: If a part cannot be loaded or is not supported.
    """
    editor = load_common_parts(name, source, device, dtype, use_safetensors)
    kind = editor.unet.config.addition_embed_type
    if kind is not None:
        raise WysError(
            f'The UNet of the editor "{name}" has conditions other than text ({kind}), which is not supported: give '
            "--editor an InstructPix2Pix of Stable Diffusion, or of SDXL with its model_index.json."
        )
    check_computes(editor, source, "unet")
    return editor


def load_common_parts(
    name: str, source: str, device: "str | torch.device", dtype: torch.dtype, use_safetensors: Optional[bool]
) -> StableDiffusionEditor:
    """Load and check the parts that Stable Diffusion and SDXL have in common; arguments as in `load`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    with loading_errors(name, source):
        scheduler = load_scheduler(name, source)
        weights: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": use_safetensors}
        unet = load_network(name, source, "unet", UNet2DConditionModel, **weights)
        vae = load_network(name, source, "vae", AutoencoderKL, **weights)
        text_encoder = load_text_encoder(name, source, "text_encoder", CLIPTextModel, dtype, use_safetensors)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        check_networks(name, unet, vae, text_encoder, tokenizer)
        vae.enable_slicing()  # image by image: in float32, eight of 512x512 pixels would take 5 GB
        for network in (unet, vae, text_encoder):
            network.to(device).eval().requires_grad_(False)
        return StableDiffusionEditor(
            name=name,
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            alphas_cumprod=scheduler.alphas_cumprod.float().to(device),
            final_alpha=getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).float().to(device),
            prediction_type=scheduler.config["prediction_type"],
        )


def load_scheduler(name: str, source: str) -> Any:
    """Load the scheduler and check its noise levels.

    Args:
        name: The editor's name.
        source: Folder or hub id of its parts.

    Raises:
        WysError: If it is not supported, or its noise levels are not those of a diffusion.
    """
    import diffusers

    config = read_json(source, "scheduler/scheduler_config.json") or {}
    check_scheduler(name, config)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    alphas = scheduler.alphas_cumprod
    if not (alphas.isfinite().all() and (alphas.diff() < 0).all() and alphas[0] < 1 and alphas[-1] >= 0):
        raise WysError(
            f'The noise schedule of the editor "{name}" does not decrease from 1 to 0: check beta_start, beta_end, '
            "beta_schedule and trained_betas in its scheduler_config.json."
        )
    if config.get("rescale_betas_zero_snr") and scheduler.config["prediction_type"] == "epsilon":
        raise WysError(
            f'The editor "{name}" predicts noise, but its last timestep has no signal (rescale_betas_zero_snr in its '
            "scheduler_config.json), where noise predictions determine no image. Supported with it: v_prediction."
        )
    return scheduler


def check_scheduler(name: str, config: "dict[str, Any]") -> None:
    """Refuse schedulers whose noise levels are not those of a discrete beta schedule.

    Args:
        name: The editor's name.
        config: The repository's scheduler_config.json.

    Raises:
        WysError: If the class, its betas, its timesteps or its prediction type is not supported.
    """
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise WysError(
            f'The editor "{name}" uses {kind or "an unnamed scheduler"}, which is not supported. Supported: '
            f"{', '.join(SCHEDULERS)}."
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise WysError(
            f'The editor "{name}" uses {kind} with {config["timestep_type"]} timesteps, which is not supported. Supported: '
            "discrete."
        )
    if config.get("use_flow_sigmas"):
        raise WysError(f'The editor "{name}" uses {kind} with flow matching (use_flow_sigmas), which is not supported.')
    needed = ["beta_start", "beta_end", "beta_schedule"] if config.get("trained_betas") is None else []
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise WysError(
            f'The scheduler_config.json of the editor "{name}" has no {missing[0]}: its noise schedule is unknown.'
        )
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 2 <= count <= MAX_TIMESTEPS:
        raise WysError(
            f'The scheduler_config.json of the editor "{name}" has {json.dumps(count)} as num_train_timesteps: supported are '
            f"2 to {MAX_TIMESTEPS}."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise WysError(
            f'The editor "{name}" has the prediction type {prediction_type}, which is not supported. Supported: '
            f"{', '.join(PREDICTION_TYPES)}."
        )


def check_networks(name: str, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Refuse a UNet that takes no image condition, and a tokenizer that does not fit its text encoder.

    Raises:
        WysError: If the parts are not those of an InstructPix2Pix.
    """
    channels, wanted = unet.config.in_channels, 2 * vae.config.latent_channels
    if channels != wanted:
        raise WysError(
            f'The editor "{name}" is not an InstructPix2Pix checkpoint: its UNet takes {channels} input channels, not '
            f"{wanted}. Give --editor one that was trained on instructions, such as timbrooks/instruct-pix2pix."
        )
    # transformers builds a tokenizer from an empty folder, too: one without words and without a limit.
    text = text_encoder.config
    if tokenizer.model_max_length > text.max_position_embeddings or len(tokenizer) < text.vocab_size:
        raise WysError(
            f'The tokenizer of the editor "{name}" is incomplete: it has {len(tokenizer)} tokens, and the text encoder '
            f"{text.vocab_size}. Download it again."
        )
    factor = vae.config.scaling_factor
    if not _is_positive(factor):
        raise WysError(
            f'The VAE of the editor "{name}" has the scaling_factor {json.dumps(factor)}, not a positive number. Download it '
            "again."
        )
    size = unet.config.sample_size
    if not all(map(_is_positive, size if isinstance(size, (list, tuple)) else [size])):
        raise WysError(
            f'The UNet of the editor "{name}" has the sample_size {json.dumps(size)}, not a positive number. Download it again.'
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
