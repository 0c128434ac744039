"""Evaluation of the demo editor on held-out scenes: `python -m wys_nerfstudio.demo.training.evaluate_editor EDITOR_FOLDER`.

Compares relevance maps and edits with the toy world's ground truth and with baselines on the test split, or on the validation
split to choose settings. Writes `evaluation.json`, the tables of the model card and a contact sheet.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.demo.instructions import BY_SLUG, EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.world import TEST_SEEDS, VALIDATION_SEEDS, sample_cameras, sample_scenes
from wys_nerfstudio.editing import Editor, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.utils.visualization import apply_colormap

INDEX = {edit.slug: number for number, edit in enumerate(EDITS)}
LOCAL = [edit for edit in EDITS if edit.kind in LOCAL_KINDS]
ROWS = {
    "recolor ball": [e.slug for e in LOCAL if e.target == "ball"],
    "recolor block": [e.slug for e in LOCAL if e.target == "block"],
    "panda": ["panda"],
    "polar bear": ["polar-bear"],
    "hat": ["hat"],
    "sunglasses": ["sunglasses"],
}
TINY: WysPipelineConfig = wys_tiny.config.pipeline  # type: ignore
MAX_DRAWS = 8
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
_OTHER_EDIT_OFFSET = 5
"""Offset in the list of local edits to an edit of another object."""


@dataclass
class Options:
    """Options of the evaluation."""

    editor: tyro.conf.Positional[Path]
    """Folder of the editor; the results are written into it."""
    split: Literal["test", "validation"] = "test"
    """Split of the scenes; settings are chosen on validation scenes only."""
    scenes: int = 204
    """Number of scenes, with one edit each."""
    grid_scenes: int = 36
    """Number of scenes in the comparison of noise levels."""
    edit_scenes: int = 72
    """Number of scenes that are edited."""
    guidance_scale: float = TINY.guidance_scale  # type: ignore
    """S_T of the edits."""
    image_guidance_scale: float = TINY.image_guidance_scale  # type: ignore
    """S_I of the edits."""
    mask_threshold: float = TINY.mask_threshold
    """tau of the local edit."""
    noise_level: float = 0.8
    """t_rel of the maps."""
    draws: int = TINY.relevance_num_samples
    """Number of noise samples of the local edit's map."""
    outlier_factor: float = TINY.relevance_outlier_factor
    """Width of the outlier fence of the maps, in interquartile ranges."""
    diffusion_steps: int = TINY.diffusion_steps  # type: ignore
    """DDIM steps of an edit."""


@dataclass
class Case:
    """All scenes of one edit."""

    slug: str
    """The edit."""
    scenes: list[int]
    """Indices of the scenes."""
    before: Float[Tensor, "b h w 3"]
    """Unedited images."""
    after: Float[Tensor, "b h w 3"]
    """Ground truth of the edit."""
    changed: Bool[Tensor, "b h w"]
    """Changed pixels."""
    others: Bool[Tensor, "b h w"]
    """Pixels of the other objects."""
    maps: dict[float, Float[Tensor, "draws b h w"]]
    """Raw relevance by noise level, one map per noise sample, at image resolution."""
    unrelated: Float[Tensor, "b h w"]
    """Raw relevance of an instruction that refers to another object."""


def render_split(seeds: Sequence[int], width: int = 80, height: int = 64) -> UInt8[Tensor, "b edits h w 3"]:
    """Render scenes after every edit, in chunks."""
    chunks = []
    for first in range(0, len(seeds), 16):
        part = seeds[first : first + 16]
        scene = sample_scenes(part)
        chunks.append(render_edits(scene, sample_cameras(scene, part, width, height)))
    return torch.cat(chunks)


def change_masks(images: UInt8[Tensor, "b edits h w 3"]) -> Bool[Tensor, "b edits h w"]:
    """Return the pixels that differ from the unedited image."""
    return (images != images[:, INDEX["no-change"]][:, None]).any(-1)


def object_masks(changed: Bool[Tensor, "b edits h w"]) -> dict[str, Bool[Tensor, "b h w"]]:
    """Return the pixels of the three objects: those changed by any edit of the object."""
    return {
        "ball": changed[:, [INDEX[e.slug] for e in LOCAL if e.target == "ball"]].any(1),
        "block": changed[:, [INDEX[e.slug] for e in LOCAL if e.target == "block"]].any(1),
        "bear": changed[:, [INDEX["panda"], INDEX["polar-bear"]]].any(1),
    }


def make_cases(images: UInt8[Tensor, "b edits h w 3"]) -> list[Case]:
    """Assign one edit to each scene, all edits equally often; scenes in which the edit is not visible are omitted."""
    changed = change_masks(images)
    objects = object_masks(changed)
    cases = []
    for number, edit in enumerate(LOCAL):
        target = changed[:, INDEX[edit.slug]]
        scenes = [s for s in range(len(images)) if s % len(LOCAL) == number and target[s].any()]
        named = edit.target if edit.target in objects else "bear"
        others = torch.stack([mask for name, mask in objects.items() if name != named]).any(0) & ~target
        before, after = (images[scenes, INDEX[slug]].float() / 255 for slug in ("no-change", edit.slug))
        cases.append(Case(edit.slug, scenes, before, after, target[scenes], others[scenes], {}, torch.zeros(0, 1, 1)))
    return cases


def raw_map(editor: Editor, case: Case, slug: str, level: float, draw: int, count: int) -> Float[Tensor, "b h w"]:
    """Compute raw maps of the first `count` scenes of a case with one noise sample, at image resolution."""
    maps = relevance_maps(
        editor,
        case.before[:count],
        BY_SLUG[slug].wordings[0],
        noise_level=level,
        seeds=[scene * MAX_DRAWS + draw for scene in case.scenes[:count]],
        batch_size=18,
    )
    return relevance.resize(torch.cat(list(maps)), *case.before.shape[1:3])


def add_maps(editor: Editor, case: Case, level: float, count: int) -> None:
    """Compute the maps of the first `count` scenes of a case at one noise level."""
    case.maps[level] = torch.stack([raw_map(editor, case, case.slug, level, d, count) for d in range(MAX_DRAWS)])


def _mean(values: Sequence[float]) -> float:
    return float(np.nanmean(values)) if len(values) else float("nan")


def precision(case: Case, maps: Tensor) -> list[float]:
    """Compute the average precision of each image."""
    return [metrics.average_precision(m, t) for m, t in zip(maps, case.changed)]


def measure_maps(cases: list[Case], options: Options, prior: Tensor) -> dict[str, dict[str, float]]:
    """Compute the metrics of the maps by kind of edit.

    Args:
        cases: Cases with maps of MAX_DRAWS noise samples.
        options: Noise level and number of samples.
        prior: Mean change mask of every edit over validation scenes, "edits h w".

    Returns:
        Values by row and metric.
    """
    by_slug = {case.slug: case for case in cases}
    table = {}
    for name, slugs in (*ROWS.items(), ("all", [e.slug for e in LOCAL])):
        values: dict[str, list[float]] = {}

        def add(metric: str, new: Sequence[float], values: dict[str, list[float]] = values) -> None:
            values.setdefault(metric, []).extend(new)

        for case in (by_slug[slug] for slug in slugs):
            raw = case.maps[options.noise_level]
            for draws in (1, 4, 8):
                maps = raw[:draws].mean(0)
                normal = relevance.normalize(maps, outlier_factor=options.outlier_factor)
                add(f"AP N={draws}", precision(case, maps))
                add(f"AP N={draws} clamped", precision(case, normal))
                add(f"AUC N={draws}", [metrics.roc_auc(m, t) for m, t in zip(maps, case.changed)])
                for tau in (0.4, 0.5):
                    masks = relevance.threshold(normal, tau)
                    add(
                        f"IoU {tau} N={draws}",
                        [metrics.intersection_over_union(m, t) for m, t in zip(masks, case.changed)],
                    )
            normal = relevance.normalize(raw[: options.draws].mean(0), outlier_factor=options.outlier_factor)
            visible = [i for i in range(len(normal)) if case.others[i].any()]
            add("relevance on the named", [normal[i][case.changed[i]].mean().item() for i in visible])
            add("relevance on the others", [normal[i][case.others[i]].mean().item() for i in visible])
            random = torch.rand(case.changed.shape, generator=torch.Generator().manual_seed(0))
            add("AP random", precision(case, random))
            add("AP any object", precision(case, (case.others | case.changed).float()))
            add("AP mean mask", precision(case, prior[INDEX[case.slug]].expand_as(random)))
            add("AP other instruction", precision(case, case.unrelated))
        table[name] = {metric: _mean(numbers) for metric, numbers in values.items()}
        table[name]["wrong-object ratio"] = table[name].pop("relevance on the named") / table[name].pop(
            "relevance on the others"
        )
        table[name]["images"] = len(values["AP N=1"])
    return table


def measure_edits(
    editor: Editor, cases: list[Case], options: Options, count: int
) -> tuple[dict[str, dict[str, float]], list]:
    """PSNR of plain InstructPix2Pix and of the local edit by kind of edit, and rows for the contact sheet."""
    settings = EditSettings(options.guidance_scale, options.image_guidance_scale, options.diffusion_steps)
    parts: dict[str, dict[str, Tensor]] = {}
    for case in cases:
        before, after, changed = case.before[:count], case.after[:count], case.changed[:count]
        raw = case.maps[options.noise_level][: options.draws, :count].mean(0)
        maps = relevance.normalize(raw, outlier_factor=options.outlier_factor)
        masks = {"plain": torch.ones_like(changed), "local": relevance.threshold(maps, options.mask_threshold)}
        results = {"unedited": before, "ceiling": editor.decode(editor.encode(after).latents)}
        for name, mask in masks.items():
            results[name] = edit_images(
                editor,
                before,
                before,
                mask,
                BY_SLUG[case.slug].wordings[0],
                settings,
                strength=1.0,
                seeds=case.scenes[:count],
            )
        parts[case.slug] = {**results, "after": after, "changed": changed, "map": maps, "mask": masks["local"]}
    table = {}
    for name, slugs in (*ROWS.items(), ("all", [e.slug for e in LOCAL])):
        pooled = {key: torch.cat([parts[s][key] for s in slugs]) for key in parts[slugs[0]]}
        inside, outside = pooled["changed"], ~pooled["changed"]
        table[name] = {
            f"{where} {kind}": metrics.psnr(pooled[kind], pooled["after"], mask)
            for where, mask in (("inside", inside), ("outside", outside))
            for kind in ("unedited", "plain", "local", "ceiling")
            if (where, kind) != ("outside", "unedited")
        }
        table[name]["images"] = len(inside)
    rows = [
        [
            part["unedited"][0],
            apply_colormap(part["map"][0]),
            part["mask"][0][..., None].expand(-1, -1, 3).float(),
            part["plain"][0],
            part["local"][0],
            part["after"][0],
        ]
        for part in parts.values()
    ]
    return table, rows


def write_sheet(rows: list[list[Tensor]], file: Path) -> None:
    """Write a grid of images, enlarged twice: before, map, mask, plain InstructPix2Pix, local edit, ground truth."""
    half = (len(rows) + 1) // 2
    lines = [torch.cat(row, 1) for row in rows]
    lines += [torch.zeros_like(lines[0])] * (2 * half - len(lines))
    grid = torch.cat([torch.cat(lines[:half]), torch.cat(lines[half:])], 1)
    image = Image.fromarray((grid * 255).round().to(torch.uint8).numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(file, optimize=True)


def markdown(title: str, table: dict[str, dict[str, float]], metric_names: Sequence[str], digits: int) -> str:
    """Return a table of the model card."""
    lines = [f"**{title}**", "", "| edit | " + " | ".join(metric_names) + " |", "|---" * (len(metric_names) + 1) + "|"]
    for name, row in table.items():
        cells = [f"{row[m]:.0f}" if m == "images" else f"{row[m]:.{digits}f}" for m in metric_names]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_card(folder: Path, result: dict) -> None:
    """Replace the tables between the markers in the model card, if it has markers."""
    maps, edits = result["maps"], result["edits"]
    levels = {f"t_rel {level}": row for level, row in result["noise levels"].items()}
    baselines = ["AP random", "AP any object", "AP mean mask", "AP other instruction"]
    text = "\n".join(
        [
            f"VAE: {result['vae psnr']:.1f} dB on unedited and edited test images.\n",
            markdown("Relevance maps", maps, ["AP N=1", "AP N=4", "AP N=8", *baselines, "images"], 2),
            markdown(
                "Masks and objects",
                maps,
                ["AUC N=1", "AUC N=4", "AUC N=8", *(f"IoU {t} N={n}" for t in (0.4, 0.5) for n in (1, 4, 8))]
                + ["AP N=4 clamped", "wrong-object ratio"],
                2,
            ),
            markdown("Noise levels, all local edits", levels, list(next(iter(levels.values()))), 2),
            markdown("PSNR against the ground truth in dB", edits, list(next(iter(edits.values()))), 1),
        ]
    )
    card = folder / "README.md"
    markers = re.compile(r"(<!-- metrics -->\n).*(<!-- end of metrics -->)", re.S)
    if card.exists():
        card.write_text(markers.sub(lambda match: match[1] + text + match[2], card.read_text()))


@torch.inference_mode()
def main(options: Options) -> None:
    """Evaluate the editor and write all results."""
    editor = load_editor(str(options.editor))
    split = TEST_SEEDS if options.split == "test" else VALIDATION_SEEDS
    images = render_split(split[: options.scenes])
    prior = change_masks(render_split(VALIDATION_SEEDS[200:328])).float().mean(0)
    cases = make_cases(images)
    sample = images[::4, [INDEX["no-change"], INDEX["panda"], INDEX["hat"]]].flatten(0, 1).float() / 255
    result: dict = {"options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}}
    result["options"].pop("editor")
    result["vae psnr"] = metrics.psnr(editor.decode(editor.encode(sample).latents), sample)
    grid = max(options.grid_scenes // len(LOCAL), 1)
    for number, case in enumerate(cases):
        add_maps(editor, case, options.noise_level, len(case.scenes))
        other = LOCAL[(number + _OTHER_EDIT_OFFSET) % len(LOCAL)].slug
        case.unrelated = raw_map(editor, case, other, options.noise_level, 0, len(case.scenes))
        print(f"maps: {case.slug}", flush=True)
    result["maps"] = measure_maps(cases, options, prior)
    count = max(options.edit_scenes // len(LOCAL), 1)
    result["edits"], rows = measure_edits(editor, cases, options, count)
    write_sheet(rows, options.editor / "contact_sheet.png")
    result["noise levels"] = {}
    for level in LEVELS:
        scores: dict[str, list[float]] = {}
        for case in cases:
            if level != options.noise_level:
                add_maps(editor, case, level, grid)
            for draws in (1, 4, 8):
                maps = case.maps[level][:draws, :grid].mean(0)
                scores.setdefault(f"AP N={draws}", []).extend(precision(case, maps))
                masks = relevance.threshold(relevance.normalize(maps, outlier_factor=options.outlier_factor), 0.5)
                scores.setdefault(f"IoU 0.5 N={draws}", []).extend(
                    metrics.intersection_over_union(m, t) for m, t in zip(masks, case.changed)
                )
        result["noise levels"][str(level)] = {key: _mean(values) for key, values in scores.items()}
        result["noise levels"][str(level)]["images"] = len(scores["AP N=1"])
    (options.editor / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    write_card(options.editor, result)


if __name__ == "__main__":
    main(tyro.cli(Options))
