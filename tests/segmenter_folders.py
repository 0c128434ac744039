"""An untrained Grounding DINO and an untrained SAM 2 in transformers format, with the layout of the public repositories."""

from pathlib import Path

import torch
from conftest import WORDS

SIDE = 64
"""Side in pixels of the images that the networks compute with."""
QUERIES = 12
"""Largest number of boxes of an image."""
TOKENS = 16
"""Largest number of tokens of a text."""


def build_detector_folder(folder: Path, seed: int = 0) -> Path:
    """Write an untrained Grounding DINO for the words of `WORDS`.

    Args:
        folder: Folder to write.
        seed: Seed of the weights.
    """
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    # Grounding DINO attends from one "." or "?" to the next, which have these numbers in BERT's vocabulary.
    entries = [f"[unused{number}]" for number in range(1030)]
    entries[0], entries[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries[200 : 200 + len(WORDS)] = WORDS
    entries[1012], entries[1029] = ".", "?"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(entries))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=4 * TOKENS)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)
    backbone = SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_indices=[2, 3, 4]
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(entries), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=4 * TOKENS,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, num_queries=QUERIES, encoder_layers=1, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2, d_model=32,
        encoder_n_points=2, decoder_n_points=2, max_text_len=TOKENS,
    )  # fmt: skip
    network = GroundingDinoForObjectDetection(config)
    network.save_pretrained(folder)
    return folder


def build_segmenter_folder(folder: Path, *, video: bool = False, seed: int = 0) -> Path:
    """Write an untrained SAM 2.

    Args:
        folder: Folder to write.
        video: Write the network that also segments videos, as the public repositories contain it.
        seed: Seed of the weights.
    """
    import transformers
    from transformers import Sam2Config, Sam2Model, Sam2Processor, Sam2VideoConfig, Sam2VideoModel

    torch.manual_seed(seed)
    channels = [8, 16, 32, 64]
    sizes = [SIDE // 4, SIDE // 8, SIDE // 16]
    parts = {
        "vision_config": {
            "backbone_config": {
                "hidden_size": 8, "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": channels,
                "num_attention_heads_per_stage": [1, 1, 1, 1], "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [3],
                "model_type": "sam2_hiera_det_model",
            },
            "backbone_channel_list": channels[::-1],
            "backbone_feature_sizes": [[size, size] for size in sizes],
            "fpn_hidden_size": 32,
            "model_type": "sam2_vision_model",
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": SIDE, "mask_input_channels": 4},
        "mask_decoder_config": {
            "hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    }  # fmt: skip
    if video:
        memory = {
            "image_size": SIDE, "memory_attention_hidden_size": 32, "memory_attention_num_layers": 1,
            "memory_attention_num_attention_heads": 1, "memory_attention_feed_forward_hidden_size": 32,
            "memory_attention_rope_feat_sizes": [4, 4], "memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 16,
            "mask_downsampler_embed_dim": 32, "memory_fuser_num_layers": 1, "memory_fuser_embed_dim": 32,
            "memory_fuser_intermediate_dim": 32,
        }  # fmt: skip
        network = Sam2VideoModel(Sam2VideoConfig(**parts, **memory))
    else:
        network = Sam2Model(Sam2Config(**parts))
    with torch.no_grad():  # untrained weights would predict 0.5 everywhere
        for weights in network.mask_decoder.parameters():
            weights.mul_(4)
        shared = network.shared_image_embedding.positional_embedding  # one matrix in SAM 2
        network.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    network.save_pretrained(folder)
    before_5 = hasattr(transformers, "TFPreTrainedModel")
    processor = transformers.Sam2ImageProcessorFast if before_5 else transformers.Sam2ImageProcessor
    sizes = {"size": {"height": SIDE, "width": SIDE}, "mask_size": {"height": SIDE // 4, "width": SIDE // 4}}
    Sam2Processor(processor(**sizes)).save_pretrained(folder)
    return folder
