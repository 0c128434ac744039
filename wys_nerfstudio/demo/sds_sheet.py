"""Comparison of local edits and SDS (eq. 13, supplement E): `python -m wys_nerfstudio.demo.sds_sheet OUT.png`.

Edits held-out images of the toy world by both methods with the same relevance maps and masks, writes a contact sheet and prints
the PSNR to the ground truth inside and outside the ground-truth mask.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.demo.images import held_out_views
from wys_nerfstudio.demo.instructions import BY_SLUG, EDITS
from wys_nerfstudio.editing import EMBEDDED, EditSettings, edit_image, load_editor
from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.utils.visualization import SOFTWARE, apply_colormap, contact_sheet, save_png

SLUGS = ("ball-blue", "block-red", "panda", "polar-bear", "hat")
TINY = wys_tiny.config.pipeline


@dataclass
class Options:
    """Options of the comparison."""

    out: tyro.conf.Positional[Path]
    """Output file of the contact sheet (.png)."""
    images: int = 10
    """Number of images to average over; the sheet shows the first image of each edit."""


def main(options: Options) -> None:
    """Edit the images, write the contact sheet and print the metrics."""
    editor = load_editor(EMBEDDED)
    local = EditSettings(
        guidance_scale=TINY.guidance_scale,  # type: ignore
        image_guidance_scale=TINY.image_guidance_scale,  # type: ignore
        mask_threshold=TINY.mask_threshold,  # type: ignore
        relevance_num_samples=TINY.relevance_num_samples,  # type: ignore
        relevance_outlier_factor=TINY.relevance_outlier_factor,  # type: ignore
        diffusion_steps=50,
    )
    rows, values = [], []
    chosen = [EDITS.index(BY_SLUG[slug]) for slug in SLUGS]
    for number, view in zip(range(options.images), held_out_views(chosen)):
        edit = chosen[number % len(chosen)]
        before, target = view[-1].float() / 255, view[edit].float() / 255
        changed = (view[edit] != view[-1]).any(-1)
        instruction = EDITS[edit].wordings[0]
        edits = [
            edit_image(editor, before, instruction, replace(local, method=method))  # type: ignore
            for method in ("local", "sds")
        ]
        values.append([metrics.psnr(e.edited, target, m) for e in edits for m in (changed, ~changed)])
        if number < len(chosen):
            relevance, mask = apply_colormap(edits[0].relevance), edits[0].mask.float()[..., None].expand(-1, -1, 3)
            rows.append((instruction, [before, relevance, mask, edits[0].edited, edits[1].edited, target]))
    titles = ["captured", "relevance", "mask", "local edit", "SDS", "ground truth"]
    save_png(options.out, contact_sheet(titles, rows, min_height=128), f"edited with {SOFTWARE}")
    inside, outside, sds_inside, sds_outside = np.mean(values, axis=0)
    print(f"PSNR to the ground truth inside and outside the ground-truth mask, means of {len(values)} images:")
    print(f"local edit {inside:.1f} and {outside:.1f} dB, SDS {sds_inside:.1f} and {sds_outside:.1f} dB")


if __name__ == "__main__":
    with torch.no_grad():
        main(tyro.cli(Options))
