"""Trains the toy world's CLIP from a seed: `python -m wys_nerfstudio.demo.training.train_clip OUT`.

Renders training scenes, trains picture and text encoder with CLIP's contrastive loss, and leaves OUT/clip in transformers'
format with what it scores on held-out scenes. Every scene of a batch comes with all of its edits, so that the captions that
a picture must be told from are those of the same scene edited otherwise.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from wys_nerfstudio.demo.instructions import EDITS, Edit
from wys_nerfstudio.demo.training.data_set import render_array
from wys_nerfstudio.demo.training.networks import END, START, vocabulary, write_tokenizer
from wys_nerfstudio.demo.training.optimizers import MuonAndAdamW
from wys_nerfstudio.demo.world import MATERIALS, TEST_SEEDS, TOY_COLORS, TRAIN_SEEDS, sample_scenes
from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import ClipEncoder, load_clip, prepare_pixels

COLOR_NAMES = ("orange", "purple", "pink", "white", "grey", "turquoise", "brown", "black")
"""Of TOY_COLORS, in their order."""
TOKENS = 24
"""Longest caption in tokens, start and end included."""
SIZE = 64
"""Sides of its pictures in pixels."""
WIDTH = 96
NO_CHANGE = len(EDITS) - 1


@dataclass
class Options:
    """Options of the training."""

    out: tyro.conf.Positional[Path]
    """Folder of the CLIP (out/clip) and of the pictures (out/train.npy, out/test.npy)."""
    seed: int = 0
    """Of weights and batches."""
    scenes: int = 3200
    """Training scenes, one view each with all edits."""
    test_scenes: int = 208
    """Held-out scenes."""
    steps: int = 700
    """Optimizer steps."""
    batch_scenes: int = 8
    """Scenes per step, each with all edits."""


def caption(edit: Edit, ball: int, block: int) -> str:
    """What a scene shows after an edit, with the colors of ball and block.

    Args:
        edit: What was done.
        ball: The ball's color before, an index into TOY_COLORS.
        block: The block's.
    """
    text = edit.caption
    for name, number in (("ball", ball), ("block", block)):
        color = COLOR_NAMES[number]
        text = text.replace(f"a {name}", f"{'an' if color[0] in 'aeiou' else 'a'} {color} {name}")
    return text


def toy_colors(seeds: range) -> Int[Tensor, "b 2"]:
    """Which of TOY_COLORS ball and block of each scene are made in."""
    colors = sample_scenes(seeds).colors[:, [MATERIALS.index("ball"), MATERIALS.index("block")]]
    return torch.cdist(colors, torch.tensor(TOY_COLORS)).argmin(-1)


def words() -> list[str]:
    """Every word of every caption, as CLIP's tokenizer splits them, sorted."""
    text = " ".join(caption(edit, n, n) + " " + edit.caption for edit in EDITS for n in range(len(TOY_COLORS)))
    return sorted({*text.replace(",", " ,").split()})


def build_clip() -> CLIPModel:
    """The untrained CLIP, 0.4 M parameters."""
    entries, _ = vocabulary(words())
    text = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"vocab_size": len(entries), "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": entries[START], "eos_token_id": entries[END], "pad_token_id": entries[END]}
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3}
    vision |= {"image_size": SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def contrastive_loss(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"], same: Tensor, scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """CLIP's loss where several pictures may share a caption.

    Args:
        images: Unit vectors of pictures.
        texts: Unit vectors of their captions.
        same: Bool (n, n); whether two captions are equal.
        scale: What cosines are multiplied by.
    """
    logits, wanted = scale * images @ texts.T, same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def train(
    options: Options, clip: ClipEncoder, pictures: UInt8[np.ndarray, "scenes edits h w 3"], colors: Tensor
) -> None:
    """Trains a CLIP; the learning rate falls to zero by the end."""
    model = clip.model.train().requires_grad_(True)
    optimizer = MuonAndAdamW([model], muon_rate=2e-3, adamw_rate=1.5e-3)
    draw = np.random.default_rng(options.seed)
    begun, losses, hits = time.monotonic(), [], []
    for step in range(options.steps):
        chosen = draw.choice(len(pictures), options.batch_scenes, replace=False)
        batch = torch.from_numpy(pictures[np.sort(chosen)]).flatten(0, 1).float() / 255
        if draw.random() < 0.5:
            batch = batch.flip(2)
        # With and without the colors, but never both in a batch: the shorter caption is true of the picture, too.
        if step % 2:
            captions = [caption(edit, *colors[i].tolist()) for i in np.sort(chosen) for edit in EDITS]
        else:
            captions = [edit.caption for _ in chosen for edit in EDITS]
        distinct = list(dict.fromkeys(captions))
        which = torch.tensor([distinct.index(text) for text in captions])
        images = F.normalize(
            model.visual_projection(model.vision_model(pixel_values=prepare_pixels(batch, SIZE)).pooler_output), dim=-1
        )
        tokens = clip.tokenizer(distinct, padding="max_length", max_length=TOKENS, return_tensors="pt")
        read = model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        texts = F.normalize(model.text_projection(read), dim=-1)[which]
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(images, texts, which[:, None] == which, scale)
        optimizer.zero_grad()
        loss.backward()
        progress = step / options.steps
        optimizer.step(min(1.0, (step + 1) / 50, 2 * (1 - progress)))
        losses.append(loss.item())
        with torch.no_grad():
            scores = (images @ texts.T).unflatten(1, (options.batch_scenes, -1))
            own = scores[torch.arange(len(images)), torch.arange(len(images)) // len(EDITS)]
            hits.append((own.argmax(-1) == torch.arange(len(images)) % len(EDITS)).float().mean().item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}, {time.monotonic() - begun:.0f} s, loss {np.mean(losses[-50:]):.3f}, "
                f"right captions {np.mean(hits[-50:]):.3f}, scale {scale.item():.1f}",
                flush=True,
            )
    model.eval().requires_grad_(False)


def evaluate(clip: ClipEncoder, pictures: UInt8[np.ndarray, "scenes edits h w 3"]) -> dict[str, Any]:
    """What a CLIP understands of the toy world, on scenes and their true edits.

    Returns:
        `accuracy` per edit: how often the right one of the edits' captions is the nearest. `own_direction`: mean direction
        similarity of each true edit by its own captions; `other_direction`: by those of the other edits;
        `swapped_direction`: of a recolored ball by the captions of the block in that color, and the other way round.
    """
    images = torch.stack([clip.embed_images(torch.from_numpy(scene).float() / 255) for scene in pictures])
    texts = clip.embed_texts([edit.caption for edit in EDITS])
    right = (images @ texts.T).argmax(-1) == torch.arange(len(EDITS))
    slugs = [edit.slug for edit in EDITS]
    names = ("accuracy", "own_direction", "other_direction", "swapped_direction")
    result: dict[str, Any] = {"scenes": len(pictures), **{name: {} for name in names}}
    for number, edit in enumerate(EDITS):
        result["accuracy"][edit.slug] = round(right[:, number].float().mean().item(), 3)
        if number == NO_CHANGE:
            continue
        before, after = images[:, NO_CHANGE], images[:, number]
        by_caption = torch.stack(
            [metrics.direction_similarity(before, after, texts[NO_CHANGE], text) for text in texts[:NO_CHANGE]]
        )
        others = torch.arange(NO_CHANGE) != number
        result["own_direction"][edit.slug] = round(by_caption[number].mean().item(), 3)
        result["other_direction"][edit.slug] = round(by_caption[others].mean().item(), 3)
        if edit.kind == "recolor":
            other = "block" if edit.target == "ball" else "ball"
            swapped = slugs.index(edit.slug.replace(edit.target, other))
            result["swapped_direction"][edit.slug] = round(by_caption[swapped].mean().item(), 3)
    for name in names:
        result[f"mean_{name}"] = round(float(np.mean(list(result[name].values()))), 3)
    return result


def main(options: Options) -> None:
    """Renders, trains, evaluates."""
    folder = options.out / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": TRAIN_SEEDS[: options.scenes], "test": TEST_SEEDS[: options.test_scenes]}
    for name, seeds in splits.items():
        render_array(options.out / f"{name}.npy", seeds, SIZE, SIZE)
    print("rendered", flush=True)
    pictures = {name: np.load(options.out / f"{name}.npy", mmap_mode="r") for name in splits}
    torch.manual_seed(options.seed)
    write_tokenizer(folder, words(), TOKENS)
    build_clip().save_pretrained(folder)
    clip = load_clip(str(folder))
    train(options, clip, pictures["train"], toy_colors(splits["train"]))
    clip.model.half().save_pretrained(folder)
    figures = evaluate(load_clip(str(folder)), pictures["test"])
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", "utf8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
