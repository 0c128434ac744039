"""The training views: captured and edited pixels, ray batches, relevance maps, and their files."""

import gc
import json
import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_blender_scene, as_colmap_scene, write_ring_scene
from emulated_gpu import emulated_gpu, memory
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile

from wys_nerfstudio import relevance
from wys_nerfstudio.datamanager import WysDataManager, WysDataManagerConfig
from wys_nerfstudio.editing import Editor, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.relevance.cache import RelevanceRequest, save_maps
from wys_nerfstudio.training.scene import EditInput
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import read_image
from wys_nerfstudio.utils.visualization import apply_colormap, read_png, to_uint8

HEIGHT, WIDTH = 32, 40


def load(scene: Path, device: str = "cpu", test_mode: str = "val", **options: object) -> WysDataManager:
    parser = NerfstudioDataParserConfig(load_3D_points=False)
    config = WysDataManagerConfig(
        data=scene,
        train_num_rays_per_batch=256,
        eval_num_rays_per_batch=64,
        **{"dataparser": parser, "edit_num_rays_per_batch": 600, "edit_patch_size": 16, **options},
    )
    return config.setup(device=device, test_mode=test_mode, world_size=1, local_rank=0)


@pytest.fixture(scope="module")
def shared(ring_scene: Path) -> WysDataManager:
    """For tests that do not change it."""
    return load(ring_scene)


@pytest.fixture
def data(ring_scene: Path) -> WysDataManager:
    return load(ring_scene)


@pytest.fixture(scope="module")
def editor(editor_folder: Path) -> Editor:
    return load_editor(str(editor_folder))


def file_pixels(data: WysDataManager, view: int) -> np.ndarray:
    with Image.open(data.train_dataset.image_filenames[view]) as image:
        return np.array(image)


def request(**changes) -> RelevanceRequest:
    settings = {
        "editor": "some",
        "dtype": "float32",
        "instruction": "make it red",
        "noise_level": 0.8,
        "num_samples": 1,
        "seed": 3,
        "resolution": None,
    }
    return RelevanceRequest(**{**settings, **changes})


# ----------------------------------------------------------------------------------------------------------- captured views


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_views_are_numbered_as_in_the_dataset(ring_scene, seed):
    random.seed(seed)  # images are read side by side
    data = load(ring_scene)
    for view in range(data.num_views):
        assert to_uint8(data.captured_views([view])[0]).tolist() == file_pixels(data, view).tolist()


def test_there_is_one_captured_view_per_training_image(shared):
    names = [path.stem for path in shared.train_dataset.image_filenames]
    assert shared.view_names == names
    assert shared.num_views == len(names) == 13  # one of fourteen is held out for evaluation
    assert shared.view_size == (HEIGHT, WIDTH)
    assert shared.captured_views([5, 2]).shape == (2, HEIGHT, WIDTH, 3)
    assert torch.equal(shared.captured_views([5, 2])[1], shared.captured_views([2])[0])


def test_no_view_is_edited_initially(shared):
    views = range(shared.num_views)
    assert shared.edited_views == set()
    assert torch.equal(shared.current_views(views), shared.captured_views(views))


def test_distorted_images_are_not_resampled(tmp_path):
    data = load(write_ring_scene(tmp_path / "distorted", distorted=True))
    assert bool(data.train_dataset.cameras.distortion_params.any())
    assert all(
        to_uint8(data.captured_views([view])[0]).tolist() == file_pixels(data, view).tolist() for view in range(3)
    )


@pytest.mark.parametrize("white", [False, True])
def test_transparent_pixels_show_the_background(tmp_path, white):
    data = load(write_ring_scene(tmp_path / "alpha", alpha=True, views=5))
    data.background = float(white)
    for view in range(data.num_views):
        pixels = file_pixels(data, view).astype(float) / 255
        transparent = pixels[..., 3] == 0
        assert 0 < transparent.mean() < 1
        expected = pixels[..., :3] * pixels[..., 3:] + float(white) * (1 - pixels[..., 3:])
        for views in (data.captured_views, data.reference_views, data.current_views):
            assert to_uint8(views([view])[0]).tolist() == np.round(expected * 255).astype(int).tolist()


def test_ray_batches_of_cutouts_are_transparent(tmp_path):
    data = load(write_ring_scene(tmp_path / "alpha", alpha=True, views=11))
    for dataset, (_, batch) in ((data.train_dataset, data.next_train(0)), (data.eval_dataset, data.next_eval(0))):
        assert set(batch["image"][:, 3].tolist()) == {0.0, 1.0}
        for color, (view, row, column) in zip(batch["image"], batch["indices"].tolist()):
            assert torch.equal(color, dataset.get_data(view)["image"][row, column])


@pytest.mark.parametrize("background", [0.0, 1.0])
def test_edited_views_of_cutouts_are_opaque_and_restored(tmp_path, background):
    scene = write_ring_scene(tmp_path / "alpha", alpha=True, views=5)
    data, resumed = load(scene), load(scene)
    data.background = resumed.background = background
    data.set_view(2, torch.rand(HEIGHT, WIDTH, 3))
    edited = data.current_views([2])
    data.start_from_current()
    assert torch.equal(data.reference_views(range(5)), data.current_views(range(5)))
    assert torch.equal(data.reference_views([2]), edited)
    data.set_view(4, torch.rand(HEIGHT, WIDTH, 3))
    state = data.views_state()
    assert state["current"].shape == (2, HEIGHT, WIDTH, 3) and state["reference"].shape == (5, HEIGHT, WIDTH, 3)
    write_views(data, tmp_path / "edits")
    assert torch.equal(read_png(tmp_path / "edits" / f"{data.view_names[2]}.png"), edited[0])
    resumed.load_views_state(state)
    for views in ("current_views", "reference_views"):
        assert torch.equal(getattr(resumed, views)(range(5)), getattr(data, views)(range(5)))
    assert resumed.reference_hash() == data.reference_hash()
    drawn = resumed.next_train(0)[1]
    alphas, edited_views = drawn["image"][:, 3], torch.isin(drawn["indices"][:, 0], torch.tensor([2, 4]))
    assert set(alphas[edited_views].tolist()) == {1.0} and set(alphas[~edited_views].tolist()) == {0.0, 1.0}
    resumed.start_from_captured()
    assert torch.equal(resumed.captured_views(range(5)), resumed.current_views(range(5)))
    assert resumed.next_train(0)[1]["image"][:, 3].eq(0).any()


def test_views_that_differ_in_transparency_alone_are_refused(tmp_path):
    scene = write_ring_scene(tmp_path / "alpha", alpha=True, views=5)
    state = load(scene).views_state()
    path = scene / "images" / "frame_003.png"
    pixels = np.array(Image.open(path))
    pixels[pixels[..., 3] == 0, :3] = 0
    Image.fromarray(pixels).save(path)
    pixels[..., 3] = 255
    after = load(scene)  # colors of transparent pixels count
    with pytest.raises(WysError, match="The picture of the view frame_003 is not what that run was trained on"):
        after.check_views(state)
    state = after.views_state()
    Image.fromarray(pixels).save(path)  # black on black
    with pytest.raises(WysError, match="The picture of the view frame_003 is not what that run was trained on"):
        load(scene).check_views(state)


def test_repeated_file_names_are_made_unique_by_numbers(tmp_path):
    scene = write_ring_scene(tmp_path / "scene", views=4)
    meta = json.loads((scene / "transforms.json").read_text())
    for i, frame in enumerate(meta["frames"]):
        (scene / f"camera{i}").mkdir()
        shutil.move(scene / frame["file_path"], scene / f"camera{i}" / "photo.png")
        frame["file_path"] = f"camera{i}/photo.png"
    (scene / "transforms.json").write_text(json.dumps(meta))
    assert load(scene).view_names == ["00000_photo", "00001_photo", "00002_photo", "00003_photo"]


def rename_frames(scene: Path, names: Sequence[str]) -> Path:
    def rename(meta: dict) -> None:
        for frame, name in zip(meta["frames"], names):
            shutil.move(scene / frame["file_path"], scene / "images" / name)
            frame["file_path"] = f"images/{name}"

    return change_meta(scene, rename)


def test_names_that_differ_in_case_only_are_numbered(tmp_path):
    scene = rename_frames(write_ring_scene(tmp_path / "scene", views=3), ["A.png", "B.png", "a.png"])
    assert load(scene).view_names == ["00000_A", "00001_B", "00002_a"]


@pytest.mark.parametrize("letter", ["x", "\u00fc", "\u732b"])
def test_long_names_are_cut_off(tmp_path, letter):
    length = (255 - len("1.png")) // len(letter.encode())
    names = [f"{letter * length}{i}.png" for i in range(3)]
    data = load(rename_frames(write_ring_scene(tmp_path / "scene", views=3), names))
    assert data.view_names == [f"{i:05d}_{data.view_names[0][6:]}" for i in range(3)]
    assert names[0].startswith(data.view_names[0][6:])
    data.set_view(1, torch.zeros(HEIGHT, WIDTH, 3))
    data.write_edited_views(tmp_path / "edits", data.views_state())
    assert [path.stem for path in (tmp_path / "edits").iterdir()] == [data.view_names[1]]


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    scene = rename_frames(write_ring_scene(tmp_path / "scene", views=3), ["a.png", "b.png", "\udcff.png"])
    with pytest.raises(WysError, match=r"The file name '\\udcff.png' is not valid UTF-8: rename the file."):
        load(scene)


@pytest.mark.parametrize("per_frame", [True, False])
def test_views_of_different_sizes_are_refused_with_two_names(tmp_path, per_frame):
    scene = write_ring_scene(tmp_path / "mixed")
    meta = json.loads((scene / "transforms.json").read_text())
    with Image.open(scene / "images" / "frame_005.png") as image:
        image.resize((30, 32)).save(scene / "images" / "frame_005.png")
    if per_frame:  # every frame has its own intrinsics, as written by ns-process-data
        shared = {key: meta.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
        for i, frame in enumerate(meta["frames"]):
            frame.update(shared | ({"w": 30} if i == 5 else {}))
        (scene / "transforms.json").write_text(json.dumps(meta))
    sentence = "All views must have one size, and frame_000.png is 40x32 while frame_005.png is 30x32: crop them to one"
    with pytest.raises(WysError, match=sentence):
        load(scene)


def test_cameras_of_different_sizes_are_refused(tmp_path):
    scene = write_ring_scene(tmp_path / "mixed", views=5)
    meta = json.loads((scene / "transforms.json").read_text())
    shared = {key: meta.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    for i, frame in enumerate(meta["frames"]):
        frame.update(shared | ({"h": 99} if i == 2 else {}))
    (scene / "transforms.json").write_text(json.dumps(meta))
    with pytest.raises(WysError, match='frame_002.png" is 40x32 and its camera 40x99'):
        load(scene)


def change_meta(scene: Path, change: Callable[[dict], object]) -> Path:
    file = scene / "transforms.json"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))
    return scene


def scale_cameras(meta: dict, scale: float) -> None:
    meta.update({key: meta[key] * scale for key in ("fl_x", "fl_y", "cx", "cy")})
    meta.update(w=round(meta["w"] * scale), h=round(meta["h"] * scale))


PARSERS = {
    "nerfstudio": (lambda scene, folder: scene, NerfstudioDataParserConfig),
    "instant-ngp": (lambda scene, folder: scene, InstantNGPDataParserConfig),
    "colmap": (as_colmap_scene, ColmapDataParserConfig),
}


@pytest.mark.parametrize("test_mode", ["val", "test", "inference"])
@pytest.mark.parametrize("scale", [2, 0.5])
@pytest.mark.parametrize("parser", PARSERS)
def test_cameras_are_rescaled_to_the_images(tmp_path, capsys, parser, scale, test_mode):
    convert, config = PARSERS[parser]
    fitting = write_ring_scene(tmp_path / "fitting", views=20)
    scaled = change_meta(write_ring_scene(tmp_path / "scaled", views=20), lambda meta: scale_cameras(meta, scale))
    expected, data = (
        load(convert(scene, tmp_path / f"{scene.name}_converted"), test_mode=test_mode, dataparser=config())
        for scene in (fitting, scaled)
    )
    for ours, theirs in ((data.train_dataset, expected.train_dataset), (data.eval_dataset, expected.eval_dataset)):
        assert len(ours) > 0
        for name in ("fx", "fy", "cx", "cy", "width", "height", "camera_to_worlds"):
            torch.testing.assert_close(getattr(ours.cameras, name), getattr(theirs.cameras, name))
    line = f"The images are 40x32 and their cameras {round(40 * scale)}x{round(32 * scale)}: the cameras are rescaled."
    assert " ".join(capsys.readouterr().out.split()).count(line) == 1


def test_held_out_images_are_compared_with_their_cameras(tmp_path):
    scene = write_ring_scene(tmp_path / "scene", views=12)
    held_out = load(scene).eval_dataset.image_filenames[0]
    Image.new("RGB", (41, 32)).save(held_out)
    with pytest.raises(WysError, match=f'{held_out.name}" is 41x32 and its camera 40x32'):
        load(scene)


@pytest.mark.parametrize("rounding", [math.floor, math.ceil])
@pytest.mark.parametrize("factor", [2, 3])
def test_downscaled_images_agree_with_their_cameras(tmp_path, factor, rounding):
    scene = write_ring_scene(tmp_path / "scene", width=81, height=65, views=4)
    size = rounding(81 / factor), rounding(65 / factor)
    (scene / f"images_{factor}").mkdir()
    for path in (scene / "images").iterdir():
        Image.open(path).resize(size).save(scene / f"images_{factor}" / path.name)
    data = load(scene, dataparser=NerfstudioDataParserConfig(downscale_factor=factor))
    assert data.view_size == size[::-1] == (int(data.cameras.height[0]), int(data.cameras.width[0]))
    assert float(data.cameras.fx[0]) == pytest.approx(1.2 * 81 / factor)


def test_scaled_down_views_agree_with_their_cameras(tmp_path):
    data = load(write_ring_scene(tmp_path / "scene", width=50, height=40, views=4), camera_res_scale_factor=0.58)
    assert data.view_size == (23, 28)  # in single precision, 50 * 0.58 is 29
    assert data.view_size == (int(data.cameras.height[0]), int(data.cameras.width[0]))


def test_renders_need_no_images(tmp_path):
    scene = write_ring_scene(tmp_path / "scene", views=4)
    shutil.rmtree(scene / "images")
    parser = NerfstudioDataParserConfig(downscale_factor=1)
    assert load(scene, test_mode="inference", dataparser=parser).num_views == 4


@pytest.mark.parametrize(
    ("convert", "config", "change", "message"),
    [
        (as_blender_scene, BlenderDataParserConfig, lambda m: m["frames"][3]["transform_matrix"].reverse(),
         'The pose of the view "frame_003.png" is .*: it must be a rotation and a translation'),
        (as_blender_scene, BlenderDataParserConfig, lambda m: [row.__setitem__(0, -row[0]) for row in m["frames"][0]["transform_matrix"]],
         'The pose of the view "frame_000.png" is mirrored'),
        (as_colmap_scene, ColmapDataParserConfig, lambda m: [frame.update(transform_matrix=m["frames"][0]["transform_matrix"]) for frame in m["frames"]],
         "were all captured from one place"),
        (None, NerfstudioDataParserConfig, lambda m: m.update(train_filenames=[], val_filenames=["images/frame_000.png"]),
         'No view of ".*scene" is left for training: change its train_filenames, --eval-mode'),
        (None, NerfstudioDataParserConfig, lambda m: m.update(train_filenames=["images/frame_001.png"], val_filenames=[]),
         'Only one view of ".*scene" is left for training: change its train_filenames, --eval-mode'),
        (None, InstantNGPDataParserConfig, lambda m: m["frames"].extend(m["frames"][:4] * 2),
         "with a single held-out view: hold out more, for example with --train-split-fraction 0.8"),
    ],
)  # fmt: skip
def test_cameras_that_cannot_be_trained_on_are_refused(tmp_path, convert, config, change, message):
    scene = change_meta(write_ring_scene(tmp_path / "scene", views=5), change)
    with pytest.raises(WysError, match=message):
        load(scene if convert is None else convert(scene, tmp_path / "converted"), dataparser=config())


def test_poses_that_a_parser_mirrors_are_refused(tmp_path):
    def turn_over(meta: dict) -> None:
        for frame in meta["frames"]:
            matrix = np.diag([1, -1, -1, 1]) @ np.array(frame["transform_matrix"])
            frame["transform_matrix"] = matrix.tolist()

    scene = write_ring_scene(tmp_path / "scene", views=6)
    config = NerfstudioDataParserConfig(orientation_method="pca")
    outcomes = []
    for _ in range(2):  # nerfstudio mirrors two poses if the scene is upside down
        try:
            load(scene, dataparser=config)
        except WysError as error:
            outcomes.append(str(error))
        change_meta(scene, turn_over)
    assert outcomes and "is mirrored: choose another --orientation-method than pca" in outcomes[0]


# ------------------------------------------------------------------------------------------------------------ image files


def resave(scene: Path, save: Callable[[Image.Image, Path], Path], *views: int) -> list[Path]:
    """Write images of a scene in another way, by default all, and return the files."""
    files: list[Path] = []

    def change(meta: dict) -> None:
        for view in views or range(len(meta["frames"])):
            before = scene / meta["frames"][view]["file_path"]
            with Image.open(before) as image:
                image.load()
            before.unlink()
            files.append(save(image, before))
            meta["frames"][view]["file_path"] = files[-1].relative_to(scene).as_posix()

    change_meta(scene, change)
    return files


def in_mode(mode: str, suffix: str = ".png", **options: object) -> Callable[[Image.Image, Path], Path]:
    def save(image: Image.Image, file: Path) -> Path:
        image.convert(mode).save(file.with_suffix(suffix), **options)
        return file.with_suffix(suffix)

    return save


def in_16_bits(suffix: str) -> Callable[[Image.Image, Path], Path]:
    def save(image: Image.Image, file: Path) -> Path:
        Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257).save(file.with_suffix(suffix))
        return file.with_suffix(suffix)

    return save


def as_array(image: Image.Image, file: Path) -> Path:
    np.save(file.with_suffix(".npy"), np.array(image))
    return file.with_suffix(".npy")


def animated(image: Image.Image, file: Path) -> Path:
    image.save(file.with_suffix(".gif"), save_all=True, append_images=[image.rotate(90)])
    return file.with_suffix(".gif")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(256)) * (3 * HEIGHT * WIDTH // 256)
CONVERTED = {
    "palette": in_mode("P"),
    "palette with transparency": in_mode("P", transparency=0),
    "gray": in_mode("L"),
    "gray JPEG": in_mode("L", ".jpg"),
    "gray with alpha": in_mode("LA"),
    "1 bit": in_mode("1"),
    "color with alpha": in_mode("RGBA"),
    "TIFF": in_mode("RGB", ".tif"),
    "WebP": in_mode("RGB", ".webp"),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_images_are_converted_as_those_of_image_edits(tmp_path, kind):
    scene = write_ring_scene(tmp_path / "scene", views=12)
    resave(scene, CONVERTED[kind], *range(0, 12, 2))
    data = load(scene)
    for dataset in (data.train_dataset, data.eval_dataset):
        for index, file in enumerate(dataset.image_filenames):
            expected = read_image(file)
            pixels = dataset.get_numpy_image(index)
            assert np.array_equal(pixels[..., :3], expected.pixels.numpy())
            assert (pixels.shape[-1] == 4) == (expected.alpha is not None)
            if expected.alpha is not None:
                assert np.array_equal(pixels[..., 3], expected.alpha)


REFUSED = {
    "is a CMYK image: convert it to RGB first": in_mode("CMYK", ".jpg"),
    "has 16 bits per channel": in_16_bits(".png"),
    "has 16 bits per channel, but": in_16_bits(".tif"),
    "has 32 bits per channel": in_mode("F", ".tif"),
    "is an animation or has several pages": animated,
    "is a PPM image, which is not supported": in_mode("RGB", ".ppm"),
    r"\(\d+ bytes\) cannot be read as an image .*: give an undamaged PNG, JPEG, WebP": as_array,
}


@pytest.mark.parametrize("message", REFUSED)
def test_images_that_image_edits_refuse_are_refused(tmp_path, message):
    scene = write_ring_scene(tmp_path / "scene", views=12)
    held_out = int(load(scene).eval_dataset.image_filenames[0].stem[-3:])
    for view in (1, held_out):
        copy = shutil.copytree(scene, tmp_path / f"view_{view}")
        (file,) = resave(copy, REFUSED[message], view)
        with pytest.raises(WysError, match=f'^"{file}" {message}'):
            load(copy)


def test_heic_images_are_read_by_a_plugin_in_every_command(tmp_path, monkeypatch):
    scene = write_ring_scene(tmp_path / "scene", views=4)
    resave(scene, lambda image, file: file.with_suffix(".heic").write_bytes(HEIC) and file.with_suffix(".heic"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(WysError, match="cannot identify image file '.*frame_000.heic'"):
        load(scene, test_mode="test")

    class Heif(ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (WIDTH, HEIGHT), "RGB"
            self.tile = [("raw", (0, 0, WIDTH, HEIGHT), 24, ("RGB", 0, 1))]

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Heif, lambda head: head[4:8] == b"ftyp"))
        monkeypatch.setattr(Image, "ID", ["HEIF", *Image.ID])

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert load(scene, test_mode="test").train_dataset.get_numpy_image(0).tobytes() == HEIC[24:]


@pytest.mark.parametrize("orientation", [3, 6])
def test_pixels_are_those_that_are_stored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene = write_ring_scene(tmp_path / "scene", views=4)
    resave(scene, in_mode("RGB", exif=exif))
    data = load(scene)
    assert data.train_dataset.get_numpy_image(0).tolist() == file_pixels(data, 0).tolist()


def test_each_image_is_decoded_once(tmp_path, monkeypatch):
    scene = write_ring_scene(tmp_path / "scene", views=12)
    decoded: Counter[str] = Counter()
    load_pixels = PngImageFile.load

    def count(image: PngImageFile) -> object:
        decoded[str(image.filename)] += bool(image.tile)
        return load_pixels(image)

    monkeypatch.setattr(PngImageFile, "load", count)
    data = load(scene)
    files = [*data.train_dataset.image_filenames, *data.eval_dataset.image_filenames]
    assert set(decoded) == set(map(str, files))
    assert sum(decoded.values()) <= len(files) + 2, "the first one of a split gives the size of its images"


def test_views_below_the_smallest_size_are_refused(tmp_path):
    scene = write_ring_scene(tmp_path / "scene", views=4)
    with pytest.raises(WysError, match="The views have 14x11 pixels and each side must have at least 16: use larger"):
        load(scene, camera_res_scale_factor=0.36)


# --------------------------------------------------------------------------------------------------------------- frame masks


def write_frame_masks(scene: Path, masks: Sequence[Image.Image]) -> Path:
    """Give each frame a mask; the pixels that are trained on are not 0."""
    (scene / "masks").mkdir()
    for i, mask in enumerate(masks):
        mask.save(scene / "masks" / f"{i}.png")
    return change_meta(
        scene, lambda meta: [frame.update(mask_path=f"masks/{i}.png") for i, frame in enumerate(meta["frames"])]
    )


BLACK, WHITE = Image.new("L", (WIDTH, HEIGHT)), Image.new("L", (WIDTH, HEIGHT), 255)


def with_square(side: int) -> Image.Image:
    mask = BLACK.copy()
    mask.paste(255, (4, 4, 4 + side, 4 + side))
    return mask


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([BLACK] * 4, r"The frame masks \(mask_path\) of the training views leave 0 pixels and a batch has 600"),
        ([with_square(7)] * 4, "leave 196 pixels and a batch has 600"),
        ([WHITE, WHITE, WHITE.convert("RGB"), WHITE], 'The frame mask ".*2.png" is not a grayscale image'),
        ([WHITE.convert("P")] * 4, 'The frame mask ".*0.png" is not a grayscale image'),
        ([WHITE, WHITE.resize((20, 16)), WHITE, WHITE], 'The frame mask ".*1.png" is 20x16 and its view 40x32'),
    ],
)
def test_unusable_frame_masks_are_refused(tmp_path, masks, message):
    with pytest.raises(WysError, match=message):
        load(write_frame_masks(write_ring_scene(tmp_path / "scene", views=4), masks))


def test_missing_frame_masks_are_refused(tmp_path):
    scene = write_frame_masks(write_ring_scene(tmp_path / "scene", views=4), [WHITE] * 4)
    (scene / "masks" / "2.png").unlink()
    with pytest.raises(WysError, match='There is no ".*masks/2.png", the frame mask of frame_002.png: all views have'):
        load(scene)


@pytest.mark.parametrize("views", [4, 12])
def test_damaged_frame_masks_are_refused(tmp_path, views):
    scene = write_frame_masks(write_ring_scene(tmp_path / "scene", views=views), [WHITE] * views)
    outputs = load(scene).eval_dataset._dataparser_outputs  # no view of four is held out
    mask = (outputs.mask_filenames or [scene / "masks" / "2.png"])[0]
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(WysError, match=f'The frame mask ".*masks/{mask.name}" cannot be read as an image: replace it'):
        load(scene)


def test_black_masks_of_the_held_out_views_are_refused(tmp_path):
    scene = write_ring_scene(tmp_path / "scene", views=12)
    held_out = {path.name for path in load(scene).eval_dataset.image_filenames}
    masks = [BLACK if f"frame_{i:03d}.png" in held_out else WHITE for i in range(12)]
    with pytest.raises(WysError, match=r"of the held-out views leave 0 pixels and a batch has 64"):
        load(write_frame_masks(scene, masks))


def test_pixels_are_drawn_inside_frame_masks(tmp_path):
    data = load(write_frame_masks(write_ring_scene(tmp_path / "scene", views=4), [BLACK, *[with_square(20)] * 3]))
    for patches in (False, True):
        data.use_edit_rays(in_patches=patches)
        view, row, column = data.next_train(0)[1]["indices"].unbind(-1)
        assert view.min() > 0 and min(row.min(), column.min()) >= 4 and max(row.max(), column.max()) < 24


def test_patches_that_do_not_fit_frame_masks_are_refused(tmp_path):
    data = load(write_frame_masks(write_ring_scene(tmp_path / "scene", views=4), [with_square(16)] * 4))
    with pytest.raises(WysError, match="leave 0 places for patches of 16 pixels and a batch has 2"):
        data.check_patches()


# --------------------------------------------------------------------------------------------------------------- ray batches


def assert_pixels_of_current_views(data: WysDataManager, batch: dict) -> None:
    for color, (view, y, x) in zip(batch["image"], batch["indices"].tolist()):
        assert torch.equal(color, data.current_views([view])[0, y, x])


def test_ray_batches_hold_the_pixels_of_their_views(data):
    rays, batch = data.next_train(0)
    assert len(rays) == len(batch["image"]) == 256
    assert torch.equal(rays.camera_indices[:, 0], batch["indices"][:, 0])
    assert_pixels_of_current_views(data, batch)


def test_an_edited_view_reaches_the_next_ray_batch(data):
    rng = torch.Generator().manual_seed(0)
    for view in range(0, data.num_views, 2):
        data.set_view(view, torch.rand(HEIGHT, WIDTH, 3, generator=rng))
    assert data.edited_views == set(range(0, data.num_views, 2))
    _, batch = data.next_train(0)
    assert_pixels_of_current_views(data, batch)
    changed = [
        not torch.equal(c, data.captured_views([v])[0, y, x])
        for c, (v, y, x) in zip(batch["image"], batch["indices"].tolist())
    ]
    assert [view % 2 == 0 for view in batch["indices"][:, 0].tolist()] == changed


def test_an_edit_does_not_change_the_captured_view(data):
    before = data.captured_views([4])
    data.set_view(4, torch.zeros(HEIGHT, WIDTH, 3))
    assert torch.equal(data.captured_views([4]), before)
    assert not data.current_views([4]).any()


def test_edited_views_are_stored_in_8_bits(data):
    image = torch.rand(HEIGHT, WIDTH, 3) * 1.4 - 0.2
    data.set_view(0, image)
    assert torch.equal(data.current_views([0])[0], torch.from_numpy(to_uint8(image)).float() / 255)


def test_ray_batches_hold_relevance(data):
    maps = torch.rand(data.num_views, HEIGHT, WIDTH)
    assert data.relevance_maps is None and data.unclamped_maps is None
    data.set_relevance(maps)
    assert torch.equal(data.relevance_maps[7], maps[7])
    assert torch.equal(data.relevance_maps, maps) and torch.equal(data.unclamped_maps, maps)
    _, batch = data.next_train(0)
    assert batch["relevance"].shape == (256, 1)
    for value, (view, y, x) in zip(batch["relevance"][:, 0], batch["indices"].tolist()):
        assert torch.equal(value, maps[view, y, x])


def test_ray_batches_hold_interpolated_relevance(data):
    maps = torch.rand(data.num_views, 4, 5)
    data.set_relevance(maps)
    _, batch = data.next_train(0)
    view, y, x = batch["indices"].unbind(-1)
    expected = relevance.resize(maps, HEIGHT, WIDTH)[view, y, x]
    torch.testing.assert_close(batch["relevance"][:, 0], expected, atol=1e-6, rtol=0)


def test_given_masks_are_no_targets_of_the_relevance_head(data):
    masks = torch.rand(data.num_views, HEIGHT, WIDTH) > 0.5
    data.set_relevance(masks)
    assert "relevance" not in data.next_train(0)[1]
    assert torch.equal(data.relevance_maps, masks)


def test_edit_rays_are_drawn_in_whole_patches(data):
    data.use_edit_rays(in_patches=True)
    _, batch = data.next_train(0)
    assert batch["patch_size"] == 16
    assert len(batch["image"]) == 2 * 16 * 16  # the whole patches that fit into 600 rays
    assert_pixels_of_current_views(data, batch)
    for patch in batch["indices"].view(2, 16, 16, 3):
        view, top, left = patch[0, 0].tolist()
        for y in range(16):
            for x in range(16):
                assert patch[y, x].tolist() == [view, top + y, left + x]
        assert 0 <= top <= HEIGHT - 16
        assert 0 <= left <= WIDTH - 16


def test_edit_rays_are_single_pixels_without_patches(data):
    data.use_edit_rays(in_patches=False)
    _, batch = data.next_train(0)
    assert len(batch["image"]) == 600
    assert (batch["indices"][1:] - batch["indices"][:-1])[:, 1:].abs().max() > 1
    assert_pixels_of_current_views(data, batch)


@pytest.mark.parametrize(("given", "rays"), [(None, 256), (48, 48)])
def test_localize_rays_are_those_of_reconstruction_unless_given(ring_scene, given, rays):
    data = load(ring_scene, localize_num_rays_per_batch=given)
    data.use_localize_rays()
    assert len(data.next_train(0)[1]["image"]) == rays == data.get_train_rays_per_batch()
    data.use_reconstruction_rays()
    assert len(data.next_train(0)[1]["image"]) == 256


@pytest.mark.parametrize(
    "options", [{"edit_patch_size": 33}, {"edit_patch_size": 25}, {"edit_num_rays_per_batch": 255}]
)
def test_patches_that_do_not_fit_are_refused(ring_scene, options):
    data = load(ring_scene, **options)
    sentence = (
        "Patches of .* pixels do not fit views of 40x32 and .* rays: lower --pipeline.datamanager.edit-patch-size or"
    )
    with pytest.raises(WysError, match=sentence):
        data.use_edit_rays(in_patches=True)


# ----------------------------------------------------------------------------------------------------------- relevance maps


def test_relevance_maps_that_are_not_finite_are_refused(data, editor_folder, tmp_path):
    editor = load_editor(str(editor_folder))
    forward = editor.unet.forward
    calls = []

    def fail_in_second_batch(*arguments, **named):
        output = forward(*arguments, **named)
        calls.append(len(arguments[0]))
        if len(calls) == 2:
            output.sample[1] = float("nan")
        return output

    editor.unet.forward = fail_in_second_batch
    sentence = (
        f"the relevance map of {data.view_names[3]} became NaN or Inf. Start with --pipeline.editor-dtype float32"
    )
    with pytest.raises(WysError, match=sentence):
        data.make_relevance_maps(editor, request(), "view", 1.5, tmp_path, 2)
    assert data.relevance_maps is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("normalization", ["view", "scene"])
def test_relevance_maps_are_those_of_the_captured_views(data, editor, tmp_path, normalization):
    data.set_view(3, torch.zeros(HEIGHT, WIDTH, 3))  # edits must not influence the maps
    data.make_relevance_maps(editor, request(num_samples=2), normalization, 4.0, tmp_path, batch_size=4)
    seeds = [edit_seed(3, -1 - view) for view in range(data.num_views)]
    raw = relevance_maps(
        editor, data.captured_views(range(data.num_views)), "make it red", num_samples=2, seeds=seeds, batch_size=4
    )
    expected = relevance.resize(relevance.normalize(torch.cat(list(raw)), normalization, 4.0), HEIGHT, WIDTH)
    for view, name in enumerate(data.view_names):
        view_map = relevance.resize(data.relevance_maps[view][None], HEIGHT, WIDTH)[0]
        torch.testing.assert_close(view_map, expected[view], atol=1e-5, rtol=0)
        written = read_png(tmp_path / f"{name}.png")
        assert torch.equal(written, torch.from_numpy(to_uint8(apply_colormap(view_map))) / 255)


def test_the_networks_are_cast_once_for_all_maps(data, editor_folder, tmp_path):
    editor, during = load_editor(str(editor_folder), dtype="bfloat16"), []
    data.make_relevance_maps(
        editor, request(), "view", 1.5, tmp_path, 4, lambda done, total: during.append(editor.unet.dtype)
    )
    assert during == [torch.float32] * -(-data.num_views // 4)
    assert editor.unet.dtype == editor.vae.dtype == torch.bfloat16


def test_saved_maps_are_used(data, editor, tmp_path):
    raw = torch.rand(data.num_views, 4, 5) ** 8  # with outliers, and unlike any that the editor computes
    save_maps(tmp_path, request(), data.view_names, raw)
    data.make_relevance_maps(editor, request(), "view", 1.5, tmp_path, batch_size=4)
    assert torch.equal(data.relevance_maps, relevance.normalize(raw))
    assert torch.equal(data.unclamped_maps, relevance.min_max(raw.flatten(1)).view_as(raw))  # not clamped
    assert not torch.allclose(data.unclamped_maps, relevance.normalize(raw))


# -------------------------------------------------------------------------------------------------------------------- edits


def test_views_are_edited_by_the_editor_inside_their_masks(data, editor):
    views, settings = [6, 1], EditSettings(diffusion_steps=3)
    renders = torch.rand(2, HEIGHT, WIDTH, 3)
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 4:20, 8:30] = True
    arguments = {"strength": 0.6, "seeds": [1, 2]}
    data.set_view(6, torch.zeros(HEIGHT, WIDTH, 3))  # an earlier edit must not influence the next
    everywhere = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    inputs = [EditInput(*parts) for parts in zip(views, renders, [everywhere] * 2, masks.float(), masks)]
    for view, image in zip(views, data.edit_views(editor, inputs, "make it red", settings, **arguments)):
        data.set_view(view, image)
    captured = data.captured_views(views)
    expected = edit_images(editor, renders, captured, masks, "make it red", settings, **arguments)
    current = data.current_views(views)
    assert torch.equal(current[~masks], captured[~masks])
    assert torch.equal(current, torch.from_numpy(to_uint8(expected)).float() / 255)
    assert not torch.isclose(current[masks], captured[masks], atol=1 / 255).all()
    assert data.edited_views == {1, 6}


def test_reference_views_are_encoded_once_and_again_when_they_change(data, editor, monkeypatch):
    settings, counts, encode = EditSettings(diffusion_steps=2), [], editor.encode
    monkeypatch.setattr(editor, "encode", lambda images: counts.append(len(images)) or encode(images))
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[4:20, 8:30] = True
    render, everywhere = torch.rand(HEIGHT, WIDTH, 3), torch.ones(HEIGHT, WIDTH, dtype=torch.bool)

    def edit(view: int) -> list[int]:
        """Edit a view, compare the edit with one that encodes its reference anew, and return the encoder's calls."""
        counts.clear()
        inputs, options = [EditInput(view, render, everywhere, mask.float(), mask)], {"strength": 0.6, "seeds": [1]}
        edited, calls = data.edit_views(editor, inputs, "make it red", settings, **options), list(counts)
        arguments = (editor, render[None], data.reference_views([view]), mask[None], "make it red", settings)
        assert torch.equal(edited, edit_images(*arguments, **options))
        return calls

    assert [edit(3), edit(3), edit(5), edit(3)] == [[1, 1], [1], [1, 1], [1]]
    captured = data.views_state()
    data.set_view(3, torch.rand(HEIGHT, WIDTH, 3))
    assert edit(3) == [1]  # an edited view is no reference
    data.start_from_current()
    assert [edit(3), edit(3)] == [[1, 1], [1]]
    on_top = data.views_state()
    data.load_views_state(captured)
    assert edit(3) == [1, 1]
    data.load_views_state(on_top)
    assert edit(3) == [1, 1]
    data.start_from_captured()
    assert edit(3) == [1, 1]


def write_views(data: WysDataManager, folder: Path) -> list[str]:
    """Write the edited views as they are now; return the names of the files that were written."""
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*.png")}
    data.write_edited_views(folder, data.views_state())
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*.png")}
    return sorted(f"{path.parent.name}/{path.stem}" for path in after if after[path] != before.get(path))


def test_files_of_the_edited_views_alone_are_written(data, tmp_path):
    for view in (2, 9):
        data.set_view(view, torch.rand(HEIGHT, WIDTH, 3))
    write_views(data, tmp_path / "edits")
    names = [data.view_names[view] for view in (2, 9)]
    assert sorted(path.stem for path in (tmp_path / "edits").iterdir()) == sorted(names)
    for name, view in zip(names, data.current_views([2, 9])):
        assert torch.equal(read_png(tmp_path / "edits" / f"{name}.png"), view)
    data.start_from_current()
    write_views(data, tmp_path / "edits")
    assert len(list((tmp_path / "reference").iterdir())) == data.num_views
    (tmp_path / "edits" / "notes.png").write_bytes(b"of the user")
    data.start_from_captured()
    write_views(data, tmp_path / "edits")
    assert [path.name for path in (tmp_path / "edits").iterdir()] == ["notes.png"]
    assert not (tmp_path / "reference").exists()


def test_only_views_that_have_changed_are_written_again(data, tmp_path):
    names = data.view_names
    for view in (2, 9):
        data.set_view(view, torch.rand(HEIGHT, WIDTH, 3))
    assert write_views(data, tmp_path / "edits") == [f"edits/{names[view]}" for view in (2, 9)]
    assert write_views(data, tmp_path / "edits") == []
    data.set_view(9, torch.rand(HEIGHT, WIDTH, 3))
    data.set_view(4, torch.rand(HEIGHT, WIDTH, 3))
    assert write_views(data, tmp_path / "edits") == [f"edits/{names[view]}" for view in (4, 9)]
    data.start_from_current()
    assert len(write_views(data, tmp_path / "edits")) == data.num_views  # the reference
    assert write_views(data, tmp_path / "edits") == []
    data.start_from_captured()
    write_views(data, tmp_path / "edits")
    data.set_view(9, torch.zeros(HEIGHT, WIDTH, 3))
    assert write_views(data, tmp_path / "edits") == [f"edits/{names[9]}"]


def test_a_saved_state_does_not_follow_later_edits(data):
    data.set_view(2, torch.rand(HEIGHT, WIDTH, 3))
    data.start_from_current()
    state = data.views_state()
    copies = {name: state[name].clone() for name in ("current", "reference")}
    data.set_view(2, torch.zeros(HEIGHT, WIDTH, 3))
    data.start_from_current()
    assert all(torch.equal(state[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("on_top", [False, True])
def test_views_are_restored_bit_for_bit(data, ring_scene, tmp_path, on_top):
    data.set_view(2, torch.rand(HEIGHT, WIDTH, 3))
    if on_top:
        data.start_from_current()
    data.set_view(9, torch.rand(HEIGHT, WIDTH, 3))
    torch.save(data.views_state(), tmp_path / "state.pt")
    resumed = load(ring_scene)
    resumed.set_view(5, torch.zeros(HEIGHT, WIDTH, 3))
    resumed.load_views_state(torch.load(tmp_path / "state.pt", weights_only=True))
    views = range(data.num_views)
    assert resumed.edited_views == {2, 9}
    assert torch.equal(resumed.current_views(views), data.current_views(views))
    assert torch.equal(resumed.reference_views(views), data.reference_views(views))
    assert resumed.reference_hash() == data.reference_hash() and bool(data.reference_hash()) == on_top


@pytest.mark.parametrize("change", [{"size": [16, 20]}, {"names": ["a", "b"]}])
def test_edited_views_of_other_data_are_refused(data, change):
    with pytest.raises(WysError, match="views of that run are of other data .*use the same --data"):
        data.load_views_state({**data.views_state(), **change})


def test_changed_pictures_and_cameras_are_refused_by_name(data):
    state = data.views_state()
    for column in (0, 11, 12, 14, 19):  # pose, focal length, center, distortion
        moved = state["cameras"].clone()
        moved[3, column] += 0.01
        with pytest.raises(
            WysError,
            match=f"The camera of the view {data.view_names[3]} is not what that run was trained on: .*same --data",
        ):
            data.load_views_state({**state, "cameras": moved})
    pictures = [*state["pictures"][:5], "0123", *state["pictures"][6:]]
    with pytest.raises(
        WysError,
        match=f"The picture of the view {data.view_names[5]} is not what that run was trained on: .*same --data",
    ):
        data.load_views_state({**state, "pictures": pictures})
    with pytest.raises(
        WysError, match=f"The cameras of {data.num_views} views, the first of them {data.view_names[0]}, are"
    ):
        data.load_views_state({**state, "cameras": state["cameras"] + 0.01})
    data.load_views_state({**state, "cameras": state["cameras"] + 1e-6})


# ------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("on_gpu", [True, False])
def test_views_take_one_8_bit_stack_on_the_gpu(tmp_path, editor_folder, on_gpu):
    scene, peaks = write_ring_scene(tmp_path / "scene", width=160, height=128, views=100), {}
    with emulated_gpu():
        editor = load_editor(str(editor_folder), "cuda", "float32")
        gc.collect()  # networks of earlier tests may be in reference cycles
        before = memory.allocated

        def measured(name: str, action):
            memory.reset_peak()
            result = action()
            peaks[name] = (memory.peak - before) / (3 * 160 * 128 * 90)
            return result

        def make_maps(reference: str) -> None:
            data.make_relevance_maps(
                editor, request(reference=reference, resolution=40), "view", 1.5, tmp_path / "maps", 1
            )

        data = measured("load", lambda: load(scene, device="cuda", images_on_gpu=on_gpu).to("cuda"))
        assert data.num_views == 90
        measured("maps", lambda: make_maps(""))
        for view in range(data.num_views):
            measured("edit", lambda view=view: data.set_view(view, torch.rand(128, 160, 3)))
        measured("rays", lambda: data.next_train(0))
        measured("evaluation rays", lambda: data.next_eval(0))
        measured("save", lambda: data.write_edited_views(tmp_path / "edits", data.views_state()))
        measured("resume", lambda: data.load_views_state(data.views_state()))
        measured("apply on top", data.start_from_current)
        measured("maps on top", lambda: make_maps(data.reference_hash()))
        measured("reset", data.start_from_captured)
    assert max(peaks.values()) < (1.2 if on_gpu else 0.2), peaks
    assert min(peaks.values()) > (1.0 if on_gpu else 0.0), peaks
