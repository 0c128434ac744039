"""Untrained networks, tokenizer and scheduler of the demo editor, and writing of editor folders.

Classes and folder layout are those of InstructPix2Pix; only the sizes differ. The module imports diffusers and transformers, so
it must not be imported outside `demo`.
"""

import json
import os
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from wys_nerfstudio.demo.instructions import EDITS

TOKENS = 16
"""Maximum number of tokens of an instruction, including start and end tokens."""
TEXT_WIDTH = 128
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


@dataclass
class Networks:
    """Trainable networks of an editor."""

    unet: UNet2DConditionModel
    """Predicts v from noised latents, conditioned on the image latents, the timestep and the text."""
    vae: AutoencoderKL
    """Autoencoder with latents at a quarter of the image resolution."""
    text_encoder: CLIPTextModel
    """Text encoder."""


def words() -> list[str]:
    """Return the sorted words of all wordings, split like CLIP's tokenizer."""
    text = " ".join(wording for edit in EDITS for wording in edit.wordings)
    return sorted({*text.replace("don't", "don 't").split(), *".,!?", "color", "please"})


def vocabulary(known_words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build a byte pair encoding in which every known word is one token.

    Args:
        known_words: Distinct words.

    Returns:
        The vocabulary, with CLIP's end-of-word marks, and its merges. Known words come first, so that letters and pieces of
        unknown words have the highest indices.
    """
    merges: list[tuple[str, str]] = []
    known = [word + "</w>" for word in known_words]
    for word in known_words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            ranks = [merges.index(pair) if pair in merges else len(merges) for pair in zip(pieces, pieces[1:])]
            at = ranks.index(min(ranks))
            if ranks[at] == len(merges):
                # Merges are only added when none applies, with the lowest priority, so earlier words are unaffected.
                merges.append((pieces[at], pieces[at + 1]))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    # Only pieces that occur in merges: other letters are unknown tokens, so that most unknown words are detected.
    pieces = (piece for pair in merges for piece in (*pair, "".join(pair)))
    entries = dict.fromkeys([START, END, UNKNOWN, *known, *pieces])
    return {entry: number for number, entry in enumerate(entries)}, merges


def write_tokenizer(folder: Path, known_words: Sequence[str], tokens: int = TOKENS) -> None:
    """Write the files that CLIPTokenizer.from_pretrained reads.

    Args:
        folder: Output folder.
        known_words: Words that are encoded as single tokens.
        tokens: Maximum number of tokens of a text, including start and end tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, merges = vocabulary(known_words)
    (folder / "vocab.json").write_text(json.dumps(entries, ensure_ascii=False, indent=0) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": tokens, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer of an editor folder."""
    return CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))


def build_vae() -> AutoencoderKL:
    """Build the untrained autoencoder: 4 latent channels at a quarter of the image resolution."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore
        up_block_types=("UpDecoderBlock2D",) * 3,  # type: ignore
        block_out_channels=(32, 32, 64),  # type: ignore
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet_and_text_encoder() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Build the untrained UNet and text encoder, which are trained together."""
    unet = UNet2DConditionModel(
        sample_size=20,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    entries, _ = vocabulary(words())
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(entries),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=entries[START],
            eos_token_id=entries[END],
            pad_token_id=entries[END],
        )
    )
    with torch.no_grad():
        # Embeddings of pieces of unknown words are never trained; zeros do not affect the instruction.
        text_encoder.get_input_embeddings().weight[len(words()) + 3 :] = 0  # type: ignore
    return unet, text_encoder


def build_scheduler() -> DDIMScheduler:
    """Build a DDIM scheduler with Stable Diffusion's noise schedule and v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="v_prediction",
    )


def write_editor(folder: Path, networks: Networks) -> None:
    """Write an editor folder in fp16 for StableDiffusionInstructPix2PixPipeline.from_pretrained.

    The folder is written under a temporary name and then renamed. Other files in an existing folder, such as the model card,
    are kept.

    Args:
        folder: The editor folder.
        networks: The networks; not modified.
    """
    partial = start_folder(folder)
    for name in ("unet", "vae", "text_encoder"):
        save_half(getattr(networks, name), partial / name)
    write_tokenizer(partial / "tokenizer", words())
    build_scheduler().save_pretrained(partial / "scheduler")
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    replace_folder(folder, partial)


def start_folder(folder: Path) -> Path:
    """Return a new empty folder beside `folder`, for `replace_folder`, and delete leftovers of an interrupted write."""
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder.with_name(folder.name + ".old")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(folder: Path, partial: Path) -> None:
    """Replace `folder` by `partial`. Files that only `folder` has, such as the model card, are kept."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        for path in folder.iterdir():
            if not (partial / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, partial / path.name)
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_half(module: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Save a copy of a network in fp16, without the path of the training machine in its configuration."""
    deepcopy(module).half().save_pretrained(folder)
    config = folder / "config.json"
    entries = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(entries, indent=2) + "\n")
