"""`wys ablate`: the paper's ablations F and G on the demo scene, compared with its ground truth.

One reconstruction is edited with several seeds per localization: relevance field (the method), relevance maps of the views
(ablation F), given masks (ablation G; here the ground-truth masks) and no localization (Instruct-NeRF2NeRF).
"""

import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

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
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, newest_checkpoint
from wys_nerfstudio.training.run_options import read_run_config
from wys_nerfstudio.training.validation import validate_range
from wys_nerfstudio.utils.atomic_io import write_json
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.progress import track
from wys_nerfstudio.utils.visualization import SOFTWARE, contact_sheet, evenly_spaced, read_png, save_png, write_png

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
    "clip_text_image_similarity": "CLIP text-image sim.",
    "clip_direction_similarity": "CLIP direction sim.",
    "mask_iou": "mask IoU",
}
LOCALIZATION = ("--mask-threshold", "0.5", "--pipeline.relevance-outlier-factor", "1.5", "--pipeline.relevance-num-samples", "1",
                "--pipeline.model.relevance-expectile", "0.75")  # fmt: skip
"""Localization options of `wys` (threshold, fence and samples as in the paper); those of wys-tiny suit the demo editor's maps."""
SHOWN_VIEWS = 4
"""Number of views in the contact sheet."""
FIGURES = "ablations.json"
TRAIN = (
    "import os, signal; signal.signal(signal.SIGINT, lambda *_: os._exit(130)); "
    "from nerfstudio.scripts.train import entrypoint; entrypoint()"
)
"""`ns-train`, which ends at once, without a traceback, if Ctrl-C comes before there is anything to save."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
"""Signals that end `wys ablate` and the run that it trains."""

Metrics = dict[str, float]


def run_ablations(
    output: Path, instruction: str, seeds: int, reconstruct_steps: int = 800, edit_steps: int = 600
) -> None:
    """Run the missing variants, print the table and write `ablations.json` and `contact_sheet.png`.

    Runs and their metrics are kept by instruction, variant, seed and steps, so that one folder can hold several ablations.

    Args:
        output: Folder of the scene, the runs and the results.
        instruction: What to change; an instruction with ground truth.
        seeds: Number of seeds per variant.
        reconstruct_steps: Training steps of the reconstruction.
        edit_steps: Training steps of each edit.

    Raises:
        WysError: If a number is below 1, the instruction has no ground truth, or training fails.
        KeyboardInterrupt: After Ctrl-C; the run that was being trained is saved.
    """
    for option, value in (("seeds", seeds), ("reconstruct-steps", reconstruct_steps), ("edit-steps", edit_steps)):
        validate_range(f"--{option}", value, 1)
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
    common += ["--pipeline.clip-model", "embedded", "--pipeline.reconstruct-steps", str(reconstruct_steps)]
    # A run has at least one edit step. Its weights from before that step are the base.
    base_options = [*common, "--localization", "none", "--pipeline.edit-steps", "1"]
    base = _train_rest(output, f"base-{reconstruct_steps}", base_options)
    edit = ground_truth.folder.name
    name = f"{edit}-before-{reconstruct_steps}"
    metrics: dict[str, list[Metrics]] = {"before": [_measure(output, name, base, ground_truth, instruction)]}
    renders: dict[str, Path] = {}
    for seed in range(seeds):
        for variant in VARIANTS:
            name = f"{edit}-{variant}-{seed}-{reconstruct_steps}-{edit_steps}"
            options = [
                *common,
                "--base-run",
                str(base / "wys" / CAPTURED_SCENE),
                "--localization",
                variant,
                *LOCALIZATION,
            ]
            options += ["--pipeline.edit-steps", str(edit_steps)]
            options += ["--pipeline.seed", str(seed), "--machine.seed", str(seed)]
            options += ["--pipeline.masks-dir", str(ground_truth.folder / "masks")] if variant == "masks" else []
            run = _train_rest(output, name, options)
            metrics.setdefault(variant, []).append(_measure(output, name, run, ground_truth))
            renders.setdefault(variant, output / "renders" / name)
    names = sorted(path.name for path in renders["none"].iterdir())
    rows = [
        (
            name,
            [
                read_png(scene / "images" / name),
                ground_truth.edited(name),
                *(read_png(folder / name) for folder in renders.values()),
            ],
        )
        for name in names
    ]
    sheet = contact_sheet(["captured", "ground truth", *VARIANTS], rows)
    save_png(output / "contact_sheet.png", sheet, f"renders of scenes edited with {SOFTWARE}")
    CONSOLE.print(table(metrics))
    CONSOLE.print(f"See {output}/contact_sheet.png.", markup=False)


def _train_rest(output: Path, name: str, options: Sequence[str]) -> Path:
    """Train a run, or the rest of it, unless it is finished.

    Args:
        output: Folder of the ablations.
        name: The run's experiment name.
        options: All other options of ns-train.

    Returns:
        Folder of the finished run.
    """
    run = _newest_run(output, name)
    if run is None or not _is_finished(run):
        resume = [] if run is None else ["--load-dir", str(run / "nerfstudio_models"), "--timestamp", run.name]
        arguments = ["wys-tiny", *options, "--experiment-name", name, *resume, "--vis", "tensorboard"]
        CONSOLE.print(f"$ ns-train {shlex.join(arguments)}", soft_wrap=True, highlight=False, markup=False)
        # One process per run: nerfstudio's global writers would continue writing to the previous run.
        if run_child([sys.executable, "-c", TRAIN, *arguments]) != 0:
            raise WysError("Training of this variant failed: see the output above.")
        run = _newest_run(output, name)
        assert run is not None
    return run


def _newest_run(output: Path, name: str) -> Optional[Path]:
    """Return the newest run of an experiment that has a checkpoint; None if there is none."""
    checkpoints = (output / "runs" / name / "wys-tiny").glob("*/nerfstudio_models/step-*.ckpt")
    return max((file.parents[1] for file in checkpoints), default=None)


def _is_finished(run: Path) -> bool:
    checkpoint = newest_checkpoint(run / "nerfstudio_models")
    assert checkpoint is not None
    return int(checkpoint.stem.split("-")[1]) + 1 >= read_run_config(run).get("max_num_iterations", math.inf)


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end and forward Ctrl-C, SIGTERM and SIGHUP to it.

    The command has a session of its own: in this one, the terminal would send Ctrl-C to both processes, and the command
    would receive it twice, which ends a training run without saving.

    Returns:
        Exit code.

    Raises:
        KeyboardInterrupt: If a signal was forwarded, once the command has ended.
    """
    child: Optional[subprocess.Popen[bytes]] = None
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    kinds = (kind for kind in SIGNALS if signal.getsignal(kind) != signal.SIG_IGN)  # as nohup ignores SIGHUP
    before = {kind: signal.signal(kind, forward) for kind in kinds}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        for number in received:  # until now there was no process to send it to
            child.send_signal(number)
        code = child.wait()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if received:
        raise KeyboardInterrupt
    return code


def _measure(
    output: Path, name: str, run: Path, ground_truth: GroundTruth, captured_for: Optional[str] = None
) -> Metrics:
    """Return the metrics of a run: those in `ablations.json` if it has been measured, with its renders, before.

    Args:
        output: Folder of the ablations.
        name: Name of the measurement.
        run: Folder of the run.
        ground_truth: Ground truth of the edit.
        captured_for: Evaluate the scene before its first edit, against the ground truth of this instruction.

    Returns:
        The metrics of ns-eval and, unless `captured_for` is given, those of the edited views and their masks.
    """
    file, folder = output / FIGURES, output / "renders" / name
    figures = _read_figures(file)
    if name in figures and len(list(folder.glob("*.png"))) == SHOWN_VIEWS:
        return figures[name]
    CONSOLE.print(f"Measuring {name} ...", markup=False, highlight=False)
    # `eval_setup` can execute code in config.yml, which is safe here: the file was written by this command.
    pipeline: Any = eval_setup(run / "config.yml", test_mode="test")[1]
    if captured_for is not None:
        load_captured_scene(pipeline, run)
        pipeline.settings.update(instruction=captured_for)
    metrics = pipeline.get_average_eval_image_metrics()["edit"]["mean"]
    if captured_for is None:
        masks = sorted((run / "wys" / "masks").glob("*.png"))
        overlaps = [
            intersection_over_union(read_png(file)[..., 0] > 0.5, ground_truth.mask(file.name)) for file in masks
        ]
        metrics["mask_iou"] = sum(overlaps) / len(overlaps)
        edits = {file.name: read_png(file) for file in sorted((run / "wys" / "edits").glob("*.png"))}
        metrics["view_psnr_outside"] = psnr_outside(ground_truth, edits)
    dataset = pipeline.datamanager.train_dataset
    for view in track(evenly_spaced(SHOWN_VIEWS, len(dataset)), description="Contact sheet"):
        render = pipeline.scene_model.render_view(dataset.cameras, view)["rgb"]
        write_png(
            folder / dataset.image_filenames[view].name,
            render.clamp(0, 1).cpu(),
            f"render of a scene edited with {SOFTWARE}",
        )
    write_json(file, {**figures, name: metrics})
    return metrics


def _read_figures(file: Path) -> dict[str, Metrics]:
    """Return the metrics in `ablations.json`; none if there is no such file or it is damaged."""
    try:
        figures = json.loads(file.read_text("utf8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


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
