"""Captures of all formats are refused with what is wrong in them; test_bad_input has more cases of nerfstudio's own format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import as_blender_scene, as_colmap_scene, write_ring_scene
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.dnerf_dataparser import DNeRFDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.minimal_dataparser import MinimalDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.dataparsers.nuscenes_dataparser import NuScenesDataParserConfig
from nerfstudio.data.dataparsers.phototourism_dataparser import PhototourismDataParserConfig
from nerfstudio.data.dataparsers.sdfstudio_dataparser import SDFStudioDataParserConfig
from PIL import Image

from wys_nerfstudio.datamanager import WysDataManagerConfig
from wys_nerfstudio.utils.data_checks import check_capture
from wys_nerfstudio.utils.errors import WysError


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """A scene of twelve views."""
    return write_ring_scene(tmp_path / "ring", width=24, height=20, views=12)


def edit(scene: Path, change: Callable[[dict], object], file: str = "transforms.json") -> Path:
    meta = json.loads((scene / file).read_text())
    change(meta)
    (scene / file).write_text(json.dumps(meta))
    return scene


def refusal(scene: Path, options: DataParserConfig) -> str:
    with pytest.raises(WysError) as error:
        check_capture(scene, options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def load(scene: Path, options: DataParserConfig) -> None:
    """Read a capture as a training run does after `check_capture`."""
    WysDataManagerConfig(data=scene, dataparser=options).setup(device="cpu", test_mode="val")


def load_refusal(scene: Path, options: DataParserConfig) -> str:
    with pytest.raises(WysError) as error:
        load(scene, options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def mark(scene: Path, file: str) -> Path:
    """Let a JSON file begin with a byte order mark."""
    (scene / file).write_bytes(b"\xef\xbb\xbf" + (scene / file).read_bytes())
    return scene


def with_times(scene: Path) -> Path:
    for split in ("train", "val", "test"):
        edit(scene, lambda m: [frame.update(time=0) for frame in m["frames"]], f"transforms_{split}.json")
    return scene


@pytest.mark.parametrize(
    ("convert", "options"),
    [
        (lambda ring, folder: ring, NerfstudioDataParserConfig()),
        (lambda ring, folder: ring, InstantNGPDataParserConfig(train_split_fraction=0.8)),
        (lambda ring, folder: ring / "transforms.json", InstantNGPDataParserConfig(train_split_fraction=0.8)),
        (as_blender_scene, BlenderDataParserConfig()),
        (lambda ring, folder: with_times(as_blender_scene(ring, folder)), DNeRFDataParserConfig()),
        (as_colmap_scene, ColmapDataParserConfig()),
    ],
    ids=["nerfstudio-data", "instant-ngp-data", "instant-ngp-data file", "blender-data", "dnerf-data", "colmap"],
)
def test_valid_captures_are_accepted(ring, tmp_path, convert, options):
    scene = convert(ring, tmp_path / "scene")
    check_capture(scene, options)
    load(scene, options)


def masks_for(count: int) -> Callable[[dict], object]:
    return lambda m: [frame.update(mask_path="images/frame_000.png") for frame in m["frames"][:count]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: mark(s, "transforms.json"), "begins with a byte order mark"),
        (lambda s: edit(s, lambda m: m.pop("frames")), 'has no list of "frames"'),
        (lambda s: edit(s, lambda m: m["frames"][3].update(transform_matrix=[[1]])), "is not 4 x 4 finite numbers"),
        (lambda s: edit(s, lambda m: m.pop("fl_x")), '"camera_angle_x" at its top level: use nerfstudio-data if the frames'),
        (lambda s: edit(s, lambda m: m.update(fl_x="50mm")), '"fl_x" of the capture has the invalid value "50mm"'),
        (lambda s: edit(s, lambda m: m.update(camera_angle_x=0)), '"camera_angle_x" of the capture has the invalid value 0'),
        (lambda s: edit(s, lambda m: m.update(k1=[0])), '"k1" of the capture has the invalid value [0]'),
        (lambda s: edit(s, masks_for(5)), '7 of 12 frames have no "mask_path", the first of them images/frame_005.png'),
        (lambda s: shutil.rmtree(s / "images"), "None of the images that"),
        (lambda s: (s / "images" / "frame_004.png").write_bytes(b""), "(0 bytes) cannot be read as an image"),
        (lambda s: (s / "transforms.json").unlink(), 'There is no "'),
    ],
)  # fmt: skip
def test_captures_of_instant_ngp_are_validated(ring, change, message):
    change(ring)
    assert message in refusal(ring, InstantNGPDataParserConfig())


def test_images_that_instant_ngp_skips_are_not_needed(ring):
    (ring / "images" / "frame_004.png").unlink()
    check_capture(ring, InstantNGPDataParserConfig())


@pytest.mark.parametrize("options", [BlenderDataParserConfig(), DNeRFDataParserConfig()])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_split_of_synthetic_scenes_is_validated(ring, tmp_path, split, options):
    scene, file = with_times(as_blender_scene(ring, tmp_path / "scene")), f"transforms_{split}.json"
    before = (scene / file).read_bytes()
    for change, message in {
        lambda: mark(scene, file): f'{file}" begins with a byte order mark',
        lambda: edit(scene, lambda m: m.pop("camera_angle_x"), file): f'{file}" there is no "camera_angle_x"',
        lambda: edit(scene, lambda m: m.update(frames=[]), file): f'{file}" has no list of "frames"',
        lambda: edit(scene, lambda m: m["frames"][1].update(file_path="./none"), file): f'none.png", which is listed in "{scene / file}"',
        lambda: edit(scene, lambda m: m["frames"][1].update(transform_matrix=[]), file): "is not 4 x 4 finite numbers",
        (scene / file).unlink: f'There is no "{scene / file}": for data in another format, append its name',
    }.items():  # fmt: skip
        change()
        assert message in refusal(scene, options)
        (scene / file).write_bytes(before)


NAMES = [f"frame_{i:03d}.png" for i in range(12)]


def write_lists(scene: Path, **lists: list[str]) -> Path:
    for split, names in lists.items():
        (scene / f"{split}_list.txt").write_text("\n".join(names))
    return scene


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: shutil.move(s / "colmap" / "sparse", s / "sparse"), 'colmap/sparse/0": give colmap --colmap-path the folder of'),
        (lambda s: (s / "colmap" / "sparse" / "0" / "images.txt").unlink(), "There is no COLMAP model in"),
        (lambda s: (s / "images").rename(s / "input"), '/images": give colmap --images-path that of the images'),
        (lambda s: write_lists(s, train=NAMES[:9], val=NAMES[9:]), 'test_list.txt": the split needs train_list.txt'),
        (lambda s: write_lists(s, train=NAMES[:9], validation=NAMES[9:], test=NAMES[9:]), 'val_list.txt": the split needs'),
        (lambda s: write_lists(s, val=NAMES[9:]), 'train_list.txt": the split needs'),
    ],
)  # fmt: skip
def test_colmap_models_are_validated(ring, tmp_path, change, message):
    scene = as_colmap_scene(ring, tmp_path / "scene")
    change(scene)
    assert message in refusal(scene, ColmapDataParserConfig())


def test_downscaled_colmap_images_need_no_full_ones(ring, tmp_path):
    scene = as_colmap_scene(ring, tmp_path / "scene")
    (scene / "images").rename(scene / "images_2")
    check_capture(scene, ColmapDataParserConfig(downscale_factor=2))


@pytest.mark.parametrize(("key", "kind"), [("file_path", "images"), ("mask_path", "masks")])
def test_downscaled_files_that_serve_two_frames_are_refused(ring, key, kind):
    for folder in (f"{kind}_2", "images_2"):
        (ring / folder).mkdir(exist_ok=True)
    for name in NAMES:
        shutil.copy(ring / "images" / name, ring / "images_2" / name)
    Image.new("L", (12, 10)).save(ring / f"{kind}_2" / "0.png")
    edit(ring, lambda m: [frame.update({key: f"camera{i}/0.png"}) for i, frame in enumerate(m["frames"])])
    assert f'{kind}_2/0.png" for both camera0/0.png and camera1/0.png: give --pipeline.datamanager.' in refusal(
        ring, NerfstudioDataParserConfig(downscale_factor=2)
    )


def test_missing_downscaled_masks_are_named_with_another_option(ring):
    (ring / "images").rename(ring / "images_4")
    edit(ring, lambda m: [frame.update(mask_path="masks/0.png") for frame in m["frames"]])
    assert refusal(ring, NerfstudioDataParserConfig(downscale_factor=4)) == (
        f'There is no "{ring}/masks_4/0.png": --downscale-factor 4 reads smaller masks that ns-process-data has made; without '
        "them give --pipeline.datamanager.camera-res-scale-factor 0.25 instead, before the name of the format."
    )


def write_meta_data(scene: Path, text: str) -> None:
    (scene / "meta_data.json").write_text(text, "utf8")


@pytest.mark.parametrize(
    ("convert", "options", "change", "message"),
    [
        (as_colmap_scene, ColmapDataParserConfig(downscale_factor=2), None,
         "no terminal where nerfstudio can ask whether to make them: give colmap --downscale-factor 1, and"),
        (as_colmap_scene, ColmapDataParserConfig(eval_mode="filename"), None, "must contain train or eval with --eval-mode filename"),
        (as_colmap_scene, ColmapDataParserConfig(), lambda s: write_lists(s, train=NAMES, val=NAMES, test=["none.png"]),
         "colmap refuses the data at {scene}: Some filenames for split test were not found: "),
        (as_colmap_scene, ColmapDataParserConfig(), lambda s: (s / "images" / NAMES[0]).write_text("no image"),
         f"is damaged or of an unknown format: cannot identify image file '{{folder}}/images/{NAMES[0]}'"),
        (as_colmap_scene, ColmapDataParserConfig(), lambda s: (s / "images" / NAMES[2]).unlink(),
         f'There is no image "{{folder}}/images/{NAMES[2]}", which is listed in the capture.'),
        (as_colmap_scene, ColmapDataParserConfig(), lambda s: (s / "colmap" / "sparse" / "0" / "cameras.txt").write_text(f"1 FULL_OPENCV 24 20 28 28 12 10{' 0' * 8}"),
         "colmap refuses the data at {scene}: FULL_OPENCV camera model is not supported yet!"),
        (as_colmap_scene, ColmapDataParserConfig(), lambda s: (s / "colmap" / "sparse" / "0" / "cameras.txt").write_text("x"),
         "The data at {scene} cannot be read by colmap (ValueError: invalid literal"),
        (None, SDFStudioDataParserConfig(), None, 'There is no "{folder}/meta_data.json", which sdfstudio-data reads for the data at'),
        (None, SDFStudioDataParserConfig(), lambda s: write_meta_data(s, "\ufeff{}"), 'meta_data.json" begins with a byte order mark'),
        (None, SDFStudioDataParserConfig(), lambda s: write_meta_data(s, "{"), 'meta_data.json" is not valid JSON'),
        (None, SDFStudioDataParserConfig(), lambda s: write_meta_data(s, "{}"), "The data at {scene} have no 'frames', which sdfstudio-data reads"),
        (None, MinimalDataParserConfig(), None, 'There is no "{folder}/train.npz", which minimal-parser reads'),
        (None, PhototourismDataParserConfig(), None, 'cameras.bin", which phototourism-data reads'),
        (None, NuScenesDataParserConfig(), None, "nuscenes-data refuses the data at {scene}: Database version not found"),
    ],
)  # fmt: skip
def test_errors_of_parsers_are_one_sentence(ring, tmp_path, monkeypatch, convert, options, change, message):
    scene = ring if convert is None else convert(ring, tmp_path / "scene")
    if change is not None:
        change(scene)
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    assert message.format(scene=f'"{scene}"', folder=scene) in load_refusal(scene, options)


def test_a_damaged_binary_model_is_refused(ring, tmp_path):
    scene = as_colmap_scene(ring, tmp_path / "scene")
    model = scene / "colmap" / "sparse" / "0"
    for part in ("cameras", "images"):
        (model / f"{part}.txt").unlink()
        (model / f"{part}.bin").write_bytes(b"abc")
    assert f'The data at "{scene}" cannot be read by colmap (error: unpack requires' in load_refusal(
        scene, ColmapDataParserConfig()
    )


@pytest.mark.parametrize("content", [None, ""])
def test_points_of_colmap_are_not_needed(ring, tmp_path, content):
    scene = as_colmap_scene(ring, tmp_path / "scene")
    points = scene / "colmap" / "sparse" / "0" / "points3D.txt"
    points.unlink() if content is None else points.write_text(content)
    load(scene, ColmapDataParserConfig(load_3D_points=True))


def test_the_split_of_evaluation_is_validated_before_training(ring, tmp_path):
    scene = as_blender_scene(ring, tmp_path / "scene")
    Image.fromarray(np.zeros((20, 24), np.uint16)).save(scene / "deep.png")
    edit(scene, lambda m: m["frames"][1].update(file_path="./deep"), "transforms_test.json")
    assert load_refusal(scene, BlenderDataParserConfig()).startswith(f'"{scene}/deep.png" has 16 bits per channel')
