"""Untrained networks, tokenizer and scheduler of the demo's flow-matching editor, and writing of its folder.

Classes and folder layout are those of FLUX.2 [klein]; only the sizes differ. The module imports diffusers and transformers, so
it must not be imported outside `demo`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.demo.training.networks import replace_folder, save_half, start_folder

TOKENS = 16
"""Number of tokens of a padded instruction."""
PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + END
"""The end token follows every instruction, so that the empty one has a token as well."""
LATENT_CHANNELS = 2
HEAD_DIM = 32
REFERENCE_TIME = 10
"""Time coordinate of the reference image's tokens; that of the noisy tokens is 0."""
ROPE_THETA = 100
"""Base of the rotary embedding: all wavelengths matter on grids of 20 tokens, unlike klein's, with base 2000."""


@dataclass
class FlowNetworks:
    """Trainable networks of a flow-matching editor."""

    transformer: Flux2Transformer2DModel
    """Predicts the velocity from noisy and reference tokens, conditioned on time and text."""
    vae: AutoencoderKLFlux2
    """Autoencoder with latents at half of the image resolution, which are patchified to a quarter."""
    text_encoder: Qwen3ForCausalLM
    """Text encoder; hidden states of its first two layers are used."""


def words() -> list[str]:
    """Return the sorted words of all wordings."""
    return sorted({word for edit in EDITS for wording in edit.wordings for word in wording.split()})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words that ignores case and final punctuation."""
    entries = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *words()])}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[.!?,;\s]+$"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=TOKENS,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files, for transformers 4 and 5."""
    build_tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # transformers 5 writes a class name that transformers 4 does not know; both load this one.
    entries = {**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    entries.pop("backend", None)
    config.write_text(json.dumps(entries, indent=2) + "\n")


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Return padded tokens and attention masks, as the pipeline computes them."""
    chats = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )
        for text in texts
    ]
    inputs = tokenizer(chats, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return inputs["input_ids"], inputs["attention_mask"]  # type: ignore


def build_vae() -> AutoencoderKLFlux2:
    """Build the untrained autoencoder: 2 latent channels at half of the image resolution."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),  # type: ignore
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def patchify(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 4*c h/2 w/2"]:
    """Move blocks of 2 x 2 latents into channels; channel, row and column are the pipeline's order."""
    return F.pixel_unshuffle(latents, 2)


def build_transformer_and_text_encoder() -> tuple[Flux2Transformer2DModel, Qwen3ForCausalLM]:
    """Build the untrained transformer and text encoder, which are trained together."""
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words()) + 3,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.normal_()  # type: ignore
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=4,
        joint_attention_dim=128,
        mlp_ratio=2.0,
        axes_dims_rope=(HEAD_DIM // 4,) * 4,
        rope_theta=ROPE_THETA,
        guidance_embeds=False,
    )
    initialize(transformer)
    return transformer, text_encoder


@torch.no_grad()
def initialize(transformer: Flux2Transformer2DModel) -> None:
    """Initialize gates to 1 and some heads to attend to the other image and to neighbors, like a convolution.

    In the double block, every head attends to one of four neighbors. In the single blocks, the first head attends to the token
    of the other image at the same position, and the second one to a token at a distance of 2 in the same image; the others
    are random. Noisy and reference tokens are aligned, and objects are a few tokens wide, so these positions are those that a
    token needs first.

    A channel of the time embedding that is constant over time provides the biases.
    """
    embedder = transformer.time_guidance_embed.timestep_embedder
    embedder.linear_1.weight[0] = 0
    # These cosines have the lowest frequencies and stay above 0.95 for all timesteps.
    half = embedder.linear_1.weight.shape[1] // 2
    embedder.linear_1.weight[0, half - 16 : half] = 0.25
    embedder.linear_2.weight[0] = 0
    embedder.linear_2.weight[0, 0] = 1
    constant = F.silu(F.silu(torch.tensor(4.0)))
    width = transformer.inner_dim
    direction = torch.randn(width).sign()
    for modulation in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ):
        modulation.linear.weight.normal_(std=0.02)
        biases = modulation.linear.weight[:, 0].unflatten(0, (-1, 3, width))  # shift, scale, gate
        biases[:, 0], biases[:, 1], biases[:, 2] = direction / constant, 0, 1 / constant
    neighbors = [(0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0)]
    offsets = [neighbors] + [[(REFERENCE_TIME, 0, 0), (0, 2 * row, 2 * column)] for _, row, column in neighbors]
    for block, heads in zip([*transformer.transformer_blocks, *transformer.single_transformer_blocks], offsets):
        weights = dict(block.attn.named_parameters())  # type: ignore
        to_q, to_k = (
            (weights["to_q.weight"], weights["to_k.weight"])
            if "to_q.weight" in weights
            else weights["to_qkv_mlp_proj.weight"][: 2 * width].chunk(2)
        )
        for head, offset in enumerate(heads):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            for weight, target in zip((to_q, to_k), _position_vectors(*offset)):
                weight[rows] = 0.1 * weight[rows] + torch.outer(target, direction) / width
        # Sharpens the attention of all heads.
        weights["norm_q.weight"].fill_(2)
        weights["norm_k.weight"].fill_(2)


def _position_vectors(time: int, row: int, column: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Query and key, before the rotation, of a head that attends to the tokens at a given offset.

    Args:
        time: Offset of the time coordinate; its sign is irrelevant.
        row: Offset in tokens.
        column: Offset in tokens.
    """
    pairs = HEAD_DIM // 8
    frequencies = ROPE_THETA ** (-torch.arange(pairs) / pairs)
    energy = torch.zeros(4, pairs)  # of time, row, column and layer
    energy[0, 0] = 0.12
    energy[1, :2] = energy[2, :2] = torch.tensor([0.24, 0.20])
    amplitude = (HEAD_DIM * energy).sqrt()
    phase = torch.tensor([time, row, column, 0])[:, None] * frequencies
    query = torch.stack([amplitude * phase.cos(), amplitude * phase.sin()], -1)
    key = torch.stack([amplitude, torch.zeros_like(amplitude)], -1)
    return query.flatten(), key.flatten()


def text_states(
    text_encoder: Qwen3ForCausalLM, tokens: Int[Tensor, "b n"], mask: Int[Tensor, "b n"], width: int
) -> Float[Tensor, "b n width"]:
    """Return the hidden states that condition the transformer.

    Args:
        text_encoder: The text encoder.
        tokens: Padded tokens.
        mask: 1 for tokens, 0 for padding.
        width: The transformer's `joint_attention_dim`, a multiple of the text encoder's width: the number of layers.
    """
    count = width // text_encoder.config.hidden_size
    layers = [text_encoder.config.num_hidden_layers * k // (count + 1) for k in range(1, count + 1)]
    states = text_encoder.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return torch.cat([states.hidden_states[layer] for layer in layers], -1)


def position_ids(height: int, width: int) -> Int[Tensor, "n 4"]:
    """Return time, row, column and layer of the noisy tokens, followed by those of the reference tokens."""
    times = torch.tensor([0, REFERENCE_TIME])
    return torch.cartesian_prod(times, torch.arange(height), torch.arange(width), torch.arange(1))


def text_ids(count: int) -> Int[Tensor, "count 4"]:
    """Return time, row, column and layer of text tokens."""
    return F.pad(torch.arange(count)[:, None], (3, 0))


def predict_velocity(
    transformer: Flux2Transformer2DModel,
    text_encoder: Qwen3ForCausalLM,
    noised: Float[Tensor, "b c h w"],
    reference: Float[Tensor, "b c h w"],
    time: Float[Tensor, " b"],
    tokens: Int[Tensor, "b n"],
    mask: Int[Tensor, "b n"],
) -> Float[Tensor, "b c h w"]:
    """Return the predicted velocity, with the conventions of Flux2KleinPipeline.

    Args:
        transformer: The transformer.
        text_encoder: The text encoder.
        noised: Noised latents.
        reference: Latents of the reference image.
        time: Share of noise, in [0, 1].
        tokens: Padded tokens of the instruction.
        mask: 1 for tokens, 0 for padding.
    """
    height, width = noised.shape[-2:]
    text = text_states(text_encoder, tokens, mask, transformer.config["joint_attention_dim"])
    packed = torch.cat([noised.flatten(2), reference.flatten(2)], 2).transpose(1, 2)
    output = transformer(
        hidden_states=packed,
        timestep=time,
        encoder_hidden_states=text,
        img_ids=position_ids(height, width),
        txt_ids=text_ids(text.shape[1]),
    ).sample
    return output[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build a flow-matching Euler scheduler with klein's resolution-dependent shift."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def write_flow_editor(folder: Path, networks: FlowNetworks) -> None:
    """Write an editor folder in fp16 for Flux2KleinPipeline.from_pretrained; other files in an existing folder are kept.

    Args:
        folder: The editor folder; replaced atomically.
        networks: The networks; not modified.
    """
    partial = start_folder(folder)
    for name in ("transformer", "vae", "text_encoder"):
        save_half(getattr(networks, name), partial / name)
    write_tokenizer(partial / "tokenizer")
    build_scheduler().save_pretrained(partial / "scheduler")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.37.0",
        "is_distilled": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    replace_folder(folder, partial)
