"""Captures of few photographs: a run to the end, then each of nerfstudio's commands, with no and with one held-out view."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from conftest import run_wys, sentence_of, write_ring_scene
from nerfstudio.scripts import exporter, render, train
from nerfstudio.scripts.eval import ComputePSNR
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.viewer.viewer import Viewer
from test_entry_points import command
from test_pipeline import small_config

pytestmark = pytest.mark.slow
FFMPEG = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ns-render needs the ffmpeg program for paths")


@dataclass
class FewViews:
    """A finished run."""

    views: int
    config: Path


def train_on(views: int, editor: Path, folder: Path) -> FewViews:
    """Train on a capture to the end, evaluating held-out views as nerfstudio does from time to time."""
    config = small_config(write_ring_scene(folder / "scene", views=views), editor, folder / "out",
                          reconstruct_steps=8, localize_steps=2, edit_steps=4, clip_model=None)  # fmt: skip
    config.steps_per_eval_batch, config.steps_per_eval_image, config.steps_per_eval_all_images = 3, 4, 5
    train.main(config)
    assert (config.get_checkpoint_dir() / "step-000000013.ckpt").is_file()
    return FewViews(views, config.get_base_dir() / "config.yml")


@pytest.fixture(scope="module", params=[2, 11])
def run(request: pytest.FixtureRequest, editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FewViews:
    """Runs on two views, of which none is held out, and on eleven, of which one is."""
    return train_on(request.param, editor_folder, tmp_path_factory.mktemp("few"))


@pytest.mark.parametrize("views", [3, 5, 9])
def test_few_views_are_trained_on_to_the_end(views: int, editor_folder: Path, tmp_path: Path, capsys) -> None:
    folder = train_on(views, editor_folder, tmp_path).config.parent / "wys"
    assert capsys.readouterr().out.count("No view is held out: metrics of held-out views are left out.") == 1
    assert (folder / "edits.jsonl").read_text().strip() and (folder / "contact_sheet.png").is_file()


def test_eval_leaves_out_what_needs_held_out_views(run: FewViews, tmp_path: Path, capsys) -> None:
    ComputePSNR(run.config, tmp_path / "eval.json", tmp_path / "renders").main()
    # Not a number is no JSON: one view has no standard deviation.
    results = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)["results"]
    edit, printed = results.pop("edit"), capsys.readouterr().out
    assert {"edit_psnr", "edit_ssim"} <= set(edit["mean"]) and len(edit["views"]) == (2 if run.views == 2 else 10)
    if run.views == 2:
        assert results == {} and "No view is held out: metrics of held-out views are left out." in printed
    else:
        assert {"psnr", "ssim"} <= set(results) and not any("std" in name for name in results)
        assert "held out" not in printed


def test_compare_shows_few_views(run: FewViews, tmp_path: Path, monkeypatch) -> None:
    run_wys(monkeypatch, "compare", run.config.parent, "-o", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json", "contact_sheet.png", "chart.png", "relevance_A.png"
    }  # fmt: skip


def test_interpolation_between_held_out_views_names_the_option(run: FewViews, tmp_path: Path) -> None:
    sentence = sentence_of(render.RenderInterpolated(run.config, tmp_path / "path.mp4").main)
    assert (
        sentence
        == "wys: Fewer than two views are held out: --pose-source train interpolates between the training views instead."
    )


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "interpolate": lambda config, out: render.RenderInterpolated(
        config, out, pose_source="train", interpolation_steps=1, output_format="images"
    ),
    "spiral": lambda config, out: render.SpiralRender(config, out, seconds=0.1, output_format="images"),
    "pointcloud": lambda config, out: exporter.ExportPointCloud(
        config, out, num_points=100, normal_method="open3d", remove_outliers=False
    ),
    "cameras": exporter.ExportCameraPoses,
}


@FFMPEG
@pytest.mark.parametrize("name", COMMANDS)
def test_renders_and_exports_need_no_held_out_views(run: FewViews, name: str, tmp_path: Path) -> None:
    COMMANDS[name](run.config, tmp_path / "out").main()
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@FFMPEG
def test_a_camera_path_needs_no_held_out_views(run: FewViews, tmp_path: Path) -> None:
    matrix = [1.0, 0, 0, 0, 0, 0, -1.0, -0.5, 0, 1.0, 0, 0.2, 0, 0, 0, 1.0]
    path = {"camera_type": "perspective", "render_height": 8, "render_width": 10, "seconds": 0.1,
            "camera_path": [{"camera_to_world": matrix, "fov": 60.0, "aspect": 1.25}] * 2}  # fmt: skip
    (tmp_path / "path.json").write_text(json.dumps(path))
    command("render", "camera-path", "--load-config", run.config, "--camera-path-filename", tmp_path / "path.json",
            "--output-path", tmp_path / "out", "--output-format", "images")  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("split", ["test", "train+test"])
def test_rendering_held_out_views_names_the_option(run: FewViews, split: str, tmp_path: Path) -> None:
    done = command("render", "dataset", "--load-config", run.config, "--output-path", tmp_path, "--split", split,
                   "--rendered-output-names", "rgb", check=False)  # fmt: skip
    rendered = {name: len(list((tmp_path / name).rglob("*.jpg"))) for name in ("train", "test")}
    assert rendered == {
        "train": 0 if split == "test" else (2 if run.views == 2 else 10),
        "test": 0 if run.views == 2 else 1,
    }
    if run.views == 2:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "wys: No view is held out: --split train renders the training views instead." in done.stderr
    else:
        assert done.returncode == 0


def test_the_viewer_shows_a_run_on_few_views(run: FewViews, monkeypatch) -> None:
    viewers: list[Viewer] = []

    def closed(_seconds: float) -> None:
        raise KeyboardInterrupt

    def viewer(*arguments: Any, **named: Any) -> Viewer:
        viewers.append(Viewer(*arguments, **named))
        return viewers[-1]

    monkeypatch.setattr(run_viewer, "time", SimpleNamespace(sleep=closed))
    monkeypatch.setattr(run_viewer, "ViewerState", viewer)
    shown = run_viewer.RunViewer(run.config)
    shown.viewer.websocket_host = "127.0.0.1"
    with pytest.raises(KeyboardInterrupt):
        shown.main()
    viewers[0].viser_server.stop()
    assert len(viewers[0].camera_handles) == (2 if run.views == 2 else 10)
