"""`wys demo`: renders the demo scene, trains `wys-tiny` on it, and writes a turntable, a contact sheet and metrics."""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from nerfstudio.cameras.camera_utils import focus_of_attention, viewmatrix
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.scripts import train as ns_train
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from torch import Tensor

from wys_nerfstudio.demo.scene import require_empty_folder, write_demo_scene
from wys_nerfstudio.demo.score import load_captured_scene, render_views, score
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE
from wys_nerfstudio.training.interrupts import INTERRUPTED
from wys_nerfstudio.utils.progress import track
from wys_nerfstudio.utils.visualization import evenly_spaced, read_png, to_uint8

FRAMES = 18
FRAMES_PER_SECOND = 10
ENLARGEMENT = 4
"""Factor by which the turntable's pixels are enlarged; even, because the video codec requires even sides."""
SCORED_VIEWS = 12
"""Number of training views that are evaluated, besides all held-out views."""


def run_demo(output: Path, instruction: str, recipe: Path | None) -> None:
    """Render the demo scene, edit it, and write a turntable video, a contact sheet and metrics.

    Args:
        output: Output folder; an existing scene in it is reused.
        instruction: What to change.
        recipe: Recipe file with further options of ns-train.
    """
    started = time.perf_counter()
    scene = output / "scene"
    if not (scene / "transforms.json").is_file():
        CONSOLE.print("Rendering the demo scene ...")
        require_empty_folder(scene)
        write_demo_scene(scene)
    options = ["--recipe", str(recipe)] if recipe else []
    run = _train(["--data", str(scene), "--instruction", instruction, "--output-dir", str(output / "runs"), *options])

    # `eval_setup` can execute code in config.yml, which is safe here: the file has just been written.
    pipeline = eval_setup(run / "config.yml", test_mode="test")[1]
    assert isinstance(pipeline, WysPipeline)
    with pipeline.scene_model.colors_only():  # localization is evaluated in the captured scene
        after = _render_scored(pipeline, "Rendering the edited scene")
    turntable_after = _turntable(pipeline, "Turntable of the edited scene")
    load_captured_scene(pipeline, run)
    before = _render_scored(pipeline, "Rendering the captured scene")
    turntable_before = _turntable(pipeline, "Turntable of the captured scene")

    frames = [np.concatenate(pair, axis=1) for pair in zip(turntable_before, turntable_after)]
    write_video(output / "turntable.mp4", frames)
    write_animation(output / "turntable.gif", frames)
    shutil.copy2(run / "wys" / "contact_sheet.png", output / "contact_sheet.png")

    ground_truth = GroundTruth.find(scene, instruction)
    if ground_truth is not None:
        paths = [dataset.image_filenames[i] for dataset, i in _scored_views(pipeline)]
        views, names = [read_png(path) for path in paths], [path.name for path in paths]
        result = score(ground_truth, views, names, before, after, pipeline.settings.current.mask_threshold)
        (output / "metrics.json").write_text(json.dumps(asdict(result), indent=1), "utf8")
        CONSOLE.print(result.table())
    another = "turn the bear into a panda" if "hat" in instruction else "give the bear a hat"
    CONSOLE.print(
        f"Finished in {time.perf_counter() - started:.0f} s. See {output}/contact_sheet.png and {output}/turntable.mp4.\n"
        f"To open it in the viewer:     ns-viewer --load-config {shlex.quote(str(run / 'config.yml'))}\n"
        f"To try another instruction:   ns-train wys-tiny --data {shlex.quote(str(scene))} --base-run "
        f'{shlex.quote(str(run / "wys" / CAPTURED_SCENE))} --instruction "{another}"',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _train(options: Sequence[str]) -> Path:
    """Run `ns-train wys-tiny` in this process, which has already imported its dependencies, and return the run's folder."""
    sys.argv = ["ns-train", "wys-tiny", *options, "--vis", "tensorboard"]
    CONSOLE.print(f"$ {shlex.join(sys.argv)}", soft_wrap=True, highlight=False, markup=False)
    config: Any = tyro.cli(AnnotatedBaseConfigUnion)  # as ns-train's own entry point
    try:
        ns_train.main(config)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("wys: --load-dir is for the ns-train command above; wys demo starts a new run.", file=sys.stderr)
        raise
    return config.get_base_dir()


def _scored_views(pipeline: WysPipeline) -> list[tuple[InputDataset, int]]:
    data = pipeline.datamanager
    training = [(data.train_dataset, i) for i in evenly_spaced(SCORED_VIEWS, len(data.train_dataset))]
    return [*training, *((data.eval_dataset, i) for i in range(len(data.eval_dataset)))]


def _render_scored(pipeline: WysPipeline, description: str) -> list[dict[str, Tensor]]:
    views = track(_scored_views(pipeline), description=description)
    return [render_views(pipeline, dataset.cameras[i : i + 1])[0] for dataset, i in views]


def orbit(cameras: Cameras, count: int) -> Cameras:
    """Return cameras on a circle around the focus of attention, at the mean distance and height of the given cameras.

    Args:
        cameras: Cameras of the scene.
        count: Number of cameras on the circle.
    """
    poses = cameras.camera_to_worlds
    focus = focus_of_attention(
        torch.cat([poses, torch.tensor([[[0.0, 0, 0, 1]]]).expand(len(poses), 1, 4)], 1), poses[0, :, 3]
    )
    offsets = poses[:, :, 3] - focus
    radius, height = float(offsets[:, :2].norm(dim=-1).mean()), float(offsets[:, 2].mean())
    angles = torch.arange(count) / count * 2 * torch.pi
    eyes = torch.stack([radius * angles.cos(), radius * angles.sin(), torch.full_like(angles, height)], dim=-1)
    circle = torch.stack([viewmatrix(eye, torch.tensor([0.0, 0, 1]), eye + focus) for eye in eyes])
    return Cameras(
        camera_to_worlds=circle[:, :3],
        fx=float(cameras.fx[0]),
        fy=float(cameras.fy[0]),
        cx=float(cameras.cx[0]),
        cy=float(cameras.cy[0]),
        width=int(cameras.width[0]),
        height=int(cameras.height[0]),
    )


def _turntable(pipeline: WysPipeline, description: str) -> list[np.ndarray]:
    cameras = orbit(pipeline.datamanager.train_dataset.cameras, FRAMES)
    indices = track(range(FRAMES), description=description)
    with pipeline.scene_model.colors_only():
        images = [to_uint8(render_views(pipeline, cameras[i : i + 1])[0]["rgb"]) for i in indices]
    return [image.repeat(ENLARGEMENT, axis=0).repeat(ENLARGEMENT, axis=1) for image in images]


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Write 8-bit frames (h, w, 3) with even sides as H.264; PyAV includes ffmpeg."""
    import av

    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"  # type: ignore
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))  # type: ignore
        container.mux(stream.encode())  # type: ignore


def write_animation(path: Path, frames: list[np.ndarray]) -> None:
    """Write 8-bit frames (h, w, 3) as a looping GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
