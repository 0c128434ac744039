"""Main memory that the training views of a large capture take, by action, beside that of the process.

The views are captured pictures of one pattern, all of them are edited, and the relevance maps are given. On the CPU the views that
training uses are in main memory, too; on a GPU they are there instead (one 8-bit stack).

    python tests/benchmarks/views.py --output DIR --views 300 --width 1600 --height 900
"""

import copy
import gc
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import tyro
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from wys_nerfstudio.config import wys
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.relevance.cache import save_maps


@dataclass
class Options:
    """Options of the benchmark."""

    output: Path
    """Folder for views.json and the capture."""
    views: int = 300
    """Photographs of the capture; nine of ten are training views."""
    width: int = 1600
    """Width in pixels."""
    height: int = 900
    """Height in pixels."""


@dataclass
class Row:
    """Main memory of one action."""

    action: str
    """Name of the action."""
    peak_gib: float
    """Peak during the action, beside the process before the views were read."""
    kept_gib: float
    """What is in use after it."""


def write_capture(folder: Path, options: Options) -> None:
    """Write a capture of one pattern, moved from view to view, on a circle of cameras."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, options.width)[None, :, None] * np.ones((options.height, 1, 3))
    frames = []
    for i in range(options.views):
        name = f"images/{i:04d}.png"
        Image.fromarray(np.roll(ramp.astype(np.uint8), 7 * i, axis=1)).save(folder / name, compress_level=1)
        angle = 2 * math.pi * i / options.views
        pose = np.eye(4)
        pose[:3, 3] = 3 * math.cos(angle), 3 * math.sin(angle), 1
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    size = {"w": options.width, "h": options.height, "cx": options.width / 2, "cy": options.height / 2}
    meta = {**size, "fl_x": options.width, "fl_y": options.width, "camera_model": "OPENCV", "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(meta), "utf8")


def resident_gib(kind: str) -> float:
    """Return resident memory: VmRSS now, VmHWM at most since `measure` began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 2**20


def measure(action: str, before: float, work: Callable[[], object]) -> Row:
    """Return the memory of an action.

    Args:
        action: Name of the action.
        before: Resident memory without views, in GiB.
        work: The action.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    work()
    gc.collect()
    return Row(action, resident_gib("VmHWM") - before, resident_gib("VmRSS") - before)


def save(data: WysDataManager) -> None:
    """Copy and serialize the views, as for a checkpoint."""
    torch.save(data.views_state(), io.BytesIO())


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    write_capture(options.output / "capture", options)
    config = copy.deepcopy(wys.config.pipeline)
    config.datamanager.data = options.output / "capture"  # type: ignore
    config.datamanager.dataparser = NerfstudioDataParserConfig(downscale_factor=1, load_3D_points=False)  # type: ignore
    editor = load_editor("embedded")
    request = config.relevance_request(editor, "turn the bear into a panda", "")  # type: ignore
    maps = options.output / "maps"
    made: list[WysDataManager] = []
    before = resident_gib("VmRSS")
    rows = [measure("read", before, lambda: made.append(config.datamanager.setup(device="cpu", test_mode="val")))]
    data = made[0]
    save_maps(maps, request, data.view_names, torch.rand(data.num_views, 36, 64))

    def make_maps() -> None:
        data.make_relevance_maps(editor, request, "view", 1.5, maps, batch_size=8)

    def edit_all() -> None:
        for view in range(data.num_views):
            data.set_view(view, 1 - data.captured_views([view])[0])

    rows.append(measure("relevance maps", before, make_maps))
    rows.append(measure("ray batch", before, lambda: data.next_train(0)))
    rows.append(measure("edit every view", before, edit_all))
    rows.append(measure("save, all views edited", before, lambda: save(data)))
    rows.append(measure("apply on top", before, data.start_from_current))
    rows.append(measure("save, applied on top", before, lambda: save(data)))
    stack = data.num_views * options.width * options.height * 3 / 2**30
    print(f"| action ({data.num_views} views, {stack:.2f} GiB in 8 bits) | peak, GiB | kept, GiB |\n|---|---|---|")
    for row in rows:
        print(f"| {row.action} | {row.peak_gib:.2f} | {row.kept_gib:.2f} |")
    about = {"date": date.today().isoformat(), "torch": torch.__version__, "stack_gib": stack}
    result = {**about, "rows": [asdict(row) for row in rows]}
    (options.output / "views.json").write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
