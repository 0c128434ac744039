"""What the demo editor is trained on: encoded pictures, pairs of edits, tokens of all wordings.

Not here: how pictures are rendered (`data_set.py`) and encoded (`train_vae.py`), and what becomes of them (`train_editor.py`).
"""

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
ENDINGS = ("", "", ".", "!")


@dataclass
class Latents:
    """The encoded data set of one picture size."""

    codes: Float[Tensor, "scenes edits 4 h w"]
    """Unscaled latents, fp16; the last edit is the picture before."""
    changed: Bool[Tensor, "scenes edits h w"]
    """Whether any pixel under a latent changes."""


def load_latents(pictures: Path, codes: Path) -> Latents:
    """Latents and latent-sized change masks of one picture size, the mirrored scenes last."""
    raw = np.load(pictures, mmap_mode="c")
    different = [torch.from_numpy((views != views[NO_CHANGE]).any(-1)).float() for views in raw]
    changed = torch.stack([F.max_pool2d(mask, 4).bool() for mask in different])
    return Latents(torch.from_numpy(np.load(codes)), torch.cat([changed, changed.flip(-1)]))


def draw_pairs(count: int, generator: torch.Generator) -> Int[Tensor, "count 2"]:
    """Two edits per scene. Every third pair gives ball and block the same color: only the named object differs."""
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
    """Tokens of all wordings and endings, one stack per edit, and last those of the empty instruction."""
    tokenizer = load_tokenizer(folder)
    texts = [[wording + end for wording in edit.wordings for end in ENDINGS] for edit in EDITS]
    return [
        torch.tensor(tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length).input_ids)
        for text in [*texts, [""]]
    ]
