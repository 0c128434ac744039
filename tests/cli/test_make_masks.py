"""`wys make-masks` from the command line: masks that training accepts, resuming, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_blender_scene, as_colmap_scene, run_wys, sentence_of, write_ring_scene
from emulated_gpu import emulated_gpu
from filelock import FileLock
from PIL import ExifTags, Image

from wys_nerfstudio.cli import make_masks as command
from wys_nerfstudio.datamanager import WysDataManager, WysDataManagerConfig
from wys_nerfstudio.relevance.text_segmenter import TextSegmenter, load_text_segmenter
from wys_nerfstudio.utils.folder_lock import LOCK_FILE
from wys_nerfstudio.utils.view_masks import read_masks

TEXT = "the red bear"


@pytest.fixture
def models(detector_folder: Path, segmenter_folder: Path) -> list[str]:
    return ["--detector", str(detector_folder), "--segmenter", str(segmenter_folder), "--device", "cpu"]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A scene of five views, all of which are trained on: held-out views are named in transforms.json."""
    folder = write_ring_scene(tmp_path / "scene", views=5)
    file = folder / "transforms.json"
    meta = json.loads(file.read_text())
    names = [frame["file_path"] for frame in meta["frames"]]
    file.write_text(
        json.dumps({**meta, "train_filenames": names[:4], "val_filenames": names[4:], "test_filenames": names[4:]})
    )
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    run_wys(monkeypatch, "make-masks", *arguments)


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    return sentence_of(lambda: run(monkeypatch, *arguments))


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "L"
        return np.array(image)


def find_in(monkeypatch: pytest.MonkeyPatch, *found: int) -> list[int]:
    """Replace the segmenter by one that finds an object, 3 rows high, in some views of `scene`, which differ in their color.

    Returns:
        Numbers of the views that it has received.
    """
    colors = {}
    for number in range(5):
        colors[number] = np.array(
            [0.5 + 0.5 * np.cos(2 * np.pi * number / 5), 0.5 + 0.5 * np.sin(2 * np.pi * number / 5)]
        )
    seen: list[int] = []

    def segment(_: TextSegmenter, image: torch.Tensor, *__: object) -> torch.Tensor:
        center = image[16, 20, :2].numpy() / 255
        seen.append(min(colors, key=lambda number: np.abs(colors[number] - center).sum()))
        mask = torch.zeros(image.shape[:2], dtype=torch.bool)
        mask[:3] = seen[-1] in found
        return mask

    monkeypatch.setattr(TextSegmenter, "segment", segment)
    return seen


def test_masks_are_those_of_the_models_in_the_format_of_training(tmp_path, monkeypatch, capsys, scene, models):
    run(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", "--box-threshold", "0.99", *models)
    names = [f"frame_{number:03d}" for number in range(4)]
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == sorted(
        [*(f"{name}.png" for name in names), "contact_sheet.png", "masks.json"]
    )
    segmenter = load_text_segmenter(models[1], models[3])
    for name in names:
        with Image.open(scene / "images" / f"{name}.png") as image:
            expected = segmenter.segment(torch.from_numpy(np.array(image)), TEXT, 0.99, 0.5)
        assert expected.any()
        assert np.array_equal(read_pixels(tmp_path / "masks" / f"{name}.png"), 255 * expected.numpy())
    printed = capsys.readouterr().out
    assert "4/4" in printed and f"4 masks in {tmp_path}/masks; see {tmp_path}/masks/contact_sheet.png." in printed
    assert "Nothing was found" not in printed


def test_the_sheet_shows_all_views_tinted_inside_their_masks(tmp_path, monkeypatch, scene, models):
    find_in(monkeypatch, 0, 2)
    run(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models)
    with Image.open(tmp_path / "masks" / "contact_sheet.png") as image:
        sheet = np.array(image).astype(float)
    for number in range(4):
        with Image.open(scene / "images" / f"frame_{number:03d}.png") as image:
            view = np.array(image).astype(float)
        left = 4 + number * (40 * 5 + 4)  # views of 40x32 pixels are enlarged five times
        cell = sheet[18 : 18 + 160, left : left + 200][2::5, 2::5]
        inside = 3 if number in (0, 2) else 0
        assert np.abs(cell[inside:] - 0.4 * view[inside:]).max() < 1
        tint = 2 * cell[:inside] - view[:inside]
        assert not inside or (tint.std(axis=(0, 1)).max() < 1 and tint.mean(axis=(0, 1)).min() > 150)


def test_views_are_read_as_training_reads_them(tmp_path, monkeypatch, models):
    scene = write_ring_scene(tmp_path / "scene", views=12, alpha=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(scene / "images" / "frame_001.png") as image:
        image.save(scene / "images" / "frame_001.png", exif=exif)
    received = {}

    def segment(_: TextSegmenter, image: torch.Tensor, text: str, *thresholds: float) -> torch.Tensor:
        received[len(received)] = image, text, thresholds
        return image[..., 2] > 0  # the opaque pixels

    monkeypatch.setattr(TextSegmenter, "segment", segment)
    run(
        monkeypatch,
        scene,
        TEXT,
        "-o",
        tmp_path / "masks",
        "--box-threshold",
        "0.2",
        "--pixel-threshold",
        "0.4",
        *models,
    )
    config = WysDataManagerConfig(data=scene)
    views: WysDataManager = config.setup(device="cpu")
    assert len(received) == views.num_views == 11
    for number, (image, text, thresholds) in received.items():
        assert (text, thresholds) == (TEXT, (0.2, 0.4))
        assert torch.equal(image.float() / 255, views.captured_views([number])[0])
    masks = read_masks(tmp_path / "masks", views.train_dataset.image_filenames, views.view_names, *views.view_size)
    assert torch.equal(masks, views.captured_views(range(11))[..., 2] > 0)


@pytest.mark.parametrize(("name", "write"), [("blender-data", as_blender_scene), ("colmap", as_colmap_scene)])
def test_other_formats_are_read_by_their_dataparser(tmp_path, monkeypatch, ring_scene, models, name, write):
    scene = write(ring_scene, tmp_path / "scene")
    run(
        monkeypatch,
        scene,
        TEXT,
        "-o",
        tmp_path / "masks",
        *models,
        name,
        *(["--downscale-factor", "1"] if name == "colmap" else []),
    )
    assert len(list((tmp_path / "masks").glob("frame_*.png"))) == 12


def test_views_with_equal_names_have_masks_in_sub_folders(tmp_path, monkeypatch, scene, models):
    file = scene / "transforms.json"
    text = file.read_text()
    for number in range(4):
        name = f"{'ab'[number // 2]}/{number % 2}.png"
        (scene / "images" / name).parent.mkdir(exist_ok=True)
        (scene / "images" / f"frame_{number:03d}.png").rename(scene / "images" / name)
        text = text.replace(f"frame_{number:03d}.png", name)
    file.write_text(text)
    find_in(monkeypatch, 0, 3)
    run(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models)
    assert {path.relative_to(tmp_path / "masks").as_posix() for path in (tmp_path / "masks").rglob("?.png")} == {
        "a/0.png", "a/1.png", "b/0.png", "b/1.png",
    }  # fmt: skip
    views: WysDataManager = WysDataManagerConfig(data=scene).setup(device="cpu")
    masks = read_masks(tmp_path / "masks", views.train_dataset.image_filenames, views.view_names, 32, 40)
    assert masks.flatten(1).any(dim=1).tolist() == [True, False, False, True]


def test_views_without_the_object_have_black_masks_and_are_named(tmp_path, monkeypatch, capsys, scene, models):
    find_in(monkeypatch, 1, 2)
    run(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models)
    inside = [read_pixels(tmp_path / "masks" / f"frame_{number:03d}.png").any() for number in range(4)]
    assert inside == [False, True, True, False]
    assert " ".join(capsys.readouterr().out.split()).endswith(
        "Nothing was found in 2 views, whose masks are black: frame_000, frame_003. Training keeps these views as captured. If "
        "they show the object, give a lower --box-threshold and another folder."
    )


def test_an_object_in_no_view_is_refused_and_leaves_no_masks(tmp_path, monkeypatch, scene, models):
    find_in(monkeypatch)
    arguments = (scene, TEXT, "-o", tmp_path / "masks", *models)
    assert refusal(monkeypatch, *arguments) == (
        'wys: "the red bear" was found in none of the 4 views: lower --box-threshold (now 0.35), or use other words.'
    )
    assert not (tmp_path / "masks").exists()


def test_an_interrupted_command_is_resumed(tmp_path, monkeypatch, scene, models):
    seen = find_in(monkeypatch, 0, 1, 3)
    arguments = (scene, TEXT, "-o", tmp_path / "masks", *models)
    finds = TextSegmenter.segment

    def interrupt(segmenter: TextSegmenter, *values: object) -> torch.Tensor:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return finds(segmenter, *values)  # type: ignore

    monkeypatch.setattr(TextSegmenter, "segment", interrupt)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 130
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        "frame_000.png",
        "frame_001.png",
        "masks.json",
    ]
    corrected = np.zeros((32, 40), np.uint8)
    corrected[5:9] = 255
    Image.fromarray(corrected).save(tmp_path / "masks" / "frame_001.png")
    monkeypatch.setattr(TextSegmenter, "segment", finds)
    run(monkeypatch, *arguments)
    assert seen == [0, 1, 2, 2, 3]
    assert np.array_equal(read_pixels(tmp_path / "masks" / "frame_001.png"), corrected)
    inside = [read_pixels(tmp_path / "masks" / f"frame_{number:03d}.png").any() for number in range(4)]
    assert inside == [True, True, False, True]


def test_a_finished_command_loads_no_model(tmp_path, monkeypatch, scene, models):
    find_in(monkeypatch, 0)
    arguments = (scene, TEXT, "-o", tmp_path / "masks", *models)
    run(monkeypatch, *arguments)
    monkeypatch.delattr(command, "load_text_segmenter")
    run(monkeypatch, *arguments)


def test_folders_with_other_files_or_other_masks_are_refused(tmp_path, monkeypatch, scene, models):
    find_in(monkeypatch, 0)
    assert refusal(monkeypatch, scene, TEXT, "-o", scene, *models) == (
        f'wys: "{scene}" contains files that are not of this command (masks.json is missing or damaged): give -o another folder.'
    )
    assert "would overwrite" in refusal(monkeypatch, scene, TEXT, "-o", scene / "images", *models)
    run(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models)
    for other in (["the ball"], [TEXT, "--box-threshold", "0.1"]):
        assert refusal(monkeypatch, scene, *other, "-o", tmp_path / "masks", *models) == (
            f'wys: "{tmp_path}/masks" contains masks of another text or with other settings: give -o another folder, or delete it.'
        )
    for mask in (tmp_path / "masks").glob("*.png"):
        mask.unlink()
    run(monkeypatch, scene, "the ball", "-o", tmp_path / "masks", *models)  # without masks, the settings may change
    with FileLock(tmp_path / "masks" / LOCK_FILE):
        sentence = refusal(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models)
    assert sentence.startswith(f'wys: Another process is writing the masks in "{tmp_path}/masks"')
    (tmp_path / "file").touch()
    sentence = refusal(monkeypatch, scene, TEXT, "-o", tmp_path / "file", *models)
    assert "give -o another" in sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([" . "], 'There is no text: name the object to segment, for example "the bear".'),
        ([TEXT, "--box-threshold", "1"], "--box-threshold must be at least 0 and below 1, not 1.0."),
        ([TEXT, "--box-threshold", "-0.1"], "--box-threshold must be at least 0 and below 1, not -0.1."),
        ([TEXT, "--pixel-threshold", "0"], "--pixel-threshold must be between 0 and 1, not 0.0."),
        ([TEXT, "--pixel-threshold", "nan"], "--pixel-threshold must be between 0 and 1, not nan."),
        ([TEXT, "--device", "mps"], 'The device "mps" is not supported: --device takes cpu or cuda.'),
        (["bear " * 20], "has 23 tokens, but the detector takes at most 16: shorten it."),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, monkeypatch, scene, models, arguments, sentence):
    assert refusal(monkeypatch, scene, *models, "-o", tmp_path / "masks", *arguments).endswith(sentence)
    assert not (tmp_path / "masks").exists()


def test_scenes_that_training_refuses_are_refused(tmp_path, monkeypatch, scene, models):
    def refused(data: Path) -> str:
        sentence = refusal(monkeypatch, data, TEXT, "-o", tmp_path / "masks", *models)
        assert not (tmp_path / "masks").exists()
        return sentence

    assert refused(tmp_path / "none") == f'wys: There is no data at "{tmp_path}/none": give a folder of captured views.'
    assert "append its name to the command, for example colmap" in refused(tmp_path)
    meta = json.loads((scene / "transforms.json").read_text())
    (scene / "transforms.json").write_text(json.dumps({**meta, "train_filenames": []}))
    assert refused(scene).startswith(f'wys: No view of "{scene}" is left for training: change its train_filenames')
    (scene / "transforms.json").write_text(json.dumps(meta))
    first = scene / "images" / "frame_000.png"
    Image.fromarray(np.zeros((32, 40), np.uint16)).save(first)
    assert "has 16 bits per channel, but edits have 8" in refused(scene)
    Image.new("CMYK", (40, 32)).save(first.with_suffix(".jpg"))
    first.with_suffix(".jpg").rename(first)
    assert "is a CMYK image: convert it to RGB first" in refused(scene)
    Image.new("RGB", (32, 40)).save(first)
    assert "All views must have one size" in refused(scene)
    Image.new("RGB", (40, 32)).save(first)
    (scene / "images" / "a").mkdir()
    first.rename(scene / "images" / "a" / "frame_001.png")
    text = (scene / "transforms.json").read_text().replace("frame_000.png", "a/frame_001.png")
    (scene / "transforms.json").write_text(text)
    assert refused(scene) == (
        f'wys: "frame_001" would name the mask of both "{scene}/images/a/frame_001.png" and '
        f'"{scene}/images/frame_001.png": rename one of these views.'
    )


@pytest.mark.parametrize(
    ("device", "remedy"),
    [("cpu", "facebook/sam2.1-hiera-tiny."), ("cuda", "facebook/sam2.1-hiera-tiny, or --device cpu.")],
)
def test_memory_that_runs_out_ends_with_a_sentence(tmp_path, monkeypatch, scene, models, device, remedy):
    def run_out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(command, "load_text_segmenter", run_out_of_memory)
    with emulated_gpu():
        sentence = refusal(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models, "--device", device)
    assert sentence == (
        "wys: The GPU ran out of memory while views were segmented: try --detector IDEA-Research/grounding-dino-tiny --segmenter "
        f"{remedy}"
    )


def test_a_full_disk_ends_with_a_sentence(tmp_path, monkeypatch, scene, models):
    def fill(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    find_in(monkeypatch, 0)
    monkeypatch.setattr(command, "write_png", fill)
    sentence = refusal(monkeypatch, scene, TEXT, "-o", tmp_path / "masks", *models)
    assert sentence == f'wys: "{tmp_path}/masks/frame_000.png" could not be written: No space left on device.'


def test_half_precision_is_the_default_of_gpus(tmp_path):
    auto = command.MaskOptions()
    assert (auto.dtype_on("cpu"), auto.dtype_on("cuda:1")) == (torch.float32, torch.bfloat16)
    assert command.MaskOptions(segmenter_dtype="float16").dtype_on("cpu") == torch.float16
