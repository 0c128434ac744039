"""Embedded CLIP model: size, vocabulary, accuracy on held-out scenes, training."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_wys
from transformers import CLIPModel

from wys_nerfstudio.demo.instructions import BY_SLUG, EDITS
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.training import train_clip
from wys_nerfstudio.demo.training.networks import write_tokenizer
from wys_nerfstudio.demo.world import TEST_SEEDS, sample_cameras, sample_scenes
from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.utils.image_io import read_image

FOLDER = Path(train_clip.__file__).parent.parent / "clip"
SEEDS = TEST_SEEDS[9000:9024]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Held-out scenes with all edits, disjoint from those of the model card."""
    scenes = sample_scenes(SEEDS)
    with torch.no_grad():
        return render_edits(scenes, sample_cameras(scenes, SEEDS, 64, 64)).numpy()


def test_the_model_is_small_and_has_no_pickled_files() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert isinstance(CLIPModel.from_pretrained(str(FOLDER)), CLIPModel)


def test_the_vocabulary_covers_all_captions() -> None:
    clip = load_clip("embedded")
    for edit in EDITS:
        for color in range(len(train_clip.COLOR_NAMES)):
            for text in (edit.caption, train_clip.caption(edit, color, color)):
                assert clip.tokenizer.unk_token_id not in clip.tokenizer(text).input_ids
                clip.embed_texts([text])


@pytest.mark.slow
def test_metrics_on_held_out_scenes(images: np.ndarray) -> None:
    results = train_clip.evaluate(load_clip("embedded"), images)
    assert results["mean_accuracy"] > 0.5, "random guessing scores 1/15"
    assert results["mean_own_direction"] > results["mean_other_direction"] + 0.3
    for slug, own in results["own_direction"].items():
        assert own > results["other_direction"][slug] + 0.2, slug


def test_captions_include_the_colors_of_unedited_objects() -> None:
    orange, black = 0, len(train_clip.COLOR_NAMES) - 1
    assert (
        train_clip.caption(BY_SLUG["ball-red"], orange, black) == "a photo of a toy bear, a red ball and a black block"
    )
    assert train_clip.caption(BY_SLUG["hat"], orange, orange) == (
        "a photo of a toy bear with a hat, an orange ball and an orange block"
    )
    assert train_clip.toy_colors(range(40)).unique().tolist() == list(range(8))


def test_the_loss_treats_equal_captions_as_positives() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=-1) for _ in range(2))
    texts[3] = texts[1]
    which = torch.tensor([0, 1, 2, 1])
    logits = 5 * images @ texts.T
    rows, columns = [], []
    for i in range(4):
        same = [k for k in range(4) if which[k] == which[i]]
        rows.append(-sum(logits[i].log_softmax(0)[k] for k in same) / len(same))
        columns.append(-sum(logits[:, i].log_softmax(0)[k] for k in same) / len(same))
    expected = (sum(rows) + sum(columns)) / 8
    loss = train_clip.contrastive_loss(images, texts, which[:, None] == which, torch.tensor(5.0))
    assert loss == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.slow
def test_training_reduces_the_loss(images: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    write_tokenizer(tmp_path, train_clip.words(), train_clip.TOKENS)
    train_clip.build_clip().save_pretrained(tmp_path)
    clip, loss, losses = load_clip(str(tmp_path)), train_clip.contrastive_loss, []

    def record(*arguments: torch.Tensor) -> torch.Tensor:
        losses.append(loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(train_clip, "contrastive_loss", record)
    options = train_clip.Options(tmp_path, steps=16, batch_scenes=2)
    train_clip.train(options, clip, images, train_clip.toy_colors(SEEDS))
    # Sixteen steps during the warmup; without learning both sums would be about 14.
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.3


def test_demo_pictures_names_what_it_replaces(tmp_path: Path, monkeypatch, capsys) -> None:
    for replaced in (False, True):
        run_wys(monkeypatch, "demo-pictures", tmp_path, "--count", 1)
        message = f"Replaced the earlier list.csv and its images in {tmp_path}."
        assert (message in capsys.readouterr().out) == replaced


def test_demo_pictures_writes_images_and_a_list_of_edits(tmp_path: Path, monkeypatch) -> None:
    run_wys(monkeypatch, "demo-pictures", tmp_path, "--count", 3)
    with (tmp_path / "list.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and len(list(tmp_path.glob("*.png"))) == 3
    for row in rows:
        assert row["instruction"] in {wording for edit in EDITS for wording in edit.wordings}
        assert read_image(tmp_path / row["image"]).size == (64, 64)
