"""An untrained FLUX.2 klein in diffusers format, with the class names and the layout of the public repositories."""

import json
from pathlib import Path

import torch
from conftest import WORDS

LAYERS = 4
"""Layers of the text encoder; states of three of them are used, as of klein's 36."""
TOKENS = 24
"""Largest number of tokens of a text."""


def build_flux2_folder(
    folder: Path,
    *,
    distilled: bool = False,
    latent_channels: int = 4,
    text_width: int = 16,
    unknown_token: str = "<pad>",
    seed: int = 0,
) -> Path:
    """Write an untrained FLUX.2 klein with latents of 4 pixels.

    Args:
        folder: Folder to write.
        distilled: Write a distilled model instead of a base model.
        latent_channels: Channels of the VAE's latents.
        text_width: Width of the text encoder.
        unknown_token: Token of unknown words; words are only refused if it is not that of the padding.
        seed: Seed of the weights.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=4 * latent_channels, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * text_width, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels, norm_num_groups=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.2, 0.6)
    vae.save_pretrained(folder / "vae")
    tokens = dict.fromkeys(["<pad>", "<end>", unknown_token, *WORDS])
    entries = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token=unknown_token))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token=unknown_token,
        model_max_length=TOKENS,
    )
    fast.chat_template = "{{ messages[0]['content'] }}<end>"
    fast.save_pretrained(folder / "tokenizer")
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(entries),
            hidden_size=text_width,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )  # fmt: skip
    )
    text_encoder.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.37.0",
        "is_distilled": distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
