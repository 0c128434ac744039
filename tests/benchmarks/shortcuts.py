"""Shortcuts of an edit that this package does not take: what they save and what they cost, on toy pictures with known edits.

- The prediction without image and text only in every second step, or only at high noise levels. In between, its difference from the
  prediction with the image alone, in eps, is that of the step before, or zero.
- The prediction with the image alone only in every second step. In between, its difference from the one with text and image is that of
  the step before.
- No last step: the clean latents of the step before are the result.
- The VAE sees only the mask's box and a margin, at the start (encoder) or at the end (decoder). Its normalization is over the
  picture, so that a crop is not exact.

PSNR is measured inside the mask: to the true edit and to the full edit. Writes `shortcuts.json`.

    python tests/benchmarks/shortcuts.py
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Optional

import torch
import tyro
from families import Picture, pictures
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import EMBEDDED, load_editor
from wys_nerfstudio.editing.editor import NoiseLevel
from wys_nerfstudio.editing.sampling import Denoiser, masked_denoise, seeded_noise
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.evaluation.metrics import psnr


@dataclass
class Options:
    """Options of the benchmark."""

    pictures: int = 12
    """Number of pictures."""
    seeds: int = 3
    """Edits per picture, each with its own noise."""
    guidance: tuple[float, float] = (2.0, 1.5)
    """S_T and S_I; the embedded editor overshoots with the public one's."""
    steps: int = 8
    """Steps of DPM-Solver++(2M) from pure noise."""
    strengths: tuple[float, ...] = (0.98, 0.5, 0.1)
    """Noise that edits start from."""
    output: Path = Path("shortcuts.json")
    """JSON file to write; the table is also printed as Markdown."""


@dataclass
class Edit:
    """Everything that an edit of a picture depends on."""

    editor: StableDiffusionEditor
    picture: Picture
    guidance: tuple[float, float]
    steps: int
    strength: float
    seed: int


Box = tuple[slice, slice]
"""Rows and columns."""


def box_of(mask: Tensor, margin: int) -> Box:
    """The smallest box around a mask (h, w), with a margin."""

    def span(hit: Tensor) -> slice:
        inside = hit.nonzero()
        return slice(max(0, int(inside.min()) - margin), min(len(hit), int(inside.max()) + 1 + margin))

    return span(mask.any(1)), span(mask.any(0))


def in_pixels(box: Box, side: int) -> Box:
    """A box of latents in pixels, `side` per latent."""
    return slice(box[0].start * side, box[0].stop * side), slice(box[1].start * side, box[1].stop * side)


def guided(
    edit: Edit, condition: Tensor, needs_third: Callable[[int, NoiseLevel], Optional[bool]], second_every: int
) -> Denoiser:
    """Denoiser under both guidance scales.

    Args:
        edit: The edit.
        condition: The picture's encoding.
        needs_third: From number and level of a step: compute the prediction without conditions (True), keep the last difference
            (False), or leave it out (None).
        second_every: Steps from one prediction without text to the next.
    """
    editor, (text_scale, image_scale) = edit.editor, edit.guidance
    branches = editor.branches(7.5, 1.5)  # three, whatever the scales here
    predictors = [editor.predictor(condition, edit.picture.instruction, [branch]) for branch in branches]
    count, kept, kept_text = 0, torch.zeros(()), torch.zeros(())

    def denoise(latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        nonlocal count, kept, kept_text

        def predicted(branch: int) -> Tensor:
            return editor.split(predictors[branch](latents, level)[0], latents, level)[1]

        both = predicted(0)
        if count % second_every == 0:
            kept_text = both - predicted(1)
        image = both - kept_text
        needed = needs_third(count, level)
        count += 1
        if needed:
            kept = image - predicted(2)
        elif needed is None:
            kept = torch.zeros_like(image)
        noise = image + (image_scale - 1) * kept + text_scale * kept_text
        return (latents - level.noise * noise) / level.signal, noise

    return denoise


@torch.no_grad()
def run(
    edit: Edit,
    needs_third: Callable[[int, NoiseLevel], Optional[bool]] = lambda step, level: True,
    second_every: int = 1,
    skip_last: bool = False,
    encoder_margin: Optional[int] = None,
    decoder_margin: Optional[int] = None,
) -> Tensor:
    """Return the edited picture (h, w, 3); outside the mask it is the picture. Margins are in latents; None is no crop."""
    editor, picture = edit.editor, edit.picture
    encoding = editor.encode(picture.image[None])
    start = encoding.latents
    size = (start.shape[2], start.shape[3])
    side = picture.image.shape[0] // size[0]
    mask = relevance.latent_mask(picture.mask[None], *size)
    if encoder_margin is not None:
        box = box_of(mask[0], encoder_margin)
        crop = editor.encode(picture.image[in_pixels(box, side)][None]).latents
        start = start.clone()
        start[:, :, box[0], box[1]] = crop
    levels = editor.noise_levels(edit.strength, edit.steps, size)
    if skip_last and len(levels) > 2:
        levels = [*levels[:-2], levels[-1]]
    edited = masked_denoise(
        start=start,
        reference=encoding.latents,
        mask=mask,
        noise=seeded_noise([edit.seed], start.shape[1:], editor.device),
        levels=levels,
        denoise=guided(edit, encoding.condition, needs_third, second_every),
        solver_order=2,
    )
    result = picture.image.clone()
    box = box_of(mask[0], max(size) if decoder_margin is None else decoder_margin)
    result[in_pixels(box, side)] = editor.decode(edited[:, :, box[0], box[1]])[0]
    return torch.where(picture.mask[..., None], result, picture.image)


CASES: dict[str, dict[str, Any]] = {
    "full edit": {},
    "third prediction every second step": {"needs_third": lambda step, level: step % 2 == 0},
    "third prediction only at signal < noise": {
        "needs_third": lambda step, level: True if level.signal < level.noise else None
    },
    "second prediction every second step": {"second_every": 2},
    "no last step": {"skip_last": True},
    "encoder: box with 1 latent": {"encoder_margin": 1},
    "encoder: box with 4 latents": {"encoder_margin": 4},
    "decoder: box with 1 latent": {"decoder_margin": 1},
    "decoder: box with 4 latents": {"decoder_margin": 4},
}
"""Arguments of `run` by the name of the shortcut."""


def measure(editor: StableDiffusionEditor, chosen: Sequence[Picture], options: Options) -> list[dict[str, Any]]:
    """Return a row per shortcut and strength."""
    rows = []
    for strength in options.strengths:
        edits = [
            [
                Edit(editor, picture, options.guidance, options.steps, strength, 1000 * number + seed)
                for number, picture in enumerate(chosen)
            ]
            for seed in range(options.seeds)
        ]
        full = [[run(edit) for edit in of_seed] for of_seed in edits]
        before = mean(psnr(picture.image, picture.edited, picture.mask) for picture in chosen)
        for name, arguments in CASES.items():
            truth, to_full, area = [], [], []
            for of_seed, full_of_seed in zip(edits, full):
                results = [run(edit, **arguments) for edit in of_seed]
                truth.append(
                    mean(psnr(r, e.picture.edited, e.picture.mask) for r, e in zip(results, of_seed, strict=True))
                )
                to_full += [psnr(r, f, e.picture.mask) for r, f, e in zip(results, full_of_seed, of_seed)]
            margin = arguments.get("encoder_margin", arguments.get("decoder_margin"))
            if margin is not None:
                for picture in chosen:
                    mask = relevance.latent_mask(picture.mask[None], *editor.latent_size(*picture.mask.shape))[0]
                    box = box_of(mask, margin)
                    area.append((box[0].stop - box[0].start) * (box[1].stop - box[1].start) / mask.numel())
            rows.append(
                {
                    "start level": strength,
                    "shortcut": name,
                    "share of the picture in the box": round(mean(area), 2) if area else "",
                    "to the truth, dB": round(mean(truth), 2),
                    "range over seeds": f"{min(truth):.2f} to {max(truth):.2f}",
                    "to the full edit, dB": round(mean(to_full), 1) if arguments else "",
                    "before, dB": round(before, 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    editor = load_editor(EMBEDDED)
    assert isinstance(editor, StableDiffusionEditor)
    rows = measure(editor, list(pictures(options.pictures)), options)
    print(f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    options.output.write_text(json.dumps(rows, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
