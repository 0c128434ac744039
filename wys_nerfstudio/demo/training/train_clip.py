"""Training of the toy world's CLIP model: `python -m wys_nerfstudio.demo.training.train_clip OUT`.

Renders training scenes, trains image and text encoder with CLIP's contrastive loss, and writes OUT/clip in transformers format
with its metrics on held-out scenes. A batch contains all edits of each of its scenes, so that the negatives of an image include
the other edits of the same scene.
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
"""Names of TOY_COLORS, in the same order."""
TOKENS = 24
"""Maximum number of tokens of a caption, including start and end tokens."""
SIZE = 64
"""Height and width of the images in pixels."""
WIDTH = 96
NO_CHANGE = len(EDITS) - 1


@dataclass
class Options:
    """Options of the training."""

    out: tyro.conf.Positional[Path]
    """Folder of the model (out/clip) and of the images (out/train.npy, out/test.npy)."""
    seed: int = 0
    """Seed of weights and batches."""
    scenes: int = 3200
    """Number of training scenes, one view each with all edits."""
    test_scenes: int = 208
    """Number of held-out scenes."""
    steps: int = 700
    """Number of optimizer steps."""
    batch_scenes: int = 8
    """Scenes per batch, each with all edits."""


def caption(edit: Edit, ball: int, block: int) -> str:
    """Return the caption of an edited scene with the colors of ball and block.

    Args:
        edit: The edit.
        ball: Color of the ball before the edit, an index into TOY_COLORS.
        block: Color of the block before the edit, an index into TOY_COLORS.
    """
    text = edit.caption
    for name, number in (("ball", ball), ("block", block)):
        color = COLOR_NAMES[number]
        text = text.replace(f"a {name}", f"{'an' if color[0] in 'aeiou' else 'a'} {color} {name}")
    return text


def toy_colors(seeds: range) -> Int[Tensor, "b 2"]:
    """Return the indices into TOY_COLORS of ball and block of each scene."""
    colors = sample_scenes(seeds).colors[:, [MATERIALS.index("ball"), MATERIALS.index("block")]]
    return torch.cdist(colors, torch.tensor(TOY_COLORS)).argmin(-1)


def words() -> list[str]:
    """Return the sorted words of all captions, split like CLIP's tokenizer."""
    text = " ".join(caption(edit, n, n) + " " + edit.caption for edit in EDITS for n in range(len(TOY_COLORS)))
    return sorted({*text.replace(",", " ,").split()})


def build_clip() -> CLIPModel:
    """Build the untrained CLIP model (0.4 M parameters)."""
    entries, _ = vocabulary(words())
    text = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"vocab_size": len(entries), "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": entries[START], "eos_token_id": entries[END], "pad_token_id": entries[END]}
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3}
    vision |= {"image_size": SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def contrastive_loss(
    image_embeddings: Float[Tensor, "n d"],
    text_embeddings: Float[Tensor, "n d"],
    same: Tensor,
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Compute CLIP's loss for images that may share captions.

    Args:
        image_embeddings: Embeddings of the images (unit vectors).
        text_embeddings: Embeddings of their captions (unit vectors).
        same: Bool (n, n); whether two captions are equal.
        scale: Factor of the cosine similarities.
    """
    logits, targets = scale * image_embeddings @ text_embeddings.T, same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train(options: Options, clip: ClipEncoder, images: UInt8[np.ndarray, "scenes edits h w 3"], colors: Tensor) -> None:
    """Train a CLIP model; the learning rate decays to zero.

    Args:
        options: Options of the training.
        clip: The model.
        images: 8-bit images of the training scenes.
        colors: Colors of ball and block of each scene, from `toy_colors`.
    """
    model = clip.model.train().requires_grad_(True)
    optimizer = MuonAndAdamW([model], muon_rate=2e-3, adamw_rate=1.5e-3)
    draw = np.random.default_rng(options.seed)
    start, losses, hits = time.monotonic(), [], []
    for step in range(options.steps):
        chosen = draw.choice(len(images), options.batch_scenes, replace=False)
        batch = torch.from_numpy(images[np.sort(chosen)]).flatten(0, 1).float() / 255
        if draw.random() < 0.5:
            batch = batch.flip(2)
        # Captions with and without colors alternate: in one batch both would match the image.
        if step % 2:
            captions = [caption(edit, *colors[i].tolist()) for i in np.sort(chosen) for edit in EDITS]
        else:
            captions = [edit.caption for _ in chosen for edit in EDITS]
        distinct = list(dict.fromkeys(captions))
        which = torch.tensor([distinct.index(text) for text in captions])
        image_embeddings = F.normalize(
            model.visual_projection(model.vision_model(pixel_values=prepare_pixels(batch, SIZE)).pooler_output), dim=-1
        )
        tokens = clip.tokenizer(distinct, padding="max_length", max_length=TOKENS, return_tensors="pt")
        read = model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        text_embeddings = F.normalize(model.text_projection(read), dim=-1)[which]
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(image_embeddings, text_embeddings, which[:, None] == which, scale)
        optimizer.zero_grad()
        loss.backward()
        progress = step / options.steps
        optimizer.step(min(1.0, (step + 1) / 50, 2 * (1 - progress)))
        losses.append(loss.item())
        with torch.no_grad():
            scores = (image_embeddings @ text_embeddings.T).unflatten(1, (options.batch_scenes, -1))
            own = scores[torch.arange(len(image_embeddings)), torch.arange(len(image_embeddings)) // len(EDITS)]
            hits.append((own.argmax(-1) == torch.arange(len(image_embeddings)) % len(EDITS)).float().mean().item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}, {time.monotonic() - start:.0f} s, loss {np.mean(losses[-50:]):.3f}, "
                f"right captions {np.mean(hits[-50:]):.3f}, scale {scale.item():.1f}",
                flush=True,
            )
    model.eval().requires_grad_(False)


def evaluate(clip: ClipEncoder, images: UInt8[np.ndarray, "scenes edits h w 3"]) -> dict[str, Any]:
    """Evaluate a CLIP model on scenes and their ground-truth edits.

    Args:
        clip: The model.
        images: 8-bit images of the scenes after every edit.

    Returns:
        Per edit: `accuracy` of choosing the caption among those of all edits; `own_direction`, the mean direction similarity
        with the edit's own captions; `other_direction`, with those of the other edits; `swapped_direction`, of a recolored ball
        with the captions of the block in the same color, and vice versa.
    """
    image_embeddings = torch.stack([clip.embed_images(torch.from_numpy(scene).float() / 255) for scene in images])
    text_embeddings = clip.embed_texts([edit.caption for edit in EDITS])
    right = (image_embeddings @ text_embeddings.T).argmax(-1) == torch.arange(len(EDITS))
    slugs = [edit.slug for edit in EDITS]
    names = ("accuracy", "own_direction", "other_direction", "swapped_direction")
    result: dict[str, Any] = {"scenes": len(images), **{name: {} for name in names}}
    for number, edit in enumerate(EDITS):
        result["accuracy"][edit.slug] = round(right[:, number].float().mean().item(), 3)
        if number == NO_CHANGE:
            continue
        before, after = image_embeddings[:, NO_CHANGE], image_embeddings[:, number]
        by_caption = torch.stack(
            [
                metrics.direction_similarity(before, after, text_embeddings[NO_CHANGE], text)
                for text in text_embeddings[:NO_CHANGE]
            ]
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
    """Render the images, train the model and evaluate it."""
    folder = options.out / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": TRAIN_SEEDS[: options.scenes], "test": TEST_SEEDS[: options.test_scenes]}
    for name, seeds in splits.items():
        render_array(options.out / f"{name}.npy", seeds, SIZE, SIZE)
    print("rendered", flush=True)
    images = {name: np.load(options.out / f"{name}.npy", mmap_mode="r") for name in splits}
    torch.manual_seed(options.seed)
    write_tokenizer(folder, words(), TOKENS)
    build_clip().save_pretrained(folder)
    clip = load_clip(str(folder))
    train(options, clip, images["train"], toy_colors(splits["train"]))
    clip.model.half().save_pretrained(folder)
    results = evaluate(load_clip(str(folder)), images["test"])
    (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", "utf8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
