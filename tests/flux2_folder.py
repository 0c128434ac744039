"""An untrained FLUX.2 klein in diffusers format, with the class names and the layout of the public repositories."""

import json
from pathlib import Path

import torch
from conftest import WORDS

LAYERS = 4
"""Layers of the text encoder; states of three of them are used, as of klein's 36."""
TOKENS = 24
"""Largest number of tokens of a text."""


def build_flux2_folder(folder: Path, *, distilled: bool = False, seed: int = 0) -> Path:
    """Write an untrained FLUX.2 klein with latents of 4 pixels.

    Args:
        folder: Folder to write.
        distilled: Write a distilled model instead of a base model.
        seed: Seed of the weights.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.2, 0.6)
    vae.save_pretrained(folder / "vae")
    special = ["<pad>", "<end>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz'.,!"]
    entries = {token: number for number, token in enumerate(dict.fromkeys([*special, "?", *WORDS, *letters]))}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>", model_max_length=TOKENS
    )
    fast.chat_template = "{{ messages[0]['content'] }}<end>"
    fast.save_pretrained(folder / "tokenizer")
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(entries),
            hidden_size=16,
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
