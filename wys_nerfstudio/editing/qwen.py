"""Qwen-Image-Edit (2509 and newer), a flow-matching editor whose text encoder sees the image.

Follows diffusers' QwenImageEditPlusPipeline, whose repositories it loads. Text states depend on the instruction and the image, so
`QwenEditor.predictor` computes them for every batch of images. Guidance keeps the norm of the prediction with text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from wys_nerfstudio.editing.editor import Branch, EditorProfile, ImageEncoding, NoiseLevel, Predictor, size_in_cells
from wys_nerfstudio.editing.flow_matching import (
    MAX_PIXELS,
    NETWORKS,
    FlowMatchingEditor,
    check_diffusers,
    edit_defaults,
    flow_level,
    load_parts,
)
from wys_nerfstudio.editing.parts import check_computes, loading_errors
from wys_nerfstudio.utils.errors import WysError

PARTS = (*NETWORKS, "processor", "scheduler")
"""Folders of a repository that are loaded."""

OWN_CELL = 32
"""Pixels of which the sides of images of the model's own size are multiples."""

MAX_TOKENS = 1024
"""Tokens of an instruction."""

IMAGE_IN_TEXT = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
"""The image's place in the text, before the instruction."""

NO_INSTRUCTION = " "
"""The instruction of the prediction without text."""


class Condition(NamedTuple):
    """The images that edits are conditioned on."""

    latents: Float[Tensor, "b c h w"]
    """For the transformer."""
    pictures: UInt8[Tensor, "b picture_h picture_w 3"]
    """For the text encoder, of about 384x384 pixels each."""


@dataclass
class QwenEditor(FlowMatchingEditor):
    """Networks and noise levels of a Qwen-Image-Edit. Implements `Editor`."""

    processor: Any
    """transformers' Qwen2VLProcessor: the tokenizer, and the preparation of images for the text encoder."""
    template: str
    """The prompt around image and instruction that the model was trained with."""
    template_tokens: int
    """Its first tokens, whose states are left out."""

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one side: those of the VAE's latents, of which 2x2 are one."""
        return 2 ** (len(self.vae.config.temperal_downsample) + 1)

    def editing_size(self, height: int, width: int, resolution: Optional[int]) -> tuple[int, int]:
        """As in `FlowMatchingEditor`; the model's own size is `MAX_PIXELS`, also of smaller images, in cells of `OWN_CELL`."""
        if resolution is None:
            side = max(height, width) * math.sqrt(MAX_PIXELS / (height * width))
            return size_in_cells(height, width, math.ceil(side), OWN_CELL)
        return super().editing_size(height, width, resolution)

    def encode_text(self, instruction: str) -> Int[Tensor, "1 tokens"]:
        """Tokens of an instruction. Its states depend on the image; see `predictor`.

        Raises:
            WysError: If the instruction is too long, or has the tokenizer's special tokens.
        """
        tokens = self.processor.tokenizer(instruction, return_tensors="pt").input_ids
        self.check_length(tokens.shape[1], MAX_TOKENS)
        if set(tokens[0].tolist()) & set(self.processor.tokenizer.all_special_ids):
            raise WysError(f'The instruction "{instruction}" has special tokens of the text encoder: leave them out.')
        return tokens

    @torch.no_grad()
    def _text_states(self, pictures: "list[Image.Image]", instruction: str) -> Float[Tensor, "b tokens width"]:
        text = self.template.format(IMAGE_IN_TEXT + instruction)
        inputs = self.processor(text=[text] * len(pictures), images=pictures, return_tensors="pt").to(self.device)
        states = self.text_encoder.model(**inputs, use_cache=False).last_hidden_state
        return states[:, self.template_tokens :]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        statistics = torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std], device=self.device)
        mean, std = statistics.repeat_interleave(4, dim=1)[:, None, :, None, None]
        return mean, std

    # The VAE is one of videos; an image is one frame.
    def _vae_mode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c lh lw"]:
        return super()._vae_mode(pixels[:, :, None])[:, :, 0]

    def _vae_decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b 3 h w"]:
        return super()._vae_decode(latents[:, :, None])[:, :, 0]

    def encode(self, images: Float[Tensor, "b h w 3"]) -> ImageEncoding:
        """As in `FlowMatchingEditor`; the text encoder's pictures are part of the condition."""
        latents = super().encode(images).latents
        pictures = torch.stack([torch.from_numpy(np.array(_picture(image))) for image in images])
        return ImageEncoding(latents, Condition(latents, pictures))

    def noise_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> list[NoiseLevel]:
        """Strictly descending levels of a denoising run; arguments as in `Editor`.

        A run of less than full strength is the last part of a whole run, as in diffusers' image-to-image pipelines.

        Raises:
            WysError: If there is one step: the scheduler's last level before the clean one is not pure noise.
        """
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

        if num_steps < 2:
            raise WysError(f'--diffusion-steps must be at least 2 for the editor "{self.name}", not {num_steps}.')
        config = self.scheduler.config
        shift = calculate_shift(
            size[0] * size[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        self.scheduler.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)], mu=shift)
        count = max(1, round(strength * num_steps))
        return [flow_level(noise) for noise in self.scheduler.sigmas.tolist()[-count - 1 :]]

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        """With and without text, each with the image."""
        return [Branch(True, True, guidance_scale, keeps_norm=True), Branch(text=False, image=True, scale=1.0)]

    def predictor(self, condition: Condition, instruction: str, branches: Sequence[Branch]) -> Predictor:
        """Bind the conditions of a batch of images; arguments as in `Editor`.

        Each branch is one call of the transformer per step: texts with and without instruction have different lengths.
        """
        height, width = condition.latents.shape[2:]
        texts = [(instruction if branch.text else "") or NO_INSTRUCTION for branch in branches]
        pictures = [Image.fromarray(picture) for picture in condition.pictures.cpu().numpy()]
        states = [self._text_states(pictures, text) for text in texts]
        shapes = [[(1, height, width)] * 2] * len(condition.latents)

        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            return [self._velocity(latents, condition.latents, text, level, img_shapes=shapes) for text in states]

        return predict


def _picture(image: Float[Tensor, "h w 3"]) -> Image.Image:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions

    height, width = image.shape[:2]
    picture = Image.fromarray((image * 255).round().byte().cpu().numpy())
    return picture.resize(calculate_dimensions(CONDITION_IMAGE_SIZE, width / height), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------------------------------ loading


def profile(_index: "dict[str, Any]") -> EditorProfile:
    """Defaults of Qwen-Image-Edit; `_index` is its model_index.json."""
    return EditorProfile(edit_defaults(4.0, 50), edit_defaults(4.0, 20), "bfloat16", 1, has_image_guidance=False)


def load(
    name: str, source: str, device: "str | torch.device", dtype: torch.dtype, use_safetensors: Optional[bool]
) -> QwenEditor:
    """Load the parts of a Qwen-Image-Edit; arguments as in `stable_diffusion.load`.

    Raises:
        WysError: If diffusers is too old, or a part cannot be loaded or is not supported.
    """
    check_diffusers(name, "Qwen-Image-Edit")
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor

    with loading_errors(name, source):
        kinds = (QwenImageTransformer2DModel, AutoencoderKLQwenImage, Qwen2_5_VLForConditionalGeneration)
        parts = load_parts(name, source, kinds, dtype, use_safetensors)
        processor: Any = Qwen2VLProcessor.from_pretrained(source, subfolder="processor")
        pipeline = QwenImageEditPlusPipeline(**parts, processor=processor, tokenizer=processor.tokenizer)
        for network in NETWORKS:
            parts[network].to(device)
        editor = QwenEditor(
            name=name,
            profile=profile({}),
            processor=processor,
            template=pipeline.prompt_template_encode,
            template_tokens=pipeline.prompt_template_encode_start_idx,
            **parts,
        )
    check_computes(editor, source, "transformer")
    return editor
