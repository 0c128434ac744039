"""`wys compare`: refusals, the table of metrics, and pictures of other methods."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_wys, sentence_of
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from wys_nerfstudio.cli import main
from wys_nerfstudio.cli.compare import metric_names, metrics_table
from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.training.output_folder import CONFIG_TAG
from wys_nerfstudio.utils.visualization import write_png


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "takes one or more runs"),
        (["a"], 'There is no config.yml in "a"'),
        (["a", "b"], 'There is no config.yml in "a"'),
    ],
)
def test_invalid_runs_are_refused(runs: list[str], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wys", "compare", *runs])
    with pytest.raises(SystemExit, match=message):
        main.entrypoint()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["run", "run/wys", "run/new", "other/../run/wys"])
def test_an_output_inside_a_run_is_refused(output: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/wys", "other"):
        Path(folder).mkdir(parents=True)
    Path("run/config.yml").write_text(f"{CONFIG_TAG}\nmethod_name: wys")
    Path("run/wys/contact_sheet.png").write_text("as it was")
    monkeypatch.setattr(sys, "argv", ["wys", "compare", "run", "-o", output])
    with pytest.raises(SystemExit, match='is inside the run "run": give -o another folder.'):
        main.entrypoint()
    assert Path("run/wys/contact_sheet.png").read_text() == "as it was" and not Path("run/new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", '"run" is not a wys run: wys compare takes runs of'),
        ("!!python/object:nerfstudio.engine.trainer.TrainerConfig\nmethod_name: nerfacto", '"run" is not a wys run'),
        (f"{CONFIG_TAG}\n{{", '"run/config.yml" cannot be read: '),
        (CONFIG_TAG, '"run/config.yml" does not contain the options of a run'),
    ],
)
def test_runs_of_other_methods_and_damaged_ones_are_refused(content: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yml").write_text(content)
    assert message in sentence_of(lambda: run_wys(monkeypatch, "compare", "run"))
    assert not Path("wys-compare").exists()


def test_the_table_lists_the_metrics_of_all_runs() -> None:
    metrics = [{"edit_psnr": 20.123, "edit_ssim": 0.9}, {"edit_psnr": 31.0, "clip_image_similarity": 0.75}]
    assert metric_names(metrics) == ["edit_psnr", "edit_ssim", "clip_image_similarity"]
    console = Console(width=100, file=io.StringIO())
    console.print(metrics_table(["A", "B"], metrics))
    rows = {
        row[0]: row[1:]
        for row in (line.replace("│", " ").split() for line in console.file.getvalue().splitlines())
        if row
    }
    assert rows["edit_psnr"] == ["20.1", "31.0"]
    assert rows["edit_ssim"] == ["0.900", "-"] and rows["clip_image_similarity"] == ["-", "0.750"]


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def views(edited_run: Path) -> SimpleNamespace:
    """Names, captured views and renders of a run."""
    pipeline: Any = eval_setup(edited_run / "config.yml", test_mode="test")[1]
    data = pipeline.datamanager
    captured = [data.captured_views([view])[0] for view in range(data.num_views)]
    renders = [pipeline.scene_model.render_colors(data.cameras, view) for view in range(data.num_views)]
    return SimpleNamespace(names=data.view_names, captured=captured, renders=renders)


def write_pictures(folder: Path, names: list[str], pictures: list[torch.Tensor]) -> None:
    for name, picture in zip(names, pictures):
        write_png(folder / f"{name}.png", picture)


def compared(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "comparison.json").read_text())["metrics"]


def test_renders_as_pictures_have_the_metrics_of_their_run(edited_run, views, tmp_path: Path, monkeypatch) -> None:
    write_pictures(tmp_path / "same", views.names, views.renders)
    run_wys(monkeypatch, "compare", tmp_path / "same", edited_run, "-o", tmp_path / "out")
    metrics = compared(tmp_path / "out")
    assert list(metrics) == ["A: same", "B: run"] and metrics["A: same"].keys() == metrics["B: run"].keys()
    assert {"edit_psnr", "edit_ssim", "clip_direction_similarity", "clip_direction_consistency"} <= metrics[
        "B: run"
    ].keys()
    for name, value in metrics["B: run"].items():
        assert metrics["A: same"][name] == pytest.approx(value, abs=0.02), name
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "contact_sheet.png", "chart.png", "relevance_B.png",
    }  # fmt: skip


def test_metrics_of_pictures_equal_their_definitions(
    edited_run, edited_scene, views, tmp_path: Path, monkeypatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(16, 20, 3, generator=generator).mul(255).round() / 255 for _ in views.names]
    write_pictures(tmp_path / "noise" / "images", views.names, pictures)
    masks = edited_scene / "to-edit"
    run_wys(monkeypatch, "compare", edited_run, tmp_path / "noise", "-o", tmp_path / "out", "--masks", masks)
    metrics = compared(tmp_path / "out")["B: noise"]
    whole, outside = [], []
    for picture, captured in zip(pictures, views.captured):
        errors = [
            [
                float((picture[row, column].double() - captured[row, column].double()).pow(2).mean())
                for column in range(20)
            ]
            for row in range(16)
        ]
        whole.append(-10 * math.log10(sum(map(sum, errors)) / 320))
        kept = [error for row in errors for column, error in enumerate(row) if not 4 <= column < 16]
        outside.append(-10 * math.log10(sum(kept) / len(kept)))
    assert metrics["edit_psnr"] == pytest.approx(sum(whole) / 10, abs=1e-5)
    assert metrics["edit_psnr_outside"] == pytest.approx(sum(outside) / 10, abs=1e-5)
    clip = load_clip("embedded")
    before, after = (
        torch.cat([clip.embed_images(image[None]) for image in images]) for images in (views.captured, pictures)
    )
    texts = clip.embed_texts(["a red ball", "a blue ball"])
    changes = (after - before).double()
    direction = [float(F.cosine_similarity(change, (texts[1] - texts[0]).double(), dim=0)) for change in changes]
    consistency = [float(F.cosine_similarity(one, two, dim=0)) for one, two in zip(changes, changes[1:])]
    assert metrics["clip_direction_similarity"] == pytest.approx(sum(direction) / 10, abs=1e-5)
    assert metrics["clip_direction_consistency"] == pytest.approx(sum(consistency) / 9, abs=1e-5)
    assert "edit_psnr_outside" in compared(tmp_path / "out")["A: run"]


PICTURE_REFUSALS = {
    "missing": (
        lambda folder: (folder / "frame_002.png").unlink(),
        ["run"],
        'There is no picture for the view frame_002.png in "pictures": wys compare requires one image per view',
    ),
    "surplus": (
        lambda folder: Image.new("RGB", (20, 16)).save(folder / "extra.jpg"),
        ["run"],
        '"pictures/extra.jpg" is not a picture of a training view: remove it, or name it as one, for example frame_000',
    ),
    "twice": (
        lambda folder: Image.new("RGB", (20, 16)).save(folder / "frame_001.jpg"),
        ["run"],
        'are both pictures of the view "',
    ),
    "other size": (
        lambda folder: Image.new("RGB", (40, 32)).save(folder / "frame_003.png"),
        ["run"],
        'The picture "pictures/frame_003.png" is 40x32 and the view frame_003.png 20x16: render it at the size of the view.',
    ),
    "damaged": (
        lambda folder: (folder / "frame_003.png").write_bytes(b"PNG"),
        ["run"],
        '"pictures/frame_003.png" (3 bytes)',
    ),
    "no run": (
        lambda folder: None,
        [],
        '"pictures" contains pictures: wys compare takes one or more runs: wys compare RUN_A',
    ),
    "output inside": (
        lambda folder: None,
        ["run", "-o", "pictures/out"],
        '-o "pictures/out" is inside the folder of pictures "pictures": give -o another folder.',
    ),
    "no masks": (
        lambda folder: None,
        ["run", "--masks", "x"],
        'There is no mask for the view frame_000.png in "x": --masks requires',
    ),
}


@pytest.mark.parametrize("case", PICTURE_REFUSALS)
def test_unsuitable_pictures_are_refused(case: str, edited_run: Path, views, tmp_path: Path, monkeypatch) -> None:
    change, arguments, message = PICTURE_REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(edited_run)
    write_pictures(Path("pictures"), views.names, views.captured)
    change(Path("pictures"))
    assert message in sentence_of(lambda: run_wys(monkeypatch, "compare", "pictures", *arguments))
    assert not Path("wys-compare").exists()
