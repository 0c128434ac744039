"""InstructPix2Pix on Stable Diffusion XL: a second text encoder, and conditions of text and size beside the text's states.

Everything else is `Editor`'s. After diffusers' StableDiffusionXLInstructPix2PixPipeline, whose repositories are taken.
"""

from dataclasses import dataclass, fields
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.editing.editor import Editor
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.log_filters import no_progress_bar_for_local_files


@dataclass
class SdxlEditor(Editor):
    """An `Editor` whose text states end with one token more: the second encoder's summary of the whole text, filled up with
    zeros. So states of several texts are still one tensor."""

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
        summary = second.text_embeds[:, None]
        states = torch.cat([states, F.pad(summary, (0, states.shape[-1] - summary.shape[-1]))], dim=1)
        return torch.zeros_like(states) if self.empty_text_is_zero and not instruction else states

    def _predict(self, inputs: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        height, width = (side * self.latent_factor for side in inputs.shape[-2:])
        # Original size, corner of the crop, target size: an edit sees the whole picture at its own size.
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=inputs.device, dtype=inputs.dtype)
        added = {
            "text_embeds": text[:, -1, : self.text_encoder_2.config.projection_dim],
            "time_ids": sizes.expand(len(inputs), -1),
        }
        return self.unet(inputs, timestep, encoder_hidden_states=text[:, :-1], added_cond_kwargs=added).sample


def as_sdxl_editor(editor: Editor, source: str, use_safetensors: Optional[bool]) -> SdxlEditor:
    """Loads what SDXL has beside the parts that every editor has.

    Args:
        editor: An editor of those parts.
        source: Folder or hub id that they came from.
        use_safetensors: As diffusers takes it.

    Raises:
        WysError: If a part can't be had.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    weights: dict[str, Any] = {"dtype": editor.unet.dtype, "use_safetensors": use_safetensors}
    try:
        with no_progress_bar_for_local_files(source):
            encoder: Any = CLIPTextModelWithProjection.from_pretrained(source, subfolder="text_encoder_2", **weights)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer_2")
        index: Any = DiffusionPipeline.load_config(source)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0].rstrip(".")
        raise WysError(
            f'The editor "{editor.name}" is one of SDXL, and its second text encoder, second tokenizer or model_index.json '
            f"could not be loaded: {first_line}."
        ) from error
    if editor.unet.dtype == torch.float16 and editor.vae.config.force_upcast:
        editor.vae.float()  # SDXL's own VAE overflows in half precision
    return SdxlEditor(
        **{part.name: getattr(editor, part.name) for part in fields(Editor) if part.init},
        text_encoder_2=encoder.to(editor.device).eval().requires_grad_(False),
        tokenizer_2=tokenizer,
        empty_text_is_zero=bool(index.get("force_zeros_for_empty_prompt", True)),
    )
