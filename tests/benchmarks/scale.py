"""Time and memory by size of the scene: localization and edit loop over the number of views and over their resolution.

    wys demo-scene SCENE && OMP_NUM_THREADS=1 python tests/benchmarks/scale.py SCENE --output DIR

The scene's views are repeated or enlarged as needed; the editor is the embedded one. One round of the edit loop is the method's
steps between two edits, five for `wys-tiny`, and an edit of a whole view. Times are CPU seconds, for steps and rounds the median.
Memory is that of the views, their relevance and their edits. Writes `scale.json` and `scale.png`.
"""

import copy
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Optional

import torch
import tyro
from matplotlib.figure import Figure
from nerfstudio.configs.method_configs import all_methods
from PIL import Image
from speed import train_steps

from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training.schedule import Phase


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene in nerfstudio's format; its views are repeated and enlarged."""
    counts: tuple[int, ...] = (8, 25, 50, 100, 200, 400)
    """Numbers of views."""
    sides: tuple[int, ...] = (256, 512, 1024)
    """Longer sides in pixels of views that are edited at the editor's native resolution."""
    editing_sides: tuple[int, ...] = (80, 128, 192, 256)
    """Longer sides in pixels at which views of the first of `sides` are edited."""
    rounds: int = 5
    """Measured steps of the localize phase and rounds of the edit loop, each after one for warmup."""
    method: str = "wys-tiny"
    """Method that is trained."""
    lpips_loss_mult: Optional[float] = None
    """Weight of the perceptual loss. Default: the method's; 0 needs no AlexNet."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    editor: str = "embedded"
    """Editor: a hub id, a local folder or "embedded"."""
    output: Path = Path("scale")
    """Folder for `scale.json` and `scale.png`."""


@dataclass
class Row:
    """Measurements of one size of scene."""

    views: int
    """Number of training views."""
    side: int
    """Their longer side in pixels."""
    editing_side: int
    """Longer side at which they are edited."""
    maps: float
    """CPU seconds of all relevance maps."""
    hull: float
    """CPU seconds of free-space relevance."""
    localize_step: float
    """CPU seconds of a step of the localize phase."""
    round: float
    """CPU seconds of the training steps between two edits and an edit."""
    localization_share: float
    """CPU seconds of hull and localize phase, relative to those of the edit phase, with the method's numbers of steps."""
    mib_per_view: float
    """Memory in MiB of a view, its relevance and its edit."""


def write_scene(source: Path, folder: Path, views: int, side: Optional[int] = None, suffix: str = ".png") -> int:
    """Write a scene of repeated, and optionally enlarged, views.

    Args:
        source: Folder of a scene.
        folder: Folder to write; it is replaced.
        views: Number of views.
        side: Longer side of the views in pixels. Default: the source's.
        suffix: Suffix of their files.

    Returns:
        Longer side of the views in pixels.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    transforms = json.loads((source / "transforms.json").read_text("utf8"))
    scale = 1 if side is None else side / max(transforms["w"], transforms["h"])
    size = round(transforms["w"] * scale), round(transforms["h"] * scale)
    frames = []
    for number in range(views):
        frame = transforms["frames"][number % len(transforms["frames"])]
        name = f"images/{number:04d}{suffix}"
        Image.open(source / frame["file_path"]).resize(size).save(folder / name)
        frames.append({**frame, "file_path": name})
    transforms |= {key: transforms[key] * scale for key in ("fl_x", "fl_y", "cx", "cy")}
    transforms |= {"w": size[0], "h": size[1], "frames": frames, "train_filenames": [f["file_path"] for f in frames]}
    transforms |= {"val_filenames": [frames[0]["file_path"]], "test_filenames": [frames[0]["file_path"]]}
    (folder / "transforms.json").write_text(json.dumps(transforms), "utf8")
    return max(size)


def build_trainer(scene: Path, options: Options, editing_side: int) -> WysTrainer:
    """Return a trainer whose edits change whole views; no step precedes localization."""
    config: WysTrainerConfig = copy.deepcopy(all_methods[options.method])  # type: ignore
    config.vis, config.machine.device_type, config.output_dir = "tensorboard", "cpu", scene.parent / "runs"  # type: ignore
    config.pipeline.datamanager.data = scene
    config.pipeline.instruction, config.pipeline.editor = options.instruction, options.editor
    config.pipeline.reconstruct_steps, config.pipeline.localize_steps = 0, options.rounds + 1
    if options.lpips_loss_mult is not None:
        config.pipeline.model.lpips_loss_mult = options.lpips_loss_mult
    config.pipeline.mask_threshold, config.pipeline.edit_resolution = 0.0, editing_side
    config.set_timestamp()
    torch.manual_seed(0)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def measure(scene: Path, options: Options, views: int, side: int, editing_side: int) -> Row:
    """Measure the relevance maps of all views, steps of the localize phase, the hull, and rounds of the edit loop.

    Args:
        scene: Folder of the scene.
        options: Options of the benchmark.
        views: Number of views of the scene.
        side: Longer side of the views in pixels.
        editing_side: Longer side in pixels at which views are edited.
    """
    trainer = build_trainer(scene, options, editing_side)
    session, every = trainer.pipeline.session, trainer.config.pipeline.edit_every

    def seconds(work: Callable[..., None], *arguments: Any) -> float:
        started = time.process_time()
        with trainer.train_lock:
            work(*arguments)
        return time.process_time() - started

    maps = seconds(session.enter_phase, Phase.LOCALIZE)
    first, repeats = session.schedule.edit_start, range(options.rounds + 1)
    steps = [seconds_of_steps(trainer, number, 1) for number in repeats]
    hull = seconds(session.edit_loop.build_visual_hull)
    seconds(session.enter_phase, Phase.EDIT)
    rounds = [seconds_of_steps(trainer, first + number * every, every) for number in repeats]
    step, of_round = statistics.median(steps[1:]), statistics.median(rounds[1:])
    method: Any = all_methods[options.method].pipeline
    share = (hull + method.localize_steps * step) / (method.edit_steps / every * of_round)
    data = trainer.pipeline.datamanager
    assert data.relevance_maps is not None and data.unclamped_maps is not None
    stacks = [data._captured, data._stack.images, data.relevance_maps, data.unclamped_maps]
    mib_per_view = sum(stack.numel() * stack.element_size() for stack in stacks) / data.num_views / 2**20
    return Row(views, side, editing_side, maps, hull, step, of_round, share, mib_per_view)


def seconds_of_steps(trainer: WysTrainer, first: int, count: int) -> float:
    """CPU seconds of training steps, with the edits that are due."""
    started = time.process_time()
    train_steps(trainer, first, count)
    return time.process_time() - started


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| views | longer side | edited at | maps, s | hull, s | localize step, s | steps and an edit, s | "
        "hull and localize phase / edit phase | MiB per view |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.views} | {r.side} | {r.editing_side} | {r.maps:.1f} | {r.hull:.1f} | {r.localize_step:.3f} | {r.round:.1f} | "
            f"{r.localization_share:.1%} | {r.mib_per_view:.2f} |"
        )
    return "\n".join(lines)


def plot(by_count: Sequence[Row], by_side: Sequence[Row], by_editing_side: Sequence[Row], path: Path) -> None:
    """Plot times over the number of views, over their size, and over the size at which they are edited.

    Args:
        by_count: Rows that differ in the number of views.
        by_side: Rows that differ in the size of the views.
        by_editing_side: Rows that differ in the size at which views are edited.
        path: PNG file to write.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes: Any = figure.subplots(1, 3, sharey=True)
    panels = [
        (by_count, "views", [r.views for r in by_count]),
        (by_side, "longer side of the views, pixels", [r.side for r in by_side]),
        (by_editing_side, "longer side at which they are edited, pixels", [r.editing_side for r in by_editing_side]),
    ]
    for axis, (rows, label, values) in zip(axes, panels):
        axis.loglog(values, [r.maps for r in rows], "o-", label="all relevance maps")
        axis.loglog(values, [r.round for r in rows], "s-", label="steps and an edit")
        axis.set_xlabel(label)
        axis.set_xticks(values, [str(value) for value in values], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds")
    axes[0].legend()
    figure.savefig(path, dpi=90)


def main(options: Options) -> None:
    """Measure, print the table, and write the JSON file and the plot."""
    options.output.mkdir(parents=True, exist_ok=True)
    native = max(load_editor(options.editor).editing_size(1000, 1000, None))
    with tempfile.TemporaryDirectory() as temporary:
        scene = Path(temporary) / "scene"
        by_count = []
        for views in options.counts:
            side = write_scene(options.scene, scene, views)
            by_count.append(measure(scene, options, views, side, native))
        views, by_side, by_editing_side = options.counts[0], [], []
        for side in options.sides:
            write_scene(options.scene, scene, views, side)
            by_side.append(measure(scene, options, views, side, native))
        for editing_side in options.editing_sides:
            write_scene(options.scene, scene, views, options.sides[0])
            by_editing_side.append(measure(scene, options, views, options.sides[0], editing_side))
    if by_side and by_editing_side:
        plot(by_count, by_side, by_editing_side, options.output / "scale.png")
    rows = [*by_count, *by_side, *by_editing_side]
    print(table(rows))
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    (options.output / "scale.json").write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
