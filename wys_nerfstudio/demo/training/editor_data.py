"""Training samples of the demo editor: latents, pairs of edits and tokens of all wordings."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.demo.training.networks import load_tokenizer
from wys_nerfstudio.demo.world import NAMED_COLORS

INDEX = {edit.slug: number for number, edit in enumerate(EDITS)}
NO_CHANGE = INDEX["no-change"]
OBJECT_EDITS = [[INDEX[edit.slug] for edit in EDITS if edit.target == target] for target in ("ball", "block", "bear")]
"""Edits of each object."""
ENDINGS = ("", "", ".", "!")


@dataclass
class Latents:
    """Encoded data set of one image size."""

    codes: Float[Tensor, "scenes edits c h w"]
    """Latents, fp16, as the editor encodes the reference image; the last edit is the unedited image."""
    changed: Bool[Tensor, "scenes edits h w"]
    """Whether any pixel under a latent changes."""


def load_latents(images: Path, codes: Path) -> Latents:
    """Load latents and compute change masks at latent resolution; mirrored scenes come last.

    Args:
        images: Array file of the images.
        codes: Array file of the latents.
    """
    changed = pooled_changes(np.load(images, mmap_mode="c"))
    return Latents(torch.from_numpy(np.load(codes)), torch.cat([changed, changed.flip(-1)]))


def pooled_changes(images: Iterable[np.ndarray]) -> Bool[Tensor, "scenes edits h w"]:
    """Return whether any pixel in a square of 4 x 4 pixels changes.

    Args:
        images: 8-bit images of every scene, each "edits 4*h 4*w 3".
    """
    masks = [torch.from_numpy((views != views[NO_CHANGE]).any(-1)).float() for views in images]
    return torch.stack([F.max_pool2d(mask, 4).bool() for mask in masks])


def draw_pairs(count: int, generator: torch.Generator) -> Int[Tensor, "count 2"]:
    """Sample two edits per scene. Every third pair recolors ball and block with one color: only the object differs."""
    colors = list(NAMED_COLORS)
    others = [INDEX[s] for s in ("panda", "polar-bear", "hat", "hat", "sunglasses", "sunglasses", "snow", "night")]
    others += [NO_CHANGE, -1, -1]
    pairs = []
    for kind, first, second, color, color2 in torch.rand(count, 5, generator=generator).tolist():
        contrast = colors[int(color * 4)]
        recolor = INDEX[f"{'ball' if color2 < 0.5 else 'block'}-{contrast}"]
        if kind < 0.35:
            pairs.append((INDEX[f"ball-{contrast}"], INDEX[f"block-{contrast}"]))
        else:
            picks = [others[int(u * len(others))] for u in (first, second)]
            pairs.append(tuple(recolor if pick < 0 else pick for pick in picks))
    return torch.tensor(pairs)


def tokenize(folder: Path) -> list[Int[Tensor, "variants tokens"]]:
    """Tokenize all wordings with all endings: one tensor per edit, followed by the empty instruction."""
    tokenizer = load_tokenizer(folder)
    texts = [[wording + end for wording in edit.wordings for end in ENDINGS] for edit in EDITS]
    return [
        torch.tensor(tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length).input_ids)
        for text in [*texts, [""]]
    ]
