"""`wys export`: cameras, pixels, masks, points and provenance of the data set, and refusals."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import APPLIED_TRANSFORM as APPLIED
from conftest import EDIT_INSTRUCTION as INSTRUCTION
from conftest import as_blender_scene, as_colmap_scene, run_wys, sentence_of, write_ring_scene
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from test_bad_input import TINY
from test_entry_points import newest_run, train

from wys_nerfstudio.export.camera_path import read_camera_path
from wys_nerfstudio.export.colmap import colmap_camera, require_colmap
from wys_nerfstudio.export.data_set import edit_records
from wys_nerfstudio.export.points import grid_size, ply_file, surface_points
from wys_nerfstudio.export.transforms import MODELS, CaptureFrame, camera_keys, capture_keys
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.checkpoint import read_checkpoint
from wys_nerfstudio.training.history import HistoryEntry, in_force
from wys_nerfstudio.training.run_state import RunState
from wys_nerfstudio.utils import atomic_io
from wys_nerfstudio.utils.data_checks import check_capture
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import RECORD
from wys_nerfstudio.utils.visualization import SOFTWARE, to_uint8

EDITED_COLUMNS, UNTRAINED_ROWS = slice(4, 16), slice(0, 2)
"""Pixels of the edit masks and outside the frame masks, of views of 20x16."""


@pytest.fixture(scope="module")
def exported(edited_run: Path) -> Path:
    """The run's data set, with a point for every pixel."""
    with pytest.MonkeyPatch.context() as patch:
        run_wys(patch, "export", edited_run, "-o", edited_run.parent / "data")
    return edited_run.parent / "data"


@pytest.fixture(scope="module")
def pipeline(edited_run: Path, exported: Path) -> Any:
    return eval_setup(edited_run / "config.yml", test_mode="test")[1]


def frames_of(folder: Path) -> dict[str, dict[str, Any]]:
    meta = json.loads((folder / "transforms.json").read_text())
    return {Path(frame["file_path"]).stem: frame for frame in meta["frames"]}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def square(transform: Any) -> np.ndarray:
    return np.concatenate([np.array(transform, dtype=np.float64), [[0, 0, 0, 1]]])


# ------------------------------------------------------------------------------------------------------------- cameras


def test_poses_are_those_of_the_captures_own_file(exported: Path, edited_scene: Path, pipeline: Any) -> None:
    captured, frames = frames_of(edited_scene), frames_of(exported)
    assert list(frames) == pipeline.datamanager.view_names and len(frames) == 10, "without the held-out view"
    for name, frame in frames.items():
        np.testing.assert_allclose(frame["transform_matrix"], captured[name]["transform_matrix"], atol=2e-6)
    assert json.loads((exported / "transforms.json").read_text())["applied_transform"] == APPLIED


def test_intrinsics_are_those_of_the_exported_pixels(exported: Path, edited_scene: Path) -> None:
    meta = json.loads((edited_scene / "transforms.json").read_text())
    for frame in frames_of(exported).values():
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
            assert frame[key] == pytest.approx(meta[key] / 2)
        for key in ("k1", "k2", "p1", "p2"):
            assert frame[key] == pytest.approx(meta[key])
        assert pixels(exported / frame["file_path"]).shape == (frame["h"], frame["w"], 3) == (16, 20, 3)


def test_learned_pose_corrections_are_exported(edited_run: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    corrected = WysModel.pose_corrected_camera

    def shifted(model: WysModel, cameras: Cameras, view: int) -> Cameras:
        camera = corrected(model, cameras, view)
        camera.camera_to_worlds = camera.camera_to_worlds + torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.1]])
        return camera

    monkeypatch.setattr(WysModel, "pose_corrected_camera", shifted)
    run_wys(monkeypatch, "export", edited_run, "-o", tmp_path / "data", "--points", 1)
    saved = json.loads((edited_run / "dataparser_transforms.json").read_text())
    shift = (square(APPLIED) @ np.linalg.inv(square(saved["transform"])))[:3, 2] * 0.1 / saved["scale"]
    for name, frame in frames_of(tmp_path / "data").items():
        before = np.array(frames_of(exported)[name]["transform_matrix"])
        before[:3, 3] += shift
        np.testing.assert_allclose(frame["transform_matrix"], before, atol=2e-6)


def original_poses(cameras: Cameras, transform: Any, scale: float) -> np.ndarray:
    poses = []
    for camera_to_world in cameras.camera_to_worlds.double().numpy():
        pose = square(camera_to_world)
        pose[:3, 3] /= scale
        poses.append(np.linalg.inv(square(transform)) @ pose)
    return np.stack(poses)


def test_nerfstudio_reads_the_runs_cameras_from_it(exported: Path, edited_run: Path, pipeline: Any) -> None:
    options = NerfstudioDataParserConfig(data=exported, eval_mode="all")
    check_capture(exported, options)
    outputs = options.setup().get_dataparser_outputs("train")
    saved = json.loads((edited_run / "dataparser_transforms.json").read_text())
    ours, read = pipeline.datamanager.cameras, outputs.cameras
    assert [path.stem for path in outputs.image_filenames] == pipeline.datamanager.view_names
    np.testing.assert_allclose(
        original_poses(read, outputs.dataparser_transform, outputs.dataparser_scale),
        original_poses(ours, saved["transform"], saved["scale"]),
        atol=5e-6,
    )
    for name in ("fx", "fy", "cx", "cy", "width", "height", "camera_type", "distortion_params"):
        torch.testing.assert_close(getattr(read, name), getattr(ours, name), check_dtype=False)


def test_nerfstudio_holds_out_edited_views(exported: Path) -> None:
    parser = NerfstudioDataParserConfig(data=exported).setup()
    splits = {split: len(parser.get_dataparser_outputs(split).image_filenames) for split in ("train", "val", "test")}
    assert splits == {"train": 9, "val": 1, "test": 1}


@pytest.mark.parametrize("layout", ["colmap", "blender-data", "scaled", "implied"])
def test_poses_of_other_formats_are_those_of_the_original_data(layout: str, tmp_path: Path) -> None:
    ring = write_ring_scene(tmp_path / "ring", views=8)
    file = ring / "transforms.json"
    expected = {name: np.array(frame["transform_matrix"]) for name, frame in frames_of(ring).items()}
    if layout == "colmap":
        options = all_dataparsers["colmap"]
        options.data = as_colmap_scene(ring, tmp_path / "colmap")
        options.downscale_factor = 1  # type: ignore
    elif layout == "blender-data":
        options = all_dataparsers["blender-data"]
        options.data = as_blender_scene(ring, tmp_path / "blender")
    else:
        options = NerfstudioDataParserConfig(data=ring)
        if layout == "scaled":
            file.write_text(json.dumps({**json.loads(file.read_text()), "applied_scale": 3.0}))
        else:
            (ring / "colmap" / "sparse" / "0").mkdir(parents=True)
    outputs = options.setup().get_dataparser_outputs("train")
    frame = CaptureFrame.of(options, outputs)
    poses = frame.poses(outputs.cameras.camera_to_worlds)
    for path, pose in zip(outputs.image_filenames, poses):
        np.testing.assert_allclose(square(pose), expected[path.stem], atol=5e-6)
    centers = frame.points(outputs.cameras.camera_to_worlds[:, :, 3])
    np.testing.assert_allclose(centers, poses[:, :, 3], atol=1e-9)
    assert ("applied_transform" in capture_keys(outputs.cameras, frame)) is (layout == "implied")


def test_fisheye_cameras_keep_model_radius_and_distortion() -> None:
    distortion = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    cameras = Cameras(
        torch.eye(4)[None, :3], 30.0, 31.0, 10.0, 8.0, 20, 16, distortion, CameraType.FISHEYE,
        metadata={"fisheye_crop_radius": 7.0},
    )  # fmt: skip
    frame = CaptureFrame(torch.eye(4)[:3].double(), 1.0)
    assert capture_keys(cameras, frame) == {"camera_model": "OPENCV_FISHEYE", "fisheye_crop_radius": 7.0}
    keys = camera_keys(cameras, frame)
    assert (keys["fl_x"], keys["fl_y"], keys["cx"], keys["cy"], keys["w"], keys["h"]) == (30, 31, 10, 8, 20, 16)
    assert [keys[key] for key in ("k1", "k2", "k3", "k4", "p1", "p2")] == pytest.approx(distortion[0].tolist())
    cameras.distortion_params = torch.arange(12.0)[None]
    assert camera_keys(cameras, frame)["distortion_params"] == list(range(12))


# -------------------------------------------------------------------------------------------------------------- images


def test_views_are_the_edited_and_the_captured_ones(exported: Path, edited_run: Path, pipeline: Any) -> None:
    frames, data = frames_of(exported), pipeline.datamanager
    edited = {path.stem for path in (edited_run / "wys" / "edits").glob("*.png")}
    assert len(edited) == 3 and edited == {name for name, frame in frames.items() if frame["edited"]}
    for view, (name, frame) in enumerate(frames.items()):
        captured = to_uint8(data.captured_views([view])[0])
        expected = pixels(edited_run / "wys" / "edits" / f"{name}.png") if name in edited else captured
        image = pixels(exported / frame["file_path"])
        np.testing.assert_array_equal(image, expected)
        mask = pixels(exported / frame["edit_mask_path"]) > 0
        np.testing.assert_array_equal(mask, (image != captured).any(-1))
        assert mask[:, EDITED_COLUMNS].mean() > 0.9 if name in edited else not mask.any()
        mask[:, EDITED_COLUMNS] = False
        assert not mask.any()


def test_frame_masks_are_kept(exported: Path) -> None:
    expected = np.full((16, 20), 255)
    expected[UNTRAINED_ROWS] = 0
    for frame in frames_of(exported).values():
        np.testing.assert_array_equal(pixels(exported / frame["mask_path"]), expected)


def test_renders_replace_the_views(edited_run: Path, pipeline: Any, tmp_path: Path, monkeypatch) -> None:
    run_wys(monkeypatch, "export", edited_run, "-o", tmp_path / "data", "--renders", "--points", 50)
    data, meta = pipeline.datamanager, json.loads((tmp_path / "data" / "transforms.json").read_text())
    assert meta["wys_nerfstudio"]["content"].startswith("renders of")
    for view, frame in enumerate(meta["frames"]):
        render = to_uint8(pipeline.scene_model.render_colors(data.cameras, view))
        np.testing.assert_array_equal(pixels(tmp_path / "data" / frame["file_path"]), render)
    points, _ = read_ply(tmp_path / "data" / "points.ply")
    assert 0 < len(points) <= 10 * 4


def test_every_file_has_its_provenance(exported: Path) -> None:
    meta = json.loads((exported / "transforms.json").read_text())["wys_nerfstudio"]
    assert meta["software"] == SOFTWARE and meta["content"].startswith("views of")
    (record,) = meta["edits"]
    assert record["instruction"] == INSTRUCTION and record["mask_threshold"] == 0.3
    assert record["editor"] == "untrained", "a folder is reduced to its name"
    for frame in frames_of(exported).values():
        with Image.open(exported / frame["file_path"]) as image:
            assert image.info["Software"] == SOFTWARE
            if frame["edited"]:
                assert json.loads(image.info[RECORD]) == [record] and INSTRUCTION in image.info["Description"]
            else:
                assert RECORD not in image.info and "not edited" in image.info["Description"]
        for key in ("mask_path", "edit_mask_path"):
            with Image.open(exported / frame[key]) as image:
                assert image.info["Software"] == SOFTWARE and "view" in image.info["Description"]
    header = (exported / "points.ply").read_bytes().split(b"end_header\n")[0].decode()
    assert f"comment views of a scene edited with {SOFTWARE}\n" in header and f'comment "{INSTRUCTION}"\n' in header


def test_earlier_edits_are_recorded_without_editor(edited_run: Path) -> None:
    (checkpoint,) = (edited_run / "nerfstudio_models").glob("*.ckpt")
    state = RunState.from_checkpoint(read_checkpoint(checkpoint), checkpoint)
    (entry,) = state.history
    before = {**entry, "instruction": "make it snow", "settings": {**entry["settings"], "instruction": "make it snow"}}
    on_top = {**entry, "start": "on top", "snapshot": "history/001.ckpt"}
    history = [HistoryEntry(**before), HistoryEntry(**on_top)]
    earlier, last = edit_records(history, state.settings, "timbrooks/instruct-pix2pix")
    assert earlier["instruction"] == "make it snow" and "editor" not in earlier
    assert last["instruction"] == INSTRUCTION and last["editor"] == "timbrooks/instruct-pix2pix"


def test_edits_in_force() -> None:
    def shown(*starts: Any) -> list[str]:
        entries = [HistoryEntry(str(i), start, {}, 0, None) for i, start in enumerate(starts)]
        return [entry.instruction for entry in in_force(entries)]

    assert shown("captured") == ["0"]
    assert shown("captured", "on top", "on top") == ["0", "1", "2"]
    assert shown("captured", "on top", "instead", "on top") == ["2", "3"]
    assert shown("captured", "reset") == [] and shown("captured", "reset", "on top") == ["2"]


# -------------------------------------------------------------------------------------------------------------- points


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read positions and colors point by point."""
    head, _, body = path.read_bytes().partition(b"end_header\n")
    count = int(next(line for line in head.split(b"\n") if line.startswith(b"element vertex")).split()[2])
    assert len(body) == 15 * count
    rows = [body[15 * i : 15 * i + 15] for i in range(count)]
    return np.array([np.frombuffer(row[:12], "<f4") for row in rows]), np.array([list(row[12:]) for row in rows])


class Ball(WysModel):
    """An opaque ball of radius 0.5 around the origin, of the color of its normals."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def pose_corrected_camera(self, cameras: Cameras, view: int) -> Cameras:
        return cameras[view : view + 1]

    @contextmanager
    def eval_as_view(self, view: int) -> Iterator[None]:
        yield

    def get_outputs_for_camera_ray_bundle(self, rays: Any) -> dict[str, torch.Tensor]:
        along = -(rays.origins * rays.directions).sum(-1, keepdim=True)
        inside = 0.25 - (rays.origins**2).sum(-1, keepdim=True) + along**2
        depth = along - inside.clamp_min(0).sqrt()
        rgb = 0.5 + rays.origins + rays.directions * depth
        return {"accumulation": (inside > 0).float(), "depth": depth, "rgb": rgb}


def test_points_lie_on_the_surface_in_the_captures_coordinates(edited_scene: Path) -> None:
    options = NerfstudioDataParserConfig(data=edited_scene)
    outputs = options.setup().get_dataparser_outputs("train")
    points, colors = surface_points(Ball(), outputs.cameras, 2, (32, 40))
    assert 50 < len(points) < 32 * 40
    np.testing.assert_allclose(points.norm(dim=-1), 0.5, atol=1e-5)
    np.testing.assert_allclose(colors, (0.5 + points) * 255, atol=0.51)
    # The ball in the capture: its center is the mean of all camera positions, and its radius is half the largest coordinate.
    positions = np.array([np.array(frame["transform_matrix"])[:3, 3] for frame in frames_of(edited_scene).values()])
    distances = np.linalg.norm(CaptureFrame.of(options, outputs).points(points) - positions.mean(0), axis=-1)
    np.testing.assert_allclose(distances, 0.5 / outputs.dataparser_scale, atol=1e-4)


def test_points_are_the_surface_that_the_views_show(exported: Path, edited_run: Path, pipeline: Any) -> None:
    points, colors = read_ply(exported / "points.ply")
    saved = json.loads((edited_run / "dataparser_transforms.json").read_text())
    to_capture = square(APPLIED) @ np.linalg.inv(square(saved["transform"]))
    model, cameras, expected = pipeline.scene_model, pipeline.datamanager.cameras, []
    for view in range(len(cameras)):
        outputs, rays = model.render_view(cameras, view), cameras.generate_rays(view)
        for row in range(16):
            for column in range(20):
                if outputs["accumulation"][row, column] >= 0.5:
                    at = rays.origins[row, column] + outputs["depth"][row, column] * rays.directions[row, column]
                    expected.append((to_capture @ [*(at.double().numpy() / saved["scale"]), 1])[:3])
    assert len(points) == len(expected) == len(colors)
    np.testing.assert_allclose(points, expected, rtol=1e-4, atol=1e-4)


def test_nerfstudio_reads_the_points(exported: Path) -> None:
    pytest.importorskip("open3d")
    options = NerfstudioDataParserConfig(data=exported, eval_mode="all", load_3D_points=True)
    outputs = options.setup().get_dataparser_outputs("train")
    points, colors = read_ply(exported / "points.ply")
    transform, scale = outputs.dataparser_transform.numpy() @ np.linalg.inv(square(APPLIED)), outputs.dataparser_scale
    np.testing.assert_allclose(
        outputs.metadata["points3D_xyz"], scale * (points @ transform[:, :3].T + transform[:, 3]), rtol=1e-4, atol=1e-4
    )
    assert np.abs(outputs.metadata["points3D_rgb"].numpy().astype(int) - colors).max() <= 1


@pytest.mark.parametrize(("pixels", "size"), [(1e9, (30, 40)), (300.0, (15, 20)), (12.0, (3, 4)), (0.1, (1, 1))])
def test_grids_have_about_the_number_of_pixels(pixels: float, size: tuple[int, int]) -> None:
    assert grid_size(30, 40, pixels) == size


def test_long_comments_are_cut_off() -> None:
    content = ply_file(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.uint8), ["x" * 5000])
    assert max(map(len, content.split(b"\n"))) == 1000


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.usefixtures("torch_home")
def test_nerfacto_trains_on_it(exported: Path, tmp_path: Path) -> None:
    train("nerfacto", exported, tmp_path, "--max-num-iterations=3", "--pipeline.model.implementation=torch",
          "--pipeline.datamanager.train-num-rays-per-batch=64", "--pipeline.model.num-proposal-samples-per-ray", "8", "8",
          "--pipeline.model.num-nerf-samples-per-ray=8", TORCH_HOME=os.environ["TORCH_HOME"])  # fmt: skip
    assert (newest_run(tmp_path) / "nerfstudio_models" / "step-000000002.ckpt").is_file()


@pytest.mark.slow
def test_it_can_be_edited_again(exported: Path, editor_folder: Path, tmp_path: Path) -> None:
    done = train("wys-tiny", exported, tmp_path, *TINY, "--editor", editor_folder, "--instruction", "make it snow")
    assert "of 9 views are edited" in " ".join(done.stdout.split())


# -------------------------------------------------------------------------------------------------------------- COLMAP


@pytest.fixture(scope="module")
def colmap_export(edited_run: Path) -> Path:
    """The run's data set with a COLMAP model."""
    folder = edited_run.parent / "colmap-data"
    with pytest.MonkeyPatch.context() as patch:
        run_wys(patch, "export", edited_run, "-o", folder, "--format", "colmap", "--points", 200)
    return folder


def test_nerfstudio_reads_the_colmap_model(colmap_export: Path) -> None:
    options = ColmapDataParserConfig(
        data=colmap_export, colmap_path=Path("sparse/0"), eval_mode="all", downscale_factor=1
    )
    outputs = options.setup().get_dataparser_outputs("train")
    frames = frames_of(colmap_export)
    assert [path.stem for path in outputs.image_filenames] == list(frames)
    poses = original_poses(outputs.cameras, outputs.dataparser_transform, outputs.dataparser_scale)
    for i, frame in enumerate(frames.values()):
        np.testing.assert_allclose(poses[i], frame["transform_matrix"], atol=5e-6)
        for name, key in (("fx", "fl_x"), ("fy", "fl_y"), ("cx", "cx"), ("cy", "cy"), ("width", "w"), ("height", "h")):
            assert getattr(outputs.cameras, name)[i].item() == pytest.approx(frame[key])
        expected = [frame[key] for key in ("k1", "k2", "k3", "k4", "p1", "p2")]
        assert outputs.cameras.distortion_params[i].tolist() == pytest.approx(expected)
    points, colors = read_ply(colmap_export / "points.ply")
    transform, scale = outputs.dataparser_transform.numpy(), outputs.dataparser_scale
    expected = scale * (points @ transform[:, :3].T + transform[:, 3])
    np.testing.assert_allclose(outputs.metadata["points3D_xyz"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(outputs.metadata["points3D_rgb"], colors)


@pytest.mark.skipif(shutil.which("colmap") is None, reason="needs COLMAP")
def test_colmap_reads_the_model(colmap_export: Path, tmp_path: Path) -> None:
    command = ["colmap", "model_converter", "--input_path", colmap_export / "sparse" / "0", "--output_path", tmp_path]
    subprocess.run([*map(str, command), "--output_type", "TXT"], check=True, capture_output=True)
    for name, count in (("images", 10), ("cameras", 1), ("points3D", len(read_ply(colmap_export / "points.ply")[0]))):
        assert f": {count}" in (tmp_path / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("model", "distortion", "expected"),
    [
        ("OPENCV", {}, "PINHOLE 20 16 30.0 31.0 10.0 8.0"),
        ("OPENCV", {"k1": 0.1, "p2": 0.2}, "OPENCV 20 16 30.0 31.0 10.0 8.0 0.1 0.0 0.0 0.2"),
        (
            "OPENCV",
            {"k2": 0.1, "k3": 0.2, "p1": 0.3},
            "FULL_OPENCV 20 16 30.0 31.0 10.0 8.0 0.0 0.1 0.3 0.0 0.2 0.0 0.0 0.0",
        ),
        ("OPENCV_FISHEYE", {"k1": 0.1, "k4": 0.4}, "OPENCV_FISHEYE 20 16 30.0 31.0 10.0 8.0 0.1 0.0 0.0 0.4"),
    ],
)
def test_colmap_cameras(model: str, distortion: dict[str, float], expected: str) -> None:
    frame = {"fl_x": 30.0, "fl_y": 31.0, "cx": 10.0, "cy": 8.0, "w": 20, "h": 16, **distortion}
    assert colmap_camera(model, frame) == expected


@pytest.mark.parametrize(
    ("model", "distortion"), [("OPENCV", {"k4": 0.1}), ("OPENCV_FISHEYE", {"p1": 0.1}), ("EQUIRECTANGULAR", {})]
)
def test_cameras_that_colmap_does_not_have_are_refused(model: str, distortion: dict[str, float]) -> None:
    with pytest.raises(
        WysError, match=f"COLMAP has no camera model for {model} cameras .*: leave out --format colmap."
    ):
        colmap_camera(model, distortion)


def test_names_with_blanks_are_refused() -> None:
    frame = {"fl_x": 30.0, "fl_y": 31.0, "cx": 10.0, "cy": 8.0, "w": 20, "h": 16}
    require_colmap("OPENCV", frame, ["a", "b"])
    with pytest.raises(WysError, match='The name of the view "my view" has a blank, .* leave out --format colmap.'):
        require_colmap("OPENCV", frame, ["a", "my view"])


def test_cameras_that_colmap_does_not_have_are_refused_before_work(
    edited_run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(MODELS, CameraType.PERSPECTIVE.value, "ORTHOPHOTO")
    arguments = ["export", edited_run, "-o", tmp_path / "data", "--format", "colmap"]
    assert "COLMAP has no camera model for ORTHOPHOTO" in sentence_of(lambda: run_wys(monkeypatch, *arguments))
    assert not (tmp_path / "data").exists()


# --------------------------------------------------------------------------------------------------------- camera path


def write_camera_path(file: Path, **changes: Any) -> torch.Tensor:
    """Write a camera path as nerfstudio's viewer does and return its poses."""
    turn = torch.linalg.qr(torch.tensor([[1.0, 0.2, 0.1], [0.3, -1.0, 0.4], [0.2, 0.5, 1.0]]))[0]
    turn[:, 0] *= torch.linalg.det(turn).sign()
    poses = torch.eye(4).repeat(3, 1, 1)
    poses[:, :3, :3] = turn
    poses[:, :3, 3] = turn[:, 2] * torch.tensor([0.7, 0.8, 0.9])[:, None]
    cameras = [{"camera_to_world": pose.flatten().tolist(), "fov": 40.0, "aspect": 4 / 3} for pose in poses]
    content = {"camera_type": "perspective", "render_height": 18, "render_width": 24, "camera_path": cameras}
    file.write_text(json.dumps({**content, **changes}))
    return poses


@pytest.mark.parametrize("data_format", ["nerfstudio", "colmap"])
def test_renders_along_a_camera_path(
    data_format: str, edited_run: Path, pipeline: Any, tmp_path: Path, monkeypatch, capsys
) -> None:
    file, data = tmp_path / "path.json", tmp_path / "data"
    poses = write_camera_path(file)
    arguments = ["--renders", "--camera-path", file, "--points", 50, "--format", data_format]
    run_wys(monkeypatch, "export", edited_run, "-o", data, *arguments)
    assert "Wrote 3 renders along the camera path and " in " ".join(capsys.readouterr().out.split())
    options = NerfstudioDataParserConfig(data=data, eval_mode="all")
    check_capture(data, options)
    outputs = options.setup().get_dataparser_outputs("train")
    assert outputs.mask_filenames is None and not (data / "edit_masks").exists() and not (data / "masks").exists()
    saved = json.loads((edited_run / "dataparser_transforms.json").read_text())
    in_capture = np.linalg.inv(square(saved["transform"])) @ np.stack(
        [square(np.hstack([pose[:3, :3], pose[:3, 3:] / saved["scale"]])) for pose in poses.double().numpy()]
    )
    np.testing.assert_allclose(
        original_poses(outputs.cameras, outputs.dataparser_transform, outputs.dataparser_scale), in_capture, atol=5e-6
    )
    focal = 9 / math.tan(math.radians(20))
    for number, path in enumerate(outputs.image_filenames):
        camera = Cameras(poses[number : number + 1, :3], focal, focal, 12.0, 9.0)
        for name in ("fx", "fy", "cx", "cy", "width", "height", "camera_type"):
            torch.testing.assert_close(getattr(outputs.cameras, name)[number], getattr(camera, name)[0])
        render = to_uint8(pipeline.scene_model.get_outputs_for_camera(camera)["rgb"])
        np.testing.assert_array_equal(pixels(path), render)
        with Image.open(path) as image:
            assert INSTRUCTION in image.info["Description"]
    assert (data / "sparse" / "0" / "images.txt").exists() is (data_format == "colmap")


def broken_pose(**changes: Any) -> list[dict[str, Any]]:
    return [{"camera_to_world": torch.eye(4).flatten().tolist(), "fov": 40.0, **changes}]


AT_NAN = [1.0, 0.0, 0.0, float("nan"), 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
"""The first three rows of a pose."""

CAMERA_PATHS: dict[str, tuple[dict[str, Any], str]] = {
    "no cameras": (
        {"camera_path": []},
        '"path.json" has no cameras under "camera_path": nerfstudio\'s viewer saves one',
    ),
    "equirectangular": (
        {"camera_type": "equirectangular"},
        'The cameras of "path.json" are equirectangular cameras: choose Perspective in the viewer\'s Render tab.',
    ),
    "orthographic": ({"camera_type": "orthographic"}, 'The cameras of "path.json" are orthographic cameras'),
    "a crop": ({"crop": {}}, 'The camera path "path.json" crops the scene: save it again without Crop Viewport.'),
    **{
        name: (changes, 'The camera path "path.json" has a camera without a valid pose, "fov" or size: save it again.')
        for name, changes in {
            "a short pose": {"camera_path": broken_pose(camera_to_world=[1.0])},
            "no rotation": {"camera_path": broken_pose(camera_to_world=[0.0] * 16)},
            "a place that is NaN": {"camera_path": broken_pose(camera_to_world=[*AT_NAN, *[0.0] * 3, 1.0])},
            "a field of view of zero": {"camera_path": broken_pose(fov=0.0)},
            "NaN": {"camera_path": broken_pose(fov=float("nan"))},
            "no field of view": {"camera_path": broken_pose(fov=180.0000001)},
            "no number": {"camera_path": broken_pose(fov="wide")},
            "no list": {"camera_path": 3},
            "no height": {"render_height": 0},
        }.items()
    },
}


@pytest.mark.parametrize("case", CAMERA_PATHS)
def test_camera_paths_that_cannot_be_rendered_are_refused(case: str, tmp_path: Path, monkeypatch) -> None:
    changes, message = CAMERA_PATHS[case]
    monkeypatch.chdir(tmp_path)
    write_camera_path(Path("path.json"), **changes)
    with pytest.raises(WysError, match=re.escape(message)):
        read_camera_path(Path("path.json"))


def test_files_that_are_no_camera_paths_are_refused(edited_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def sentence(*arguments: str) -> str:
        return sentence_of(lambda: run_wys(monkeypatch, "export", edited_run, "-o", "data", *arguments))

    missing = 'The camera path "path.json" cannot be read (No such file or directory): nerfstudio\'s viewer saves one'
    assert missing in sentence("--renders", "--camera-path", "path.json")
    Path("path.json").write_bytes(b"\xff{")
    text = '"path.json" is not a camera path, because it is not JSON: nerfstudio\'s viewer saves one'
    assert text in sentence("--renders", "--camera-path", "path.json")
    assert "The cameras of --camera-path are rendered: add --renders." in sentence("--camera-path", "path.json")
    assert not Path("data").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


def forget_edits(run: Path) -> None:
    (checkpoint,) = (run / "nerfstudio_models").glob("*.ckpt")
    state = read_checkpoint(checkpoint)
    state["wys"]["views"].update(edited=[], current=torch.empty(0, 16, 20, 3, dtype=torch.uint8))
    torch.save(state, checkpoint)


def of_another_method(run: Path) -> None:
    (run / "config.yml").write_text("!!python/object:nerfstudio.engine.trainer.TrainerConfig\nmethod_name: nerfacto")


REFUSALS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no run": (lambda run: (run / "config.yml").unlink(), [], 'There is no config.yml in "run": wys export takes'),
    "another method": (of_another_method, [], '"run" is not a wys run: wys export takes'),
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "nerfstudio_models"),
        [],
        'The run "run" has no checkpoint yet: wait until it has saved one',
    ),
    "no edits": (forget_edits, [], 'The run "run" has no edited views at step 4: resume it with --load-dir "run"'),
    "not empty": (lambda run: os.makedirs("data/images"), [], 'The folder "data" is not empty: give a new one.'),
    "a file": (lambda run: Path("data").touch(), [], 'The folder "data" cannot be written (File exists): give -o'),
    "inside the run": (lambda run: None, ["-o", "run/data"], '-o "run/data" is inside the run "run": give -o another'),
    "no points": (lambda run: None, ["--points", "0"], "--points must be at least 1, not 0."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, edited_run: Path, tmp_path: Path, monkeypatch) -> None:
    change, arguments, message = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(edited_run, "run")
    change(Path("run"))
    before = sorted(tmp_path.rglob("*"))
    assert message in sentence_of(lambda: run_wys(monkeypatch, "export", "run", "-o", "data", *arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_no_transforms(edited_run: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_io.os, "fsync", fail)
    sentence = sentence_of(lambda: run_wys(monkeypatch, "export", edited_run, "-o", tmp_path / "data"))
    assert 'images/frame_000.png" could not be written: No space left on device.' in sentence
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_a_run_on_other_views_is_refused(edited_run: Path, edited_scene: Path, tmp_path: Path, monkeypatch) -> None:
    backup = shutil.copy(edited_scene / "images" / "frame_001.png", tmp_path)
    try:
        Image.new("RGB", (40, 32)).save(edited_scene / "images" / "frame_001.png")
        sentence = sentence_of(lambda: run_wys(monkeypatch, "export", edited_run, "-o", tmp_path / "data"))
    finally:
        shutil.copy(backup, edited_scene / "images" / "frame_001.png")
    assert "The picture of the view frame_001 is not what that run was trained on" in sentence
    assert not (tmp_path / "data").exists()
