"""CLIP image and text embeddings.

`metrics` computes the CLIP metrics from the embeddings. transformers is imported by `load_clip`, not with this module.

Features: `CLIPModel.get_image_features` of transformers 5.24 has equal values (maximum difference 0), but returns an output
object instead of a tensor, which older releases may not. Preprocessing: its `CLIPImageProcessor` is equal when it reduces a float
image, but differs by up to 0.65 (normalized units, on noise) when it enlarges one, and by up to 0.05 on reduced 8-bit input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.editing.loading import EMBEDDED
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.hub import local_if_offline
from wys_nerfstudio.utils.log_filters import no_progress_bar_for_local_files
from wys_nerfstudio.utils.memory_errors import is_memory_error

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel mean and standard deviation of the CLIP training set, common to all model sizes."""


@dataclass
class ClipEncoder:
    """A CLIP model with its tokenizer."""

    name: str
    """Hub id, folder or "embedded"."""
    model: Any
    """transformers' CLIPModel."""
    tokenizer: Any
    """transformers' CLIPTokenizer."""

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        """Embed RGB images in [0, 1] as unit vectors, after resizing the shorter side and center cropping."""
        pixels = prepare_pixels(images.to(self.model.device), self.model.config.vision_config.image_size)
        features = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(features).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Embed texts as unit vectors.

        Raises:
            WysError: If a text exceeds the token limit.
        """
        limit = self.model.config.text_config.max_position_embeddings
        for text in texts:
            count = len(self.tokenizer(text).input_ids)
            if count > limit:
                raise WysError(
                    f'The caption "{text}" has {count} tokens, but the CLIP model "{self.name}" takes at most {limit}: '
                    "shorten it."
                )
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=limit, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        features = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(features).float(), dim=-1)


def prepare_pixels(images: Float[Tensor, "b h w 3"], size: int) -> Float[Tensor, "b 3 size size"]:
    """Resize, center crop and normalize images in [0, 1] for CLIP."""
    height, width = images.shape[1:3]
    scale = size / min(height, width)
    resized = (max(size, int(height * scale)), max(size, int(width * scale)))
    pixels = F.interpolate(
        images.permute(0, 3, 1, 2), size=resized, mode="bicubic", align_corners=False, antialias=True
    )
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size].clamp(0, 1)
    mean, std = (torch.tensor(values).to(pixels)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def load_clip(name: str, device: "str | torch.device" = "cpu") -> ClipEncoder:
    """Load a CLIP model.

    Args:
        name: Hub id such as openai/clip-vit-base-patch32, a local folder, or "embedded" for the model of the toy world.
        device: Device of the model.

    Raises:
        WysError: If the model cannot be loaded.
    """
    source = str(Path(__file__).parent.parent / "demo" / "clip") if name == EMBEDDED else name
    source = local_if_offline(source, "CLIP model")
    from transformers import CLIPModel, CLIPTokenizer

    try:
        with no_progress_bar_for_local_files(source):
            # The config's own implementation of attention may be one that transformers downloads as code.
            loaded: Any = CLIPModel.from_pretrained(
                source,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model, info = loaded
        unset = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        if unset:
            raise ValueError(f"its weights lack {min(unset)} or have another size")
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except Exception as error:  # broken configs and weights raise errors of many kinds
        if is_memory_error(error):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WysError(
            f'The CLIP model "{name}" could not be loaded: {first_line}. Give a local folder in transformers format with '
            f'safetensors weights, or "{EMBEDDED}" for the small model of toy images that is part of the package.'
        ) from error
    return ClipEncoder(name, model.to(device).eval().requires_grad_(False), tokenizer)
