"""What a scene's size costs: relevance maps and the edit loop against the number of views, and against their resolution.

    wys demo-scene SCENE && OMP_NUM_THREADS=1 python tests/benchmarks/scale.py SCENE --output DIR

The scene's views are repeated until there are enough, or enlarged; the model is `wys-tiny`'s, the editor the embedded one. A
round of the edit loop is five steps of training and an edit of a whole view; CPU seconds, medians of several rounds. Memory is
that of the views, their relevance and their edits. Leaves `scale.json` and `scale.png`.
"""

import copy
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Optional

import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from speed import train_steps

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training.schedule import Phase


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene in nerfstudio's format whose views are repeated and enlarged."""
    counts: tuple[int, ...] = (8, 25, 50, 100, 200, 400)
    """Numbers of views."""
    sides: tuple[int, ...] = (256, 512, 1024)
    """Longer sides of views, in pixels, that are edited in the editor's own size."""
    editing_sides: tuple[int, ...] = (80, 128, 192, 256)
    """Longer sides, in pixels, at which views of the first of `sides` are edited."""
    rounds: int = 5
    """Rounds of the edit loop; one more before warms up."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    editor: str = "embedded"
    """Editor."""
    output: Path = Path("scale")
    """Folder for `scale.json` and `scale.png`."""


@dataclass
class Row:
    """A scene of one size."""

    views: int
    """Number of training views."""
    side: int
    """Their longer side in pixels."""
    editing_side: int
    """Longer side at which they are edited."""
    maps: float
    """CPU seconds of all relevance maps."""
    round: float
    """CPU seconds of five steps and an edit."""
    mib_per_view: float
    """Memory of a view, its relevance and its edit."""


def write_scene(source: Path, folder: Path, views: int, side: Optional[int] = None) -> int:
    """Writes a scene of repeated, perhaps enlarged views.

    Args:
        source: A scene.
        folder: Where to write.
        views: How many views.
        side: Their longer side; by default the source's.

    Returns:
        The longer side.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    transforms = json.loads((source / "transforms.json").read_text("utf8"))
    scale = 1 if side is None else side / max(transforms["w"], transforms["h"])
    size = round(transforms["w"] * scale), round(transforms["h"] * scale)
    frames = []
    for number in range(views):
        frame = transforms["frames"][number % len(transforms["frames"])]
        name = f"images/{number:04d}.png"
        Image.open(source / frame["file_path"]).resize(size).save(folder / name)
        frames.append({**frame, "file_path": name})
    along = {"fl_x": scale, "fl_y": scale, "cx": scale, "cy": scale}
    transforms |= {key: transforms[key] * factor for key, factor in along.items()}
    transforms |= {"w": size[0], "h": size[1], "frames": frames, "train_filenames": [f["file_path"] for f in frames]}
    transforms |= {"val_filenames": [frames[0]["file_path"]], "test_filenames": [frames[0]["file_path"]]}
    (folder / "transforms.json").write_text(json.dumps(transforms), "utf8")
    return max(size)


def build_trainer(scene: Path, options: Options, editing_side: int) -> WysTrainer:
    """A trainer of wys-tiny that edits whole views from the first step on."""
    config: WysTrainerConfig = copy.deepcopy(wys_tiny.config)  # type: ignore
    config.vis, config.machine.device_type, config.output_dir = "tensorboard", "cpu", scene.parent / "runs"  # type: ignore
    config.pipeline.datamanager.data = scene
    config.pipeline.instruction, config.pipeline.editor = options.instruction, options.editor
    config.pipeline.reconstruct_steps, config.pipeline.localize_steps = 0, 1
    config.pipeline.mask_threshold, config.pipeline.edit_resolution = 0.0, editing_side
    config.set_timestamp()
    torch.manual_seed(0)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def measure(scene: Path, options: Options, views: int, side: int, editing_side: int) -> Row:
    """Maps of all views, then rounds of the edit loop."""
    trainer = build_trainer(scene, options, editing_side)
    pipeline, every = trainer.pipeline, trainer.config.pipeline.edit_every
    began = time.process_time()
    with trainer.train_lock:
        pipeline.session.enter_phase(Phase.LOCALIZE)
        maps = time.process_time() - began
        pipeline.session.enter_phase(Phase.EDIT)
    rounds = []
    for first in range(
        pipeline.session.schedule.edit_start, pipeline.session.schedule.edit_start + (options.rounds + 1) * every, every
    ):
        began = time.process_time()
        train_steps(trainer, first, every)
        rounds.append(time.process_time() - began)
    data = pipeline.datamanager
    stacks = [data._captured, *(value for value in data.cached_batch.values() if isinstance(value, torch.Tensor))]
    held = sum(stack.numel() * stack.element_size() for stack in stacks) / data.num_views / 2**20
    return Row(views, side, editing_side, maps, statistics.median(rounds[1:]), held)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| views | longer side | edited at | maps, s | maps, s per view | five steps and an edit, s | MiB per view |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.views} | {r.side} | {r.editing_side} | {r.maps:.1f} | {r.maps / r.views:.2f} | {r.round:.1f} | "
            f"{r.mib_per_view:.2f} |"
        )
    return "\n".join(lines)


def plot(by_count: Sequence[Row], by_side: Sequence[Row], by_editing_side: Sequence[Row], path: Path) -> None:
    """Maps and edit loop over the number of views, over their sides, and over the sides at which they are edited."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes: Any = figure.subplots(1, 3, sharey=True)
    panels = [
        (by_count, "views", [r.views for r in by_count]),
        (by_side, "longer side of the views, pixels", [r.side for r in by_side]),
        (by_editing_side, "longer side at which they are edited, pixels", [r.editing_side for r in by_editing_side]),
    ]
    for axis, (rows, label, places) in zip(axes, panels):
        axis.loglog(places, [r.maps for r in rows], "o-", label="all relevance maps")
        axis.loglog(places, [r.round for r in rows], "s-", label="five steps and an edit")
        axis.set_xlabel(label)
        axis.set_xticks(places, [str(place) for place in places], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds")
    axes[0].legend()
    figure.savefig(path, dpi=90)


def main(options: Options) -> None:
    """Measures, prints the tables and writes JSON and picture."""
    options.output.mkdir(parents=True, exist_ok=True)
    own = load_editor(options.editor).native_resolution
    with tempfile.TemporaryDirectory() as temporary:
        scene = Path(temporary) / "scene"
        by_count = []
        for views in options.counts:
            side = write_scene(options.scene, scene, views)
            by_count.append(measure(scene, options, views, side, own))
        views, by_side, by_editing_side = options.counts[0], [], []
        for side in options.sides:
            write_scene(options.scene, scene, views, side)
            by_side.append(measure(scene, options, views, side, own))
        for editing_side in options.editing_sides:
            write_scene(options.scene, scene, views, options.sides[0])
            by_editing_side.append(measure(scene, options, views, options.sides[0], editing_side))
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
