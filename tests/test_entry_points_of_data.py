"""Whole runs through `ns-train`: on nerfacto's scenes, on captures of all kinds, with every localization, without a network."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_blender_scene, as_colmap_scene, run_wys, write_ring_scene
from page_tables import CONFIGS
from pages import PAGES, commands
from PIL import Image
from test_entry_points import QUIET, SHORT, SMALL_MODEL, command, newest_run, records, tensors, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_home")]


@pytest.fixture(scope="module")
def nerfacto_run(ring_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps of nerfacto in its default size."""
    output = tmp_path_factory.mktemp("nerfacto")
    train("nerfacto", ring_scene, output, "--max-num-iterations=3", "--pipeline.model.implementation=torch",
          "--pipeline.datamanager.train-num-rays-per-batch=64", "--pipeline.model.num-proposal-samples-per-ray", "8", "8",
          "--pipeline.model.num-nerf-samples-per-ray=8", TORCH_HOME=os.environ["TORCH_HOME"])  # fmt: skip
    return newest_run(output)


FULL_SIZE = [
    "--pipeline.localize-steps=2",
    "--pipeline.edit-steps=3",
    "--pipeline.model.num-proposal-samples-per-ray", "8", "8",
    "--pipeline.model.eval-num-rays-per-chunk=4096",
    "--pipeline.datamanager.edit-num-rays-per-batch=1024",
    "--pipeline.datamanager.edit-patch-size=32",
]  # fmt: skip


@pytest.mark.parametrize(("method", "option"), [("wys", "--base-run"), ("wys-small", "--load-dir")])
def test_a_nerfacto_run_is_a_base(
    nerfacto_run: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path, method: str, option: str
) -> None:
    base_path = nerfacto_run if option == "--base-run" else nerfacto_run / "nerfstudio_models"
    done = train(method, ring_scene, tmp_path, *SMALL_MODEL, *FULL_SIZE, "--editor", editor_folder, "--instruction",
                 "make the ball blue", "--mask-threshold=0", option, base_path)  # fmt: skip
    run = newest_run(tmp_path)
    assert "Phase: localize." in done.stdout and "Phase: reconstruct." not in done.stdout
    assert (run / "nerfstudio_models" / "step-000000004.ckpt").is_file()
    base, start = weights(nerfacto_run), tensors(run / "wys" / "captured.ckpt")
    shared = [key for key in base if "lpips" not in key and base[key].is_floating_point()]
    assert shared and all(torch.equal(base[key], start[key]) for key in shared)
    assert not any("lpips" in key for key in start)


def test_a_base_of_another_shape_is_refused_with_its_options(
    nerfacto_run: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    done = train("wys-tiny", ring_scene, tmp_path, *SMALL_MODEL, "--editor", editor_folder, "--instruction",
                 "make the ball blue", "--base-run", nerfacto_run, check=False)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not a scene of this shape" in done.stderr and "--pipeline.model.num-levels 16" in done.stderr


@pytest.mark.parametrize(
    ("size", "extra"),
    [((34, 50), {}), ((40, 32), {"alpha": True}), ((48, 32), {"distorted": True})],
    ids=["portrait", "transparent", "distorted"],
)
def test_other_captures_run_to_the_end(size, extra, editor_folder: Path, tmp_path: Path) -> None:
    scene = write_ring_scene(tmp_path / "scene", width=size[0], height=size[1], **extra)
    train("wys-tiny", scene, tmp_path / "out", *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
          "make the ball blue", "--mask-threshold=0.3")  # fmt: skip
    run = newest_run(tmp_path / "out")
    sizes = {Image.open(path).size for path in (run / "wys" / "edits").glob("*.png")}
    assert sizes == {size}


def test_downscaled_views_run_to_the_end(editor_folder: Path, tmp_path: Path) -> None:
    scene = write_ring_scene(tmp_path / "scene", width=64, height=48)
    (scene / "images_2").mkdir()
    for path in (scene / "images").glob("*.png"):
        Image.open(path).resize((32, 24)).save(scene / "images_2" / path.name)
    train("wys-tiny", scene, tmp_path / "out", *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
          "make the ball blue", "--mask-threshold=0.3", "nerfstudio-data", "--downscale-factor", "2")  # fmt: skip
    run = newest_run(tmp_path / "out")
    assert {Image.open(path).size for path in (run / "wys" / "edits").glob("*.png")} == {(32, 24)}


def test_shrunk_images_are_edited_and_evaluated_with_rescaled_cameras(editor_folder: Path, tmp_path: Path) -> None:
    scene = write_ring_scene(tmp_path / "scene", width=80, height=64)
    for path in (scene / "images").iterdir():
        Image.open(path).resize((40, 32)).save(path)
    meta = json.loads((scene / "transforms.json").read_text())
    shared = {key: meta.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    for frame in meta["frames"]:
        frame.update(shared)
    (scene / "transforms.json").write_text(json.dumps(meta))
    done = train("wys-tiny", scene, tmp_path / "out", *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
                 "make the ball blue", "--mask-threshold=0.3")  # fmt: skip
    sentence = "The images are 40x32 and their cameras 80x64: the cameras are rescaled."
    assert " ".join(done.stdout.split()).count(sentence) == 1
    run = newest_run(tmp_path / "out")
    assert {Image.open(path).size for path in (run / "wys" / "edits").glob("*.png")} == {(40, 32)}
    command("eval", "--load-config", run / "config.yml", "--output-path", tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["results"]["psnr"] > 0
    command("render", "dataset", "--load-config", run / "config.yml", "--output-path", tmp_path / "renders", "--split",
            "train+test", "--rendered-output-names", "rgb", "gt-rgb")  # fmt: skip
    sizes = [Image.open(path).size for path in (tmp_path / "renders").rglob("*.jpg")]
    assert sizes == [(40, 32)] * 28, "14 renders and their images"


@pytest.mark.parametrize("localization", ["relevance-map", "masks", "none"])
def test_other_localizations_run_to_the_end(
    localization: str, ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    extra: list[object] = []
    if localization == "masks":
        (tmp_path / "masks").mkdir()
        for path in (ring_scene / "images").glob("*.png"):
            mask = Image.new("L", (40, 32))
            mask.paste(255, (10, 8, 20, 16))
            mask.save(tmp_path / "masks" / path.name)
        extra = ["--pipeline.masks-dir", tmp_path / "masks"]
    train("wys-tiny", ring_scene, tmp_path / "out", *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
          "make the ball blue", "--localization", localization, *extra)  # fmt: skip
    run = newest_run(tmp_path / "out")
    fractions = {edit["mask_fraction"] for edit in records(run)}
    if localization == "masks":
        assert fractions == {80 / (40 * 32)}
    if localization == "none":
        assert fractions == {1.0}
    if localization in ("masks", "none"):
        assert (run / "nerfstudio_models" / "step-000000028.ckpt").is_file(), "there is no localize phase"


def test_masks_of_make_masks_confine_the_edits(
    ring_scene: Path, editor_folder: Path, detector_folder: Path, segmenter_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    scene, masks = shutil.copytree(ring_scene, tmp_path / "scene"), tmp_path / "masks"
    models = ["--detector", detector_folder, "--segmenter", segmenter_folder, "--device", "cpu"]
    run_wys(monkeypatch, "make-masks", scene, "the red ball", "-o", masks, *models, "--box-threshold", "0")
    Image.new("L", (40, 32)).save(masks / "frame_007.png")  # as of a view in which nothing was found
    inside = {path.stem: np.array(Image.open(path)) > 0 for path in masks.glob("frame_*.png")}
    assert len(inside) == 13 and 0 < sum(mask.any() for mask in inside.values()) < 13
    train("wys-tiny", scene, tmp_path / "out", *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
          "make the ball blue", "--recipe", CONFIGS / "masks.yaml", "--pipeline.masks-dir", masks, "--pipeline.edit-every=1")  # fmt: skip
    run = newest_run(tmp_path / "out")
    edits = records(run)
    assert {edit["view"] for edit in edits} == set(inside)
    shares = [inside[edit["view"]].mean() for edit in edits]
    assert [edit["mask_fraction"] for edit in edits] == pytest.approx(shares, abs=2e-5)
    for edit in edits:
        view = np.array(Image.open(scene / "images" / f"{edit['view']}.png"))
        edited = run / "wys" / "edits" / f"{edit['view']}.png"
        assert edited.is_file() == bool(inside[edit["view"]].any())
        if edited.is_file():
            assert np.array_equal(np.array(Image.open(edited))[~inside[edit["view"]]], view[~inside[edit["view"]]])


NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def test_an_unavailable_editor_is_refused_before_the_first_step(ring_scene: Path, tmp_path: Path) -> None:
    done = train("wys", ring_scene, tmp_path, "--instruction", "make the ball blue", "--pipeline.model.lpips-loss-mult=0",
                 "--editor", "nobody/no-such-editor", check=False, HF_HOME=str(tmp_path), **NO_NETWORK)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Phase:" not in done.stdout
    sentence = done.stderr.strip().splitlines()[-1]
    assert (
        sentence.startswith('wys: The editor "nobody/no-such-editor"')
        and 'or give a local folder or "embedded"' in sentence
    )


def test_unavailable_lpips_weights_are_refused_at_the_start(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    done = train("wys", ring_scene, tmp_path, "--instruction", "make the ball blue", "--editor", editor_folder,
                 "--pipeline.datamanager.edit-num-rays-per-batch=1024", check=False, TORCH_HOME=str(tmp_path / "empty"),
                 **NO_NETWORK)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Phase:" not in done.stdout
    assert "--pipeline.model.lpips-weights" in done.stderr and "--pipeline.model.lpips-loss-mult 0" in done.stderr


@pytest.mark.parametrize(("parser", "convert"), [("blender-data", as_blender_scene), ("colmap", as_colmap_scene)])
def test_other_formats_run_to_the_end(parser, convert, ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    scene = convert(ring_scene, tmp_path / "scene")
    command("train", "wys-tiny", "--output-dir", tmp_path / "out", *QUIET, *SMALL_MODEL, *SHORT, "--editor",
            editor_folder, "--instruction", "make the ball blue", "--mask-threshold=0.3", parser, "--data",
            scene)  # fmt: skip
    run = newest_run(tmp_path / "out")
    assert list((run / "wys" / "edits").glob("*.png")) and (run / "wys" / "contact_sheet.png").is_file()


FOCAL_LENGTH = 288.0


def write_photographs(folder: Path, count: int, width: int, height: int) -> None:
    """Write views from an arc around the corner of a room, whose speckled walls COLMAP can match."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    walls = [sum(np.kron(draw.random((n, n)), np.ones((512 // n,) * 2)) for n in (8, 32, 128)) / 3 for _ in range(3)]
    u, v = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    for number in range(count):
        angle = np.radians(25 + 40 * number / count)
        eye = 3.5 * np.array([np.cos(angle), np.sin(angle), 0.6 + 0.2 * np.sin(number)])
        forward = (0.7 - eye) / np.linalg.norm(0.7 - eye)
        right = np.cross(forward, (0, 0, 1))
        right /= np.linalg.norm(right)
        rays = u[..., None] * right + v[..., None] * np.cross(forward, right) + FOCAL_LENGTH * forward
        distance = np.where(rays < 0, -eye / np.minimum(rays, -1e-9), np.inf)
        hit = eye + distance.min(-1)[..., None] * rays
        image = np.zeros((height, width, 3))
        for axis, wall in enumerate(walls):
            on_wall = distance.argmin(-1) == axis
            a, b = np.clip(128 * np.delete(hit[on_wall], axis, 1), 0, 511).astype(int).T
            image[on_wall] = wall[a, b, None] * (0.6, 0.8, 1.0)[axis]
        Image.fromarray((255 * image).astype(np.uint8)).save(folder / f"photograph_{number}.png")


@pytest.mark.skipif(shutil.which("colmap") is None, reason="ns-process-data needs the colmap program for photographs")
def test_photographs_are_processed_and_edited(editor_folder: Path, tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 8, 320, 240)
    (readme,) = {line for line in commands(PAGES["README.md"]) if line.startswith("ns-process-data images")}
    # Debian's COLMAP has no CUDA, and nerfstudio's default matching downloads a vocabulary tree.
    command("process_data", *shlex.split(readme)[1:], "--no-gpu", "--matching-method", "exhaustive", folder=tmp_path)
    transforms = json.loads((tmp_path / "scene" / "transforms.json").read_text())
    assert len(transforms["frames"]) == 8 and transforms["fl_x"] == pytest.approx(FOCAL_LENGTH, rel=0.05)
    train("wys-tiny", tmp_path / "scene", tmp_path / "out", *SMALL_MODEL, *SHORT, "--editor", editor_folder, "--instruction",
          "make the ball blue", "--mask-threshold=0.3", "nerfstudio-data", "--downscale-factor", "4")  # fmt: skip
    edited = (newest_run(tmp_path / "out") / "wys" / "edits").glob("*.png")
    assert {Image.open(path).size for path in edited} == {(80, 60)}
