"""`wys ablate`: the paper's ablations F and G on the demo scene, against its ground truth.

The same reconstruction is edited under the relevance field (the method), under the views' own relevance maps (ablation F),
under given masks (G; here the true ones) and under nothing (Instruct-NeRF2NeRF), each with several seeds.
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
from wys_nerfstudio.utils.visualization import contact_sheet, evenly_spaced, read_png

VARIANTS = {
    "none": "nothing (Instruct-NeRF2NeRF)",
    "masks": "true masks",
    "relevance-map": "2D relevance maps",
    "relevance-field": "relevance field",
}
MEASURES = {
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
"""That of `wys` (threshold, fence and draws are the paper's); wys-tiny's own is tuned to the demo editor's clean maps."""
SHOWN_VIEWS = 4

Metrics = dict[str, float]


def run_ablations(output: Path, instruction: str, seeds: int) -> None:
    """Runs what is not there yet, prints the table and leaves it as `ablations.json`, with `contact_sheet.png`.

    Args:
        output: Folder of scene, runs and results.
        instruction: What to change; one that the demo scene has the truth of.
        seeds: Runs of each variant.

    Raises:
        WysError: If the scene has no truth of the instruction, or training fails.
    """
    if seeds < 1:
        raise WysError(f"--seeds must be at least 1, not {seeds}.")
    scene = output / "scene"
    if not (scene / "transforms.json").is_file():
        CONSOLE.print("Drawing the demo scene ...")
        write_demo_scene(scene)
    truth = GroundTruth.find(scene, instruction)
    if truth is None:
        raise WysError(
            f'The demo scene has no truth of "{instruction}": choose one of ground_truth/edits.json in "{scene}".'
        )
    common = ["--data", str(scene), "--instruction", instruction, "--output-dir", str(output / "runs")]
    common += ["--timestamp", "run", "--pipeline.clip-model", "embedded"]
    base = _folder(output, "base")
    if not (base / "wys" / "contact_sheet.png").is_file():
        # A run needs an edit; one step of it is not seen.
        _train([*common, "--experiment-name", "base", "--localization", "none", "--pipeline.edit-steps", "1"])
    figures: dict[str, list[Metrics]] = {"before": [], **{variant: [] for variant in VARIANTS}}
    figures["before"].append(_figures(base, truth, captured=True)[0])
    renders: dict[str, dict[str, Tensor]] = {}
    for seed in range(seeds):
        for variant in VARIANTS:
            name = f"{truth.folder.name}-{variant}-{seed}"
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
                options += ["--pipeline.masks-dir", str(truth.folder / "masks")] if variant == "masks" else []
                _train([*common, *options])
            of_run, views = _figures(run, truth)
            figures[variant].append(of_run)
            renders.setdefault(variant, views)
    (output / "ablations.json").write_text(json.dumps(figures, indent=1), "utf8")
    rows = [
        (name, [read_png(scene / "images" / name), truth.edited(name), *(views[name] for views in renders.values())])
        for name in renders["none"]
    ]
    contact_sheet(["captured", "truth", *VARIANTS], rows).save(output / "contact_sheet.png")
    CONSOLE.print(table(figures))
    CONSOLE.print(f"See {output}/contact_sheet.png.", markup=False)


def _train(options: Sequence[str]) -> None:
    options = ["wys-tiny", *options, "--vis", "tensorboard"]
    CONSOLE.print(f"$ ns-train {shlex.join(options)}", soft_wrap=True, highlight=False, markup=False)
    # A process of its own for each run: nerfstudio's writers would go on writing into the runs before.
    done = subprocess.run([sys.executable, "-m", "nerfstudio.scripts.train", *options], check=False)
    if done.returncode != 0:
        raise WysError("The training of this variant has failed; its output is above.")


def _folder(output: Path, name: str) -> Path:
    return output / "runs" / name / "wys-tiny" / "run"


def _figures(run: Path, truth: GroundTruth, *, captured: bool = False) -> tuple[Metrics, dict[str, Tensor]]:
    """ns-eval's figures of a run, and those of its edited views and their masks; renders of some views by their names."""
    # `eval_setup` reads config.yml, which is ours: it has just been written.
    pipeline: Any = eval_setup(run / "config.yml", test_mode="test")[1]
    if captured:
        load_captured_scene(pipeline, run)
    figures = pipeline.get_average_eval_image_metrics()["edit"]["mean"]
    if not captured:
        masks = sorted((run / "wys" / "masks").glob("*.png"))
        overlaps = [intersection_over_union(read_png(file)[..., 0] > 0.5, truth.mask(file.name)) for file in masks]
        figures["mask_iou"] = sum(overlaps) / len(overlaps)
        edits = {file.name: read_png(file) for file in sorted((run / "wys" / "edits").glob("*.png"))}
        figures["view_psnr_outside"] = psnr_outside(truth, edits)
    dataset = pipeline.datamanager.train_dataset
    renders = {}
    for view in evenly_spaced(SHOWN_VIEWS, len(dataset)):
        render = pipeline.scene_model.render_view(dataset.cameras, view)["rgb"]
        renders[dataset.image_filenames[view].name] = render.clamp(0, 1).cpu()
    return figures, renders


def psnr_outside(truth: GroundTruth, edits: Mapping[str, Float[Tensor, "h w 3"]]) -> float:
    """PSNR of edited views outside the true masks, over all their pixels: what an edit did before training averages it.

    Args:
        truth: What the edit should have made of the views.
        edits: Views as training sees them, by their names.

    Returns:
        Decibels; infinity if nothing was touched outside.
    """
    if not edits:  # every mask was empty
        return float("inf")
    wanted = torch.stack([truth.edited(name) for name in edits])
    outside = ~torch.stack([truth.mask(name) for name in edits])
    return psnr(torch.stack(list(edits.values())), wanted, outside)


def table(figures: dict[str, list[Metrics]]) -> Table:
    """Means over the seeds, and in brackets the least and the most where they differ."""
    result = Table(
        title="The paper's ablations on the demo scene: mean (least to most over seeds)", title_justify="left"
    )
    result.add_column("edits confined by")
    names = [name for name in MEASURES if any(name in of_run for runs in figures.values() for of_run in runs)]
    for name in names:
        result.add_column(MEASURES[name], justify="right")
    for variant, runs in figures.items():
        cells = []
        for name in names:
            values = torch.tensor([of_run[name] for of_run in runs if name in of_run])
            digits = 1 if "psnr" in name else 2
            text = f"{values.mean():.{digits}f}" if len(values) else "-"
            if len(values) and values.min() < values.max():
                text += f" ({values.min():.{digits}f} to {values.max():.{digits}f})"
            cells.append(text)
        result.add_row(VARIANTS.get(variant, variant), *cells)
    return result
