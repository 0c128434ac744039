"""`wys compare --retrain`: what is trained on which views, the PSNR of the held-out ones, and refusals."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import run_wys, sentence_of
from PIL import Image

from wys_nerfstudio.cli.export import export_run
from wys_nerfstudio.cli.retrain import held_out_psnr, retrained_psnr, train_scene
from wys_nerfstudio.training.checkpoint import read_checkpoint
from wys_nerfstudio.training.schedule import Phase


@pytest.fixture(scope="module")
def options(edited_run: Path) -> Any:
    """Options of the run, with more rays."""
    loaded = yaml.load((edited_run / "config.yml").read_text(), Loader=yaml.Loader)
    loaded.pipeline.datamanager.train_num_rays_per_batch = 512
    return loaded


@pytest.fixture(scope="module")
def data(edited_run: Path) -> Path:
    export_run(edited_run, edited_run.parent / "retrained", renders=False, points=1)
    return edited_run.parent / "retrained"


def test_held_out_psnr_equals_its_definition(data: Path, options: Any) -> None:
    pipeline = train_scene(data, options, 2)
    training, held_out = pipeline.datamanager.train_dataset, pipeline.datamanager.eval_dataset
    names = [path.stem for path in (*training.image_filenames, *held_out.image_filenames)]
    assert (len(training), len(held_out)) == (9, 1) and sorted(names) == sorted(p.stem for p in data.glob("images/*"))
    measured = held_out_psnr(pipeline)
    with torch.no_grad():
        render = pipeline.model.get_outputs_for_camera(held_out.cameras[:1])["rgb"].double().numpy()
    image = np.array(Image.open(held_out.image_filenames[0]), dtype=np.float64) / 255
    errors = [
        (render[row, column] - image[row, column]) ** 2 for row in range(2, 16) for column in range(20)
    ]  # the frame masks leave out the first two rows
    assert measured == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-5)


def test_a_new_scene_is_reconstructed(data: Path, options: Any, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "gray")
    for file in (tmp_path / "gray" / "images").iterdir():
        Image.new("RGB", (20, 16), (40, 160, 90)).save(file)
    pipeline = train_scene(tmp_path / "gray", options, 1)
    before = held_out_psnr(pipeline)
    assert pipeline.model.phase is Phase.RECONSTRUCT and not list(pipeline.model.camera_optimizer.parameters())
    assert held_out_psnr(train_scene(tmp_path / "gray", options, 40)) > before + 10


def test_equal_runs_have_equal_values(edited_run: Path, options: Any) -> None:
    first = retrained_psnr(edited_run, options, 3)
    torch.manual_seed(7)
    np.random.seed(7)
    assert retrained_psnr(edited_run, options, 3) == first


def test_compare_adds_it(edited_run: Path, tmp_path: Path, monkeypatch) -> None:
    run_wys(monkeypatch, "compare", edited_run, "-o", tmp_path, "--retrain", 2)
    (metrics,) = json.loads((tmp_path / "comparison.json").read_text())["metrics"].values()
    options: Any = yaml.load((edited_run / "config.yml").read_text(), Loader=yaml.Loader)
    assert metrics["retrained_psnr"] == retrained_psnr(edited_run, options, 2)


def keep_views(run: Path, count: int) -> None:
    (checkpoint,) = (run / "nerfstudio_models").glob("*.ckpt")
    state = read_checkpoint(checkpoint)
    views = state["wys"]["views"]
    views["names"] = views["names"][:count]
    torch.save(state, checkpoint)


@pytest.mark.parametrize(
    ("steps", "views", "message"),
    [
        (0, 10, "--retrain must be at least 1, not 0."),
        (5, 9, 'The run "run" has 9 training views: --retrain holds out a tenth of them and needs at least 10; leave'),
    ],
)
def test_refusals(steps: int, views: int, message: str, edited_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(edited_run, "run")
    keep_views(Path("run"), views)
    assert message in sentence_of(lambda: run_wys(monkeypatch, "compare", "run", "--retrain", steps))
    assert not Path("wys-compare").exists()
