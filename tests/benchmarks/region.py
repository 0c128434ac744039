"""Steps of FLUX.2 that compute the mask's tokens only: operations saved, and how far edits are from those of whole steps.

Operations are those of FLUX.2-klein-4B and its base model in their full sizes, counted as in `flops.py`, for square masks. Edits are
those of held-out pictures of the toy world with a trained editor in FLUX.2's format. Their masks are the pixels that the true edit
changes, widened to a quarter of the picture. What another seed and bfloat16 change is the measure of the error. Writes `region.json`.

    python tests/benchmarks/region.py EDITOR --output DIR
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from flops import INSTRUCTION, build_editors, cost_in_run, edit_cost, strengths_of_edits
from flux2_cache import RegionEditor
from jaxtyping import Bool
from meta_device import Cost, on_meta_device
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.demo.images import LOCAL, held_out_views
from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.editing import EditOptions, Editor, EditSettings, edit_images, load_editor
from wys_nerfstudio.editing.flux2 import Flux2Editor
from wys_nerfstudio.evaluation.metrics import psnr


@dataclass
class Options:
    """Options of the benchmark."""

    editor: tyro.conf.Positional[Path]
    """Folder of a trained editor of the toy world in FLUX.2's format."""
    output: Path
    """Folder for region.json."""
    every: tuple[int, ...] = (2, 4, 8)
    """Steps from one whole pass to the next."""
    shares: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Shares of the image that masks cover, for the operations."""
    sides: tuple[int, ...] = (512, 1024)
    """Sides of the image in pixels, for the operations."""
    pictures: int = 24
    """Pictures of the toy world that are edited."""
    share: float = 0.25
    """Share of the picture that their masks cover at least."""
    guidance_scales: tuple[float, ...] = (1.0, 4.0)
    """S_T of the edits."""
    seeds: int = 3
    """Further seeds of every edit with whole steps."""
    steps: int = 20
    """Steps of the edits, which start from pure noise."""


@dataclass
class Gain:
    """Operations of the mean edit of a scene, relative to whole steps."""

    editor: str
    """Name of the editor."""
    side: int
    """Side of the image in pixels."""
    every: int
    """Steps from one whole pass to the next."""
    share: float
    """Share of the image that the mask covers."""
    cache_gb: float
    """Memory of the cache in GB."""
    whole_tflop: float
    """TFLOP of a whole step."""
    region_tflop: float
    """TFLOP of a step in the region."""
    gain: float
    """Operations with whole steps divided by those with this cache, encodings and decoding included."""


@dataclass
class Edits:
    """Edits of all pictures in one way."""

    way: str
    """Whole passes every so many steps, or with each another seed or precision, or no edit."""
    guidance_scale: float
    """S_T."""
    to_whole: float
    """PSNR to the edits of whole steps inside the mask, of the mean squared error of all pictures, in dB."""
    to_truth: float
    """Mean PSNR to the true edit inside the mask, in dB."""


def square_mask(side: int, share: float) -> Bool[Tensor, "1 side side"]:
    """A centered square that covers a share of the latents."""
    length = round(side * share**0.5)
    first = (side - length) // 2
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, first : first + length, first : first + length] = True
    return mask


def step_costs(editor: Flux2Editor, region: Bool[Tensor, "1 h w"], settings: EditSettings) -> tuple[Cost, Cost, Cost]:
    """Costs of a step without cache, of a step that fills it, and of a step in a region."""
    condition = torch.empty(1, editor.transformer.config.in_channels, *region.shape[1:], device="meta")
    level = editor.noise_level(0.8, (region.shape[1], region.shape[2]))
    branches = editor.branches(settings.guidance_scale, 1.0)
    predict_all = editor.predictor(condition, INSTRUCTION, branches)
    predict = RegionEditor(editor, region, full_pass_every=2).predictor(condition, INSTRUCTION, branches)
    plain = cost_in_run(editor, lambda: predict_all(condition, level))
    filling, in_region = (cost_in_run(editor, lambda: predict(condition, level)) for _ in range(2))
    return plain, filling, in_region


def gains(editor: Flux2Editor, side: int, options: Options) -> Iterator[Gain]:
    """Count the operations of an editor at an image size on the meta device."""
    settings = EditOptions(diffusion_steps=1).resolve(editor.profile.of_scenes)
    size, steps = editor.latent_size(side, side), editor.profile.of_scenes.diffusion_steps
    counts = [len(editor.noise_levels(strength, steps, size)) - 1 for strength in strengths_of_edits(400)]
    one_step = edit_cost(editor, side, settings).flop
    for share in options.shares:
        plain, filling, in_region = step_costs(editor, square_mask(size[0], share), settings)
        whole = plain.flop
        for every in options.every:
            passes = [-(-number // every) for number in counts]
            cached = mean(
                one_step + (full - 1) * whole + (number - full) * in_region.flop for number, full in zip(counts, passes)
            )
            yield Gain(
                editor=editor.name,
                side=side,
                every=every,
                share=share,
                cache_gb=(filling.peak_bytes - plain.peak_bytes) / 1e9,
                whole_tflop=whole / 1e12,
                region_tflop=in_region.flop / 1e12,
                gain=(one_step + (mean(counts) - 1) * whole) / cached,
            )


def pictures(options: Options) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
    """Held-out pictures: the picture, its true edit, the mask and the instruction."""
    edits = [edit for first in range(5) for edit in LOCAL[first::5]]  # neighbors in the list are alike
    for number, view in zip(range(options.pictures), held_out_views(edits)):
        edit = edits[number % len(edits)]
        mask = (view[edit] != view[-1]).any(-1)[None]
        while mask.float().mean() < options.share:
            mask = relevance.dilate(mask)
        yield view[-1][None].float() / 255, view[edit][None].float() / 255, mask, EDITS[edit].wordings[0]


def measure_edits(editors: dict[str, Editor], options: Options, guidance_scale: float) -> list[Edits]:
    """Edit the pictures in all ways.

    Args:
        editors: The editor in float32 and bfloat16.
        options: Pictures and ways.
        guidance_scale: S_T.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for number, (picture, truth, mask, instruction) in enumerate(pictures(options)):

        def edit(every: int, seed: int, dtype: str = "float32") -> Tensor:
            editor: Any = editors[dtype]
            region = relevance.latent_mask(mask, *editor.latent_size(*mask.shape[1:]))
            editor = editor if every == 1 else RegionEditor(editor, region, every)
            settings = EditSettings(guidance_scale, 1.0, options.steps)
            return edit_images(editor, picture, picture, mask, instruction, settings, strength=1.0, seeds=[seed])

        whole = edit(1, number)
        results = {f"every {every} steps": edit(every, number) for every in options.every}
        results |= {f"seed {i}": edit(1, i * 1000 + number) for i in range(1, options.seeds + 1)}
        results["bfloat16"] = edit(1, number, "bfloat16")
        for way, result in {"every step": whole, **results, "not edited": picture}.items():
            squared = float((result - whole)[mask].square().mean())
            errors.setdefault(way, []).append((squared, psnr(result, truth, mask)))
    return [
        Edits(way, guidance_scale, _decibels(mean(e for e, _ in pairs)), mean(t for _, t in pairs))
        for way, pairs in errors.items()
    ]


def _decibels(squared_error: float) -> float:
    return float(-10 * torch.tensor(squared_error).log10())


def main(options: Options) -> None:
    """Measure, print the tables and write the JSON file."""
    options.output.mkdir(parents=True, exist_ok=True)
    with on_meta_device():
        editors_of_full_size = [editor for editor in build_editors() if isinstance(editor, Flux2Editor)]
        counted = [g for editor in editors_of_full_size for side in options.sides for g in gains(editor, side, options)]
    print(
        "| editor | side | whole pass every | mask | whole step, TFLOP | step in the mask, TFLOP | gain | cache, GB |"
    )
    print("|---" * 8 + "|")
    for g in counted:
        steps = f"{g.whole_tflop:.2f} | {g.region_tflop:.2f} | {g.gain:.2f} | {g.cache_gb:.2f}"
        print(f"| {g.editor} | {g.side} | {g.every} | {g.share:.0%} | {steps} |", flush=True)
    editors: dict[str, Editor] = {
        name: load_editor(str(options.editor), dtype=name) for name in ("float32", "bfloat16")
    }
    edits = [row for scale in options.guidance_scales for row in measure_edits(editors, options, scale)]
    print("| S_T | whole pass | PSNR to whole steps, dB | PSNR to the truth, dB |\n|---|---|---|---|")
    for row in edits:
        print(f"| {row.guidance_scale:g} | {row.way} | {row.to_whole:.1f} | {row.to_truth:.2f} |")
    result = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in asdict(options).items()},
        "gains": [asdict(gain) for gain in counted],
        "edits": [asdict(row) for row in edits],
    }
    (options.output / "region.json").write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
