"""An InstructPix2Pix checkpoint behind the few functions that the method needs.

The networks are handed in (see `loading`); this file does not read files. An `Editor` is no torch module on purpose: a
pipeline that holds one neither saves nor moves its gigabytes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.editing.sampling import v_to_epsilon
from wys_nerfstudio.utils.errors import WysError


@dataclass
class Editor:
    """Networks and noise schedule of one editor. Latents are `b c h w`; images are `b h w 3` in [0, 1]."""

    name: str
    """What the user called it: a hub id, a folder or "embedded"."""
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
    """Level after the last denoising step."""
    prediction_type: str
    """"epsilon" or "v_prediction"."""
    _texts: "dict[str, Tensor]" = field(default_factory=dict, init=False, repr=False)
    """States of the instructions that were encoded before; a run asks for the same two at every edit."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        # The UNet's first weight knows its device and precision; diffusers looks through the whole network for them.
        return next(self.unet.parameters())

    @property
    def num_train_timesteps(self) -> int:
        """Length of the diffusion."""
        return len(self.alphas_cumprod)

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def side_multiple(self) -> int:
        """Sides of edited images are multiples of this, so that every level of the UNet divides evenly."""
        return self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """The longer side, in pixels, of the images that the editor was made for."""
        size = self.unet.config.sample_size
        return self.latent_factor * (size if isinstance(size, int) else max(size))

    def editing_size(self, height: int, width: int, resolution: int) -> tuple[int, int]:
        """Height and width at which an image is edited: its own proportions, rounded to multiples of `side_multiple`."""
        scale = resolution / max(height, width)
        multiple = self.side_multiple
        return max(1, round(height * scale / multiple)) * multiple, max(1, round(width * scale / multiple)) * multiple

    @torch.no_grad()
    def encode_text(self, instruction: str) -> Float[Tensor, "1 tokens width"]:
        """Text encoder states of an instruction; the empty string is the "no instruction" of guidance.

        Raises:
            WysError: If the instruction is longer than the text encoder takes, or has words it has never seen.
        """
        if instruction not in self._texts:
            self._texts[instruction] = self._encode_text(instruction)
        return self._texts[instruction]

    def _encode_text(self, instruction: str) -> Tensor:
        return self.text_encoder(self._tokens(instruction, self.tokenizer))[0]

    def _tokens(self, instruction: str, tokenizer: Any) -> Tensor:
        limit = tokenizer.model_max_length
        count = len(tokenizer(instruction).input_ids)
        if count > limit:
            raise WysError(
                f'The instruction has {count} tokens and the text encoder of "{self.name}" takes {limit}: shorten it.'
            )
        ids = tokenizer(instruction, padding="max_length", max_length=limit, return_tensors="pt").input_ids
        self._check_words(instruction, ids[0].tolist())
        return ids.to(self.device)

    def _check_words(self, instruction: str, ids: list[int]) -> None:
        tokenizer = self.tokenizer
        unknown = tokenizer.unk_token_id
        # CLIP's own tokenizer spells unseen words out, and its unknown token is the one that ends every text.
        if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            return
        # A tokenizer of whole words has pieces of them, too, from which it was put together; no text was trained with these.
        ordinary = [token for token in ids if token not in tokenizer.all_special_ids]
        whole = all(token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(ordinary))
        if whole and unknown not in ids:
            return
        ends = {w.removesuffix("</w>") for w in tokenizer.get_vocab() if w.endswith("</w>")}
        known = sorted(word for word in ends if word.isalpha() and (len(word) > 1 or word == "a"))
        raise WysError(
            f'"{instruction}" has words that the editor "{self.name}" has never seen; it knows: {", ".join(known)}. '
            "For free text choose another editor, for instance --editor timbrooks/instruct-pix2pix."
        )

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b c lh lw"]:
        """VAE latents (the mode, unscaled, as the UNet's image condition takes them), float32."""
        pixels = images.permute(0, 3, 1, 2).to(self.device, self.vae.dtype) * 2 - 1
        return self.vae.encode(pixels).latent_dist.mode().float()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Images of unscaled latents, float32 in [0, 1]."""
        pixels = self.vae.decode(latents.to(self.device, self.vae.dtype)).sample
        return (pixels.float().permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(
        self,
        latents: Float[Tensor, "b c h w"],
        t: int,
        image_latents: Float[Tensor, "b c h w"],
        text: Float[Tensor, "b tokens width"],
    ) -> Float[Tensor, "b c h w"]:
        """The UNet's noise prediction, whatever it was trained to predict; no guidance.

        Args:
            latents: Noisy latents at timestep `t`, at the UNet's scale.
            t: Timestep in [0, num_train_timesteps).
            image_latents: Condition, unscaled; zeros for "no image".
            text: Condition; the states of "" for "no text".

        Returns:
            Predicted noise, float32.
        """
        inputs = torch.cat([latents, image_latents], dim=1).to(self._weight.dtype)
        # A tensor, not a number: a number would be moved to the device once per call.
        timestep = torch.full((len(inputs),), t, device=inputs.device)
        prediction = self._predict(inputs, timestep, text.to(self._weight.dtype)).float()
        if self.prediction_type == "v_prediction":
            return v_to_epsilon(prediction, latents.float(), self.alphas_cumprod[t])
        return prediction

    def _predict(self, inputs: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(inputs, timestep, encoder_hidden_states=text).sample


def resize_images(images: Float[Tensor, "b h w 3"], height: int, width: int) -> Float[Tensor, "b height width 3"]:
    """Bicubic, antialiased resize, clamped to [0, 1]; the same tensor if the size is right already."""
    if images.shape[1:3] == (height, width):
        return images
    channels_first = F.interpolate(
        images.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return channels_first.permute(0, 2, 3, 1).clamp(0, 1)
