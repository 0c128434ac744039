"""FLUX.2 klein, a flow-matching editor: the networks and noise levels behind the `Editor` protocol, and their loader.

Follows diffusers' Flux2KleinPipeline, whose repositories it loads: the transformer predicts the velocity from the noisy latents'
tokens, the reference's tokens and the text's. Base models are guided against the empty instruction; distilled ones run without
guidance, in a few steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from wys_nerfstudio.editing.editor import (
    Branch,
    EditorProfile,
    NoiseLevel,
    Predictor,
)
from wys_nerfstudio.editing.flow_matching import (
    NETWORKS,
    FlowMatchingEditor,
    check_diffusers,
    edit_defaults,
    flow_level,
    load_parts,
)
from wys_nerfstudio.editing.parts import (
    INDEX,
    check_computes,
    loading_errors,
    read_json,
)
from wys_nerfstudio.utils.errors import WysError

PARTS = (*NETWORKS, "tokenizer", "scheduler")
"""Folders of a repository that are loaded."""

MAX_TOKENS = 512
"""Tokens of a text, including padding."""

REFERENCE_TIME = 10
"""Position of the reference's tokens on the time axis; the noisy tokens are at 0."""

DISTILLED_STEPS = 4
"""Steps of a distilled model, which knows only the levels of these."""


@dataclass
class Flux2Editor(FlowMatchingEditor):
    """Networks and noise levels of a FLUX.2 klein. Implements `Editor`. The text encoder, as large as the transformer, is on
    the CPU except while a text is encoded."""

    tokenizer: Any
    """Its tokenizer, with a chat template."""
    _texts: "dict[str, Tensor]" = field(default_factory=dict, init=False, repr=False)
    """Text states by instruction."""

    def __post_init__(self) -> None:
        # Per editor, and forgotten with it.
        self._levels = lru_cache(maxsize=None)(self._compute_levels)
        self._image_ids = lru_cache(maxsize=8)(self._compute_image_ids)

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one side: those of the VAE's latents, of which 2x2 are one."""
        return 2 ** len(self.vae.config.block_out_channels)

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
        self.check_length(count, limit)
        tokens = self.tokenizer(text, padding="max_length", max_length=limit, return_tensors="pt")
        self._check_words(instruction, tokens.input_ids[0].tolist())
        with self._text_encoder_on_device() as device:
            hidden = self.text_encoder(
                input_ids=tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device),
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
    def _text_encoder_on_device(self) -> Iterator[torch.device]:
        """Context in which the text encoder takes the transformer's place on the GPU; together they would need 16 GB."""
        device = self.device
        if device.type == "cpu":
            yield device
            return
        self.transformer.to("cpu")
        try:
            self.text_encoder.to(device)
            yield device
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

    # ------------------------------------------------------------------------------------------------------ noise levels

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """The level whose share of noise is `strength`; of a distilled model the nearest of those that it was trained on.

        Args:
            strength: Share of noise in the latents, s.
            size: Height and width of the latents.
        """
        if self.profile.has_guidance:
            return flow_level(strength)
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
        return tuple(map(flow_level, self.scheduler.sigmas.tolist()))

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
        count, text = len(branches), self._text_rows(instruction, branches, len(condition))
        reference = condition.repeat(count, 1, 1, 1)
        image_ids, text_ids = self._positions(condition, text)

        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            noisy = latents.repeat(count, 1, 1, 1)
            return self._velocity(noisy, reference, text, level, img_ids=image_ids, txt_ids=text_ids).chunk(count)

        return predict

    def _text_rows(
        self, instruction: str, branches: Sequence[Branch], images: int
    ) -> Float[Tensor, "branches_images tokens width"]:
        """Text states of each branch for each of a number of images."""
        states = torch.cat([self.encode_text(instruction if branch.text else "") for branch in branches])
        return states.to(self.device).repeat_interleave(images, dim=0)

    def _positions(
        self, condition: Float[Tensor, "b c h w"], text: Float[Tensor, "rows tokens width"]
    ) -> tuple[Int[Tensor, "image_tokens 4"], Int[Tensor, "text_tokens 4"]]:
        """Positions of the tokens of noisy latents and reference, and of the text."""
        text_ids = torch.zeros(text.shape[1], 4, dtype=torch.long, device=self.device)
        text_ids[:, 3] = torch.arange(text.shape[1])
        return self._image_ids(condition.shape[2], condition.shape[3]).to(self.device), text_ids

    @staticmethod
    def _compute_image_ids(height: int, width: int) -> Int[Tensor, "tokens 4"]:
        """Positions (time, row, column, 0) of the noisy tokens, then of the reference's."""
        times = torch.tensor([0, REFERENCE_TIME])
        return torch.cartesian_prod(times, torch.arange(height), torch.arange(width), torch.zeros(1, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------------------ loading


def profile(index: "dict[str, Any]") -> EditorProfile:
    """What is known of an editor from its model_index.json."""
    distilled = bool(index.get("is_distilled"))
    scale, steps_of_image, steps_of_view = (1.0, DISTILLED_STEPS, DISTILLED_STEPS) if distilled else (4.0, 50, 20)
    return EditorProfile(
        of_images=edit_defaults(scale, steps_of_image),
        of_scenes=edit_defaults(scale, steps_of_view),
        relevance_batch_size=1,  # a map of a megapixel takes 5 GB beside the networks
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
    check_diffusers(name, "FLUX.2 klein")
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    with loading_errors(name, source):
        kinds = (Flux2Transformer2DModel, AutoencoderKLFlux2, Qwen3ForCausalLM)
        parts = load_parts(name, source, kinds, dtype, use_safetensors)
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        check_networks(name, parts["transformer"], parts["vae"], parts["text_encoder"], tokenizer)
        for part in ("transformer", "vae"):
            parts[part].to(device)
        editor = Flux2Editor(
            name=name,
            profile=profile(read_json(source, INDEX) or {}),
            tokenizer=tokenizer,
            **parts,
        )
    check_computes(editor, source, "transformer")
    return editor


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
