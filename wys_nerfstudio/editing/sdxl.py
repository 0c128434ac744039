"""InstructPix2Pix on Stable Diffusion XL: a second text encoder, and pooled text and image sizes as further conditions.

Follows diffusers' StableDiffusionXLInstructPix2PixPipeline, whose repositories it loads.
"""

from dataclasses import dataclass, fields
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.editing import stable_diffusion
from wys_nerfstudio.editing.parts import INDEX, check_computes, load_text_encoder, loading_errors, read_json
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor, load_common_parts
from wys_nerfstudio.utils.errors import WysError

NETWORKS = (*stable_diffusion.NETWORKS, "text_encoder_2")
"""Parts with weights."""

PARTS = (*stable_diffusion.PARTS, "text_encoder_2", "tokenizer_2")
"""Folders of a repository that are loaded."""

profile = stable_diffusion.profile


@dataclass
class SdxlEditor(StableDiffusionEditor):
    """An InstructPix2Pix of SDXL. Text states end with one more token, the second encoder's pooled state padded with zeros,
    so that the states of several texts are one tensor."""

    text_encoder_2: Any
    """transformers' CLIPTextModelWithProjection."""
    tokenizer_2: Any
    """Its CLIPTokenizer."""
    empty_text_is_zero: bool
    """Whether "no text" is zeros instead of the states of "" (diffusers' `force_zeros_for_empty_prompt`)."""

    def _encode_text(self, instruction: str) -> Tensor:
        ids = self._tokens(instruction, self.tokenizer)
        first = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(self._tokens(instruction, self.tokenizer_2), output_hidden_states=True)
        states = torch.cat([first, second.hidden_states[-2]], dim=-1)
        pooled = second.text_embeds[:, None]
        states = torch.cat([states, F.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))], dim=1)
        return torch.zeros_like(states) if self.empty_text_is_zero and not instruction else states

    def _predict(self, inputs: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        height, width = (side * self.latent_factor for side in inputs.shape[-2:])
        # Original size, corner of the crop, target size: the whole image at its own size.
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=inputs.device, dtype=inputs.dtype)
        added = {
            "text_embeds": text[:, -1, : self.text_encoder_2.config.projection_dim],
            "time_ids": sizes.expand(len(inputs), -1),
        }
        return self.unet(inputs, timestep, encoder_hidden_states=text[:, :-1], added_cond_kwargs=added).sample


def load(
    name: str, source: str, device: "str | torch.device", dtype: torch.dtype, use_safetensors: Optional[bool]
) -> SdxlEditor:
    """Load the parts of an SDXL InstructPix2Pix; arguments as in `stable_diffusion.load`.

    Raises:
        WysError: If a part cannot be loaded or is not supported.
    """
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    editor = load_common_parts(name, source, device, dtype, use_safetensors)
    kind = editor.unet.config.addition_embed_type
    if kind != "text_time":
        raise WysError(
            f'The UNet of the editor "{name}" is not one of SDXL: its addition_embed_type is {kind}, not text_time.'
        )
    with loading_errors(name, source):
        encoder = load_text_encoder(name, source, "text_encoder_2", CLIPTextModelWithProjection, dtype, use_safetensors)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer_2")
        index = read_json(source, INDEX) or {}
    if dtype == torch.float16 and editor.vae.config.force_upcast:
        editor.vae.float()  # SDXL's own VAE overflows in half precision
    editor = SdxlEditor(
        **{part.name: getattr(editor, part.name) for part in fields(StableDiffusionEditor) if part.init},
        text_encoder_2=encoder.to(device).eval().requires_grad_(False),
        tokenizer_2=tokenizer,
        empty_text_is_zero=bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    check_computes(editor, source, "unet")
    return editor
