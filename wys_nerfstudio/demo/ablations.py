"""`wys ablate`: the paper's ablations F and G on the demo scene, compared with its ground truth.

One reconstruction is edited with several seeds per localization: relevance field (the method), relevance maps of the views
(ablation F), given masks (ablation G; here the ground-truth masks) and no localization (Instruct-NeRF2NeRF).
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table
from torch import Tensor

from wys_nerfstudio.demo.scene import write_demo_scene
from wys_nerfstudio.demo.score import load_captured_scene
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.metrics import intersection_over_union, psnr
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import SOFTWARE, contact_sheet, evenly_spaced, read_png, save_png

VARIANTS = {
    "none": "nothing (Instruct-NeRF2NeRF)",
    "masks": "true masks",
    "relevance-map": "2D relevance maps",
    "relevance-field": "relevance field",
}
METRICS = {
    "view_psnr_outside": "views outside, dB",
    "truth_psnr_outside": "outside, dB",
    "truth_psnr_inside": "inside, dB",
    "edit_psnr": "Edit PSNR, dB",
    "clip_image_similarity": "CLIP image sim.",
    "clip_direction_similarity": "CLIP direction sim.",
    "mask_iou": "mask IoU",
}
LOCALIZATION = ("--mask-threshold", "0.5", "--pipeline.relevance-outlier-factor", "1.5", "--pipeline.relevance-num-samples", "1",
                "--pipeline.model.relevance-expectile", "0.75")  # fmt: skip
"""Localization options of `wys` (threshold, fence and samples as in the paper); those of wys-tiny suit the demo editor's maps."""
SHOWN_VIEWS = 4
"""Number of views in the contact sheet."""

Metrics = dict[str, float]


def run_ablations(output: Path, instruction: str, seeds: int) -> None:
    """Run the missing variants, print the table and write `ablations.json` and `contact_sheet.png`.

    Args:
        output: Folder of the scene, the runs and the results.
        instruction: What to change; an instruction with ground truth.
        seeds: Number of seeds per variant.

    Raises:
        WysError: If the instruction has no ground truth, or training fails.
    """
    if seeds < 1:
        raise WysError(f"--seeds must be at least 1, not {seeds}.")
    scene = output / "scene"
    if not (scene / "transforms.json").is_file():
        CONSOLE.print("Rendering the demo scene ...")
        write_demo_scene(scene)
    ground_truth = GroundTruth.find(scene, instruction)
    if ground_truth is None:
        raise WysError(
            f'The demo scene has no ground truth for "{instruction}": choose an instruction listed in '
            f'"{scene / "ground_truth" / "edits.json"}".'
        )
    common = ["--data", str(scene), "--instruction", instruction, "--output-dir", str(output / "runs")]
    common += ["--timestamp", "run", "--pipeline.clip-model", "embedded"]
    base = _folder(output, "base")
    if not (base / "wys" / "contact_sheet.png").is_file():
        # A run has at least one edit step. Its weights from before that step are the base.
        _train([*common, "--experiment-name", "base", "--localization", "none", "--pipeline.edit-steps", "1"])
    metrics: dict[str, list[Metrics]] = {"before": [], **{variant: [] for variant in VARIANTS}}
    metrics["before"].append(_evaluate(base, ground_truth, captured=True)[0])
    renders: dict[str, dict[str, Tensor]] = {}
    for seed in range(seeds):
        for variant in VARIANTS:
            name = f"{ground_truth.folder.name}-{variant}-{seed}"
            run = _folder(output, name)
            if not (run / "wys" / "contact_sheet.png").is_file():
                options = [
                    "--experiment-name",
                    name,
                    "--base-run",
                    str(base / "wys" / CAPTURED_SCENE),
                    "--localization",
                    variant,
                    *LOCALIZATION,
                ]
                options += ["--pipeline.seed", str(seed), "--machine.seed", str(seed)]
                options += ["--pipeline.masks-dir", str(ground_truth.folder / "masks")] if variant == "masks" else []
                _train([*common, *options])
            run_metrics, views = _evaluate(run, ground_truth)
            metrics[variant].append(run_metrics)
            renders.setdefault(variant, views)
    (output / "ablations.json").write_text(json.dumps(metrics, indent=1), "utf8")
    rows = [
        (
            name,
            [
                read_png(scene / "images" / name),
                ground_truth.edited(name),
                *(views[name] for views in renders.values()),
            ],
        )
        for name in renders["none"]
    ]
    sheet = contact_sheet(["captured", "ground truth", *VARIANTS], rows)
    save_png(output / "contact_sheet.png", sheet, f"renders of scenes edited with {SOFTWARE}")
    CONSOLE.print(table(metrics))
    CONSOLE.print(f"See {output}/contact_sheet.png.", markup=False)


def _train(options: Sequence[str]) -> None:
    options = ["wys-tiny", *options, "--vis", "tensorboard"]
    CONSOLE.print(f"$ ns-train {shlex.join(options)}", soft_wrap=True, highlight=False, markup=False)
    # One process per run: nerfstudio's global writers would continue writing to the previous run.
    done = subprocess.run([sys.executable, "-m", "nerfstudio.scripts.train", *options], check=False)
    if done.returncode != 0:
        raise WysError("Training of this variant failed: see the output above.")


def _folder(output: Path, name: str) -> Path:
    return output / "runs" / name / "wys-tiny" / "run"


def _evaluate(run: Path, ground_truth: GroundTruth, *, captured: bool = False) -> tuple[Metrics, dict[str, Tensor]]:
    """Evaluate a run.

    Args:
        run: Folder of the run.
        ground_truth: Ground truth of the edit.
        captured: Evaluate the scene before the first edit.

    Returns:
        The metrics of ns-eval and, unless `captured`, those of the edited views and their masks; renders of some views by name.
    """
    # `eval_setup` can execute code in config.yml, which is safe here: the file has just been written.
    pipeline: Any = eval_setup(run / "config.yml", test_mode="test")[1]
    if captured:
        load_captured_scene(pipeline, run)
    metrics = pipeline.get_average_eval_image_metrics()["edit"]["mean"]
    if not captured:
        masks = sorted((run / "wys" / "masks").glob("*.png"))
        overlaps = [
            intersection_over_union(read_png(file)[..., 0] > 0.5, ground_truth.mask(file.name)) for file in masks
        ]
        metrics["mask_iou"] = sum(overlaps) / len(overlaps)
        edits = {file.name: read_png(file) for file in sorted((run / "wys" / "edits").glob("*.png"))}
        metrics["view_psnr_outside"] = psnr_outside(ground_truth, edits)
    dataset = pipeline.datamanager.train_dataset
    renders = {}
    for view in evenly_spaced(SHOWN_VIEWS, len(dataset)):
        render = pipeline.scene_model.render_view(dataset.cameras, view)["rgb"]
        renders[dataset.image_filenames[view].name] = render.clamp(0, 1).cpu()
    return metrics, renders


def psnr_outside(ground_truth: GroundTruth, edits: Mapping[str, Float[Tensor, "h w 3"]]) -> float:
    """Compute the PSNR of edited training views outside the ground-truth masks, pooled over all views.

    Args:
        ground_truth: Ground truth of the edit.
        edits: Edited training views by name.

    Returns:
        Decibels; infinity if no pixel outside the masks changed.
    """
    if not edits:  # every mask was empty
        return float("inf")
    targets = torch.stack([ground_truth.edited(name) for name in edits])
    outside = ~torch.stack([ground_truth.mask(name) for name in edits])
    return psnr(torch.stack(list(edits.values())), targets, outside)


def table(metrics: dict[str, list[Metrics]]) -> Table:
    """Return a table of means over the seeds, with the range in brackets if the values differ."""
    result = Table(
        title="The paper's ablations on the demo scene: mean over seeds (minimum to maximum)", title_justify="left"
    )
    result.add_column("edits confined by")
    names = [name for name in METRICS if any(name in run for runs in metrics.values() for run in runs)]
    for name in names:
        result.add_column(METRICS[name], justify="right")
    for variant, runs in metrics.items():
        cells = []
        for name in names:
            values = torch.tensor([run[name] for run in runs if name in run])
            digits = 1 if "psnr" in name else 2
            text = f"{values.mean():.{digits}f}" if len(values) else "-"
            if len(values) and values.min() < values.max():
                text += f" ({values.min():.{digits}f} to {values.max():.{digits}f})"
            cells.append(text)
        result.add_row(VARIANTS.get(variant, variant), *cells)
    return result
