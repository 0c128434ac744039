"""Whole runs through nerfstudio's own commands: train, resume, base runs, evaluate, render, export, view."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_wys
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from scripts import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wys_nerfstudio.cli import compare
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.checkpoint import find_checkpoint, read_checkpoint, register_safe_globals
from wys_nerfstudio.training.run_state import SETTINGS_KEY
from wys_nerfstudio.utils.visualization import SOFTWARE

register_safe_globals()
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_home")]

SMALL_MODEL = [
    "--pipeline.model.num-nerf-samples-per-ray=8",
    "--pipeline.datamanager.train-num-rays-per-batch=128",
    "--pipeline.datamanager.edit-num-rays-per-batch=256",
    "--pipeline.datamanager.edit-patch-size=16",
]
SHORT = ["--pipeline.reconstruct-steps=8", "--pipeline.localize-steps=4", "--pipeline.edit-steps=21"]
QUIET = ["--vis=tensorboard", "--machine.device-type=cpu"]


def command(
    module: str, *arguments: object, check: bool = True, folder: Path | None = None, **extra: str
) -> "subprocess.CompletedProcess[str]":
    """Run one of nerfstudio's scripts in a process of its own, as its console script does."""
    done = run_script(module, [str(argument) for argument in arguments], folder, **extra)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train(method: str, scene: Path, output: Path, *arguments: object, **kwargs) -> "subprocess.CompletedProcess[str]":
    return command("train", method, "--data", scene, "--output-dir", output, *QUIET, *arguments, **kwargs)


def newest_run(output: Path) -> Path:
    """Return the newest run in an output folder."""
    return max(output.glob("*/*/*/config.yml"), key=lambda path: path.stat().st_mtime).parent


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "wys" / "edits.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return tensors(find_checkpoint(run, "--base-run"))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint, without the settings beside them."""
    state = read_checkpoint(checkpoint)["pipeline"]
    return {key: value for key, value in state.items() if key != SETTINGS_KEY}


@pytest.fixture(scope="module")
def finished_run(ring_scene: Path, editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ns-train wys-tiny` from captured views to the edited scene."""
    output = tmp_path_factory.mktemp("finished")
    done = train("wys-tiny", ring_scene, output, *SMALL_MODEL, *SHORT, "--instruction", "make the ball blue",
                 "--editor", editor_folder, "--pipeline.edit-every=5", "--mask-threshold=0.3",
                 "--pipeline.edit-count=2", "--pipeline.clip-model", "None")  # fmt: skip
    assert [f"Phase: {phase}." in done.stdout for phase in ("reconstruct", "localize", "edit")] == [True] * 3
    return newest_run(output)


def test_a_finished_run_has_all_its_files(finished_run: Path) -> None:
    folder = finished_run / "wys"
    edits = records(finished_run)
    assert [edit["step"] for edit in edits] == [12, 12, 17, 17, 22, 22, 27, 27, 32, 32]
    assert [edit["edit"] for edit in edits] == list(range(10))
    edited = {edit["view"] for edit in edits if edit["mask_fraction"] > 0}
    assert len({edit["view"] for edit in edits}) == 10, "each view is edited once before any is edited twice"
    assert {path.stem for path in (folder / "edits").glob("*.png")} == edited
    assert {path.stem for path in (folder / "masks").glob("*.png")} == {edit["view"] for edit in edits}
    assert len(list((folder / "relevance").glob("*.png"))) == 13
    assert (folder / "relevance" / "maps.safetensors").is_file()
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 160
    (entry,) = json.loads((folder / "history.json").read_text())
    assert (entry["instruction"], entry["start"], entry["first_step"]) == ("make the ball blue", "captured", 8)
    assert not list(folder.rglob("*.partial"))
    events = EventAccumulator(str(finished_run), size_guidance={"images": 0})
    events.Reload()
    (tag,) = [tag for tag in events.Tags()["images"] if tag.startswith("Edit (captured")]
    assert len(events.Images(tag)) == 5 and events.Images(tag)[0].width == 5 * 40


def test_all_images_of_a_run_have_their_provenance(finished_run: Path) -> None:
    images = list((finished_run / "wys").rglob("*.png"))
    assert {image.parent.name for image in images} == {"edits", "masks", "relevance", "wys"}
    for path in images:
        with Image.open(path) as image:
            assert image.info["Software"] == SOFTWARE and "view" in image.info["Description"]


def test_edited_views_equal_the_captured_ones_outside_masks(finished_run: Path, ring_scene: Path) -> None:
    compared = 0
    last = {edit["view"]: edit for edit in records(finished_run)}
    for path in (finished_run / "wys" / "edits").glob("*.png"):
        edited, captured, mask = (
            torch.tensor(list(Image.open(p).convert(mode).tobytes())).view(32, 40, -1)
            for p, mode in (
                (path, "RGB"),
                (ring_scene / "images" / path.name, "RGB"),
                (finished_run / "wys" / "masks" / path.name, "L"),
            )
        )
        inside = mask[..., 0] > 127
        assert torch.equal(edited[~inside], captured[~inside])
        assert (edited[inside] != captured[inside]).any()
        assert abs(float(inside.float().mean()) - last[path.stem]["mask_fraction"]) < 1e-4
        compared += 1
    assert compared > 0


def test_config_has_the_resolved_values(finished_run: Path) -> None:
    from nerfstudio.engine.trainer import TrainerConfig

    config = yaml.load((finished_run / "config.yml").read_text(), Loader=yaml.Loader)
    assert isinstance(config, TrainerConfig)
    assert config.pipeline.instruction == "make the ball blue"  # type: ignore
    assert config.max_num_iterations == 8 + 4 + 21
    assert config.machine.device_type == "cpu"
    assert config.pipeline.mask_threshold == 0.3  # type: ignore


NO_EDITOR = """
import runpy, sys
class NoEditor:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers" or name.startswith("transformers.models.clip"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, NoEditor())
runpy.run_module("nerfstudio.scripts.SCRIPT", run_name="__main__", alter_sys=True)
"""


def editorless(module: str, *arguments: object) -> list[str]:
    """Return a command line that runs a script in which the import of any part of an editor is an error."""
    return [sys.executable, "-W", "ignore", "-c", NO_EDITOR.replace("SCRIPT", module), *map(str, arguments)]


def without_editor(module: str, *arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        editorless(module, *arguments), capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


OUTPUTS = ["rgb", "relevance", "relevance_overlay", "edit_mask"]


def test_eval_needs_no_editor(finished_run: Path, tmp_path: Path) -> None:
    without_editor("eval", "--load-config", finished_run / "config.yml", "--output-path", tmp_path / "eval.json")
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert results["psnr"] > 0 and 0 <= results["ssim"] <= 1
    mean, views = results["edit"]["mean"], results["edit"]["views"]
    assert len(views) == 13 and {"edit_psnr", "edit_ssim"} <= set(mean)
    assert mean["edit_psnr"] == pytest.approx(sum(view["edit_psnr"] for view in views.values()) / 13)


def test_render_dataset_needs_no_editor(finished_run: Path, tmp_path: Path) -> None:
    without_editor("render", "dataset", "--load-config", finished_run / "config.yml", "--output-path", tmp_path,
                   "--split", "train", "--image-format", "png", "--rendered-output-names", *OUTPUTS)  # fmt: skip
    for name in OUTPUTS:
        assert len(list((tmp_path / "train" / name).glob("*.png"))) == 13
    with Image.open(next((tmp_path / "train" / "edit_mask").glob("*.png"))) as mask:
        assert len(set(mask.convert("RGB").getdata())) <= 2, "an edit mask is black and white"


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ns-render needs the ffmpeg program for paths")
def test_render_of_paths_needs_no_editor(finished_run: Path, tmp_path: Path) -> None:
    without_editor("render", "interpolate", "--load-config", finished_run / "config.yml", "--output-path",
                   tmp_path / "between.mp4", "--pose-source", "train", "--interpolation-steps", "1",
                   "--rendered-output-names", *OUTPUTS)  # fmt: skip
    assert (tmp_path / "between.mp4").stat().st_size > 0
    matrix = [1.0, 0, 0, 0, 0, 0, -1.0, -0.5, 0, 1.0, 0, 0.2, 0, 0, 0, 1.0]
    frames = [{"camera_to_world": matrix, "fov": 60.0, "aspect": 1.25}] * 2
    path = {
        "camera_type": "perspective",
        "render_height": 32,
        "render_width": 40,
        "seconds": 0.1,
        "camera_path": frames,
    }
    (tmp_path / "path.json").write_text(json.dumps(path))
    without_editor("render", "camera-path", "--load-config", finished_run / "config.yml", "--camera-path-filename",
                   tmp_path / "path.json", "--output-path", tmp_path / "path.mp4", "--rendered-output-names",
                   *OUTPUTS)  # fmt: skip
    assert (tmp_path / "path.mp4").stat().st_size > 0


def test_export_needs_no_editor(finished_run: Path, tmp_path: Path) -> None:
    without_editor("exporter", "pointcloud", "--load-config", finished_run / "config.yml", "--output-dir", tmp_path,
                   "--num-points", "200", "--normal-method", "open3d", "--remove-outliers", "False",
                   "--rgb-output-name", "relevance_overlay")  # fmt: skip
    assert (tmp_path / "point_cloud.ply").stat().st_size > 1000


def test_compare_tabulates_several_runs(finished_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    again = shutil.copytree(finished_run, tmp_path / "again")
    run_wys(monkeypatch, "compare", finished_run, again, "-o", tmp_path / "out")
    printed = capsys.readouterr().out
    for bar in ("Metrics of the edited views", "Contact sheet"):
        assert len(re.findall(rf"{bar} .* 100% \d+:\d+:\d+", printed)) == 2
    results = list(json.loads((tmp_path / "out" / "comparison.json").read_text())["metrics"].values())
    assert len(results) == 2 and results[0] == results[1] and results[0]["edit_psnr"] > 0
    for name in ("contact_sheet.png", "chart.png", "relevance_A.png", "relevance_B.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 300 and image.info["Software"] == SOFTWARE and "edited" in image.info["Description"]


def test_compare_shows_the_relevance_field_of_a_single_run(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    run_wys(monkeypatch, "compare", finished_run, "-o", tmp_path / "out")
    sheet = np.asarray(Image.open(tmp_path / "out" / "relevance_A.png").convert("RGB")).astype(int)
    # Four columns with a gap of four pixels: captured view, render, relevance field, overlay.
    cells = np.split(sheet[18 : 18 + 160, 4:], 4, axis=1)
    assert all(cell.std() > 3 for cell in cells), "no cell is blank"
    assert all((cells[i] != cells[k]).any() for i in range(4) for k in range(i))


def test_compare_renders_at_the_size_shown(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    sizes, render = [], WysModel.get_outputs_for_camera

    def noted(model: WysModel, camera: Cameras, obb_box: None = None) -> dict[str, torch.Tensor]:
        sizes.append((int(camera.height), int(camera.width)))
        return render(model, camera, obb_box)

    monkeypatch.setattr(WysModel, "get_outputs_for_camera", noted)
    monkeypatch.setattr(compare, "SHEET_SIDE", 20)
    run_wys(monkeypatch, "compare", finished_run, "-o", tmp_path / "out")
    assert sizes[-6:] == [(16, 20)] * 6 and set(sizes[:-6]) == {(32, 40)}


def test_viewer_serves_a_finished_run_without_editor(finished_run: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    arguments = ["--load-config", str(finished_run / "config.yml"), "--viewer.websocket-port", "17007"]
    viewer = subprocess.Popen(
        editorless("viewer.run_viewer", *arguments),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(120):
            assert viewer.poll() is None, viewer.stdout.read().decode()[-3000:]  # type: ignore
            try:
                page = urllib.request.urlopen("http://127.0.0.1:17007", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        assert b"viser" in page.lower()
        assert viewer.poll() is None
    finally:
        viewer.kill()
        viewer.wait()


def test_a_resumed_run_continues_its_edits(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    options = [*SMALL_MODEL, *SHORT, "--editor", editor_folder, "--pipeline.edit-every=5", "--mask-threshold=0.3"]
    train("wys-tiny", ring_scene, tmp_path / "a", *options, "--instruction", "make the ball blue",
          "--max-num-iterations=23")  # fmt: skip
    stopped = newest_run(tmp_path / "a")
    assert [edit["step"] for edit in records(stopped)] == [12, 17, 22]
    done = train("wys-tiny", ring_scene, tmp_path / "b", *options, "--load-dir", stopped / "nerfstudio_models")
    resumed = newest_run(tmp_path / "b")
    assert [edit["edit"] for edit in records(resumed)] == [0, 1, 2, 3, 4]
    assert [edit["step"] for edit in records(resumed)] == [12, 17, 22, 27, 32]
    assert (resumed / "nerfstudio_models" / "step-000000032.ckpt").is_file()
    percents = [float(p) for p in re.findall(r"\((\d+\.\d+)%\)", done.stdout)]
    assert percents and 60 < percents[0] <= max(percents) <= 100
    first = {path.name: path.read_bytes() for path in (stopped / "wys" / "edits").glob("*.png")}
    kept = {path.name: path.read_bytes() for path in (resumed / "wys" / "edits").glob("*.png")}
    again = {edit["view"] for edit in records(resumed)[3:]}
    assert first and all(kept[name] == data for name, data in first.items() if Path(name).stem not in again)


def test_a_finished_run_is_not_resumed(
    finished_run: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    options = [*SMALL_MODEL, *SHORT, "--editor", editor_folder, "--load-dir", finished_run / "nerfstudio_models"]
    done = train("wys-tiny", ring_scene, tmp_path / "a", *options, check=False)
    assert done.returncode == 1 and "The run is finished: it has 33 of 33 steps" in done.stderr
    done = train("wys-tiny", ring_scene, tmp_path / "b", *options, "--instruction", "make it snow", check=False)
    assert done.returncode == 1 and "--base-run" in done.stderr and "Traceback" not in done.stderr


def test_a_wys_base_run_is_edited_without_reconstruction(
    finished_run: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    done = train("wys-tiny", ring_scene, tmp_path, *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
                 "paint the block red", "--base-run", finished_run)  # fmt: skip
    run = newest_run(tmp_path)
    assert "Phase: reconstruct." not in done.stdout
    assert (run / "nerfstudio_models" / "step-000000024.ckpt").is_file()
    base, start = weights(finished_run), tensors(run / "wys" / "history" / "001.ckpt")
    assert base.keys() == start.keys()
    assert all(torch.equal(base[key], start[key]) for key in base), "Undo restores the base run"
    for name in ("captured.ckpt", "history/001.ckpt"):
        assert (run / "wys" / name).is_file(), name
    # Edits start from the edited views of the base run.
    edited = finished_run / "wys" / "edits"
    reference = {path.name: path.read_bytes() for path in (run / "wys" / "reference").iterdir()}
    assert len(reference) == 13 and all(reference[path.name] == path.read_bytes() for path in edited.iterdir())
    entries = json.loads((run / "wys" / "history.json").read_text())
    assert [(entry["instruction"], entry["start"]) for entry in entries] == [
        ("make the ball blue", "captured"),
        ("paint the block red", "on top"),
    ]


def test_the_captured_scene_of_a_wys_run_is_a_base(
    finished_run: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    train("wys-tiny", ring_scene, tmp_path, *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
          "paint the block red", "--base-run", finished_run / "wys" / "captured.ckpt")  # fmt: skip
    run = newest_run(tmp_path)
    base, start = (tensors(folder / "wys" / "captured.ckpt") for folder in (finished_run, run))
    scene = [key for key in base if "relevance" not in key and base[key].is_floating_point()]
    assert scene and all(torch.equal(base[key], start[key]) for key in scene), "localization does not change the scene"
    assert any(not torch.equal(base[key], start[key]) for key in base if "mlp_relevance" in key)
    assert not (run / "wys" / "reference").exists()
    assert len(json.loads((run / "wys" / "history.json").read_text())) == 1
