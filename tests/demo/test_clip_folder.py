"""The toy world's CLIP: small, loaded by its name, and it means something on scenes that it has never seen."""

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
def pictures() -> np.ndarray:
    """Held-out scenes with all edits, none of them of the model card."""
    scenes = sample_scenes(SEEDS)
    with torch.no_grad():
        return render_edits(scenes, sample_cameras(scenes, SEEDS, 64, 64)).numpy()


def test_size_and_format() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert isinstance(CLIPModel.from_pretrained(str(FOLDER)), CLIPModel)


def test_it_knows_every_word_of_every_caption() -> None:
    clip = load_clip("embedded")
    for edit in EDITS:
        for color in range(len(train_clip.COLOR_NAMES)):
            for text in (edit.caption, train_clip.caption(edit, color, color)):
                assert clip.tokenizer.unk_token_id not in clip.tokenizer(text).input_ids
                clip.embed_texts([text])


@pytest.mark.slow
def test_it_understands_held_out_scenes(pictures: np.ndarray) -> None:
    figures = train_clip.evaluate(load_clip("embedded"), pictures)
    assert figures["mean_accuracy"] > 0.5, "chance is 1 in 15"
    assert figures["mean_own_direction"] > figures["mean_other_direction"] + 0.3
    for slug, own in figures["own_direction"].items():
        assert own > figures["other_direction"][slug] + 0.2, slug


def test_captions_name_the_colors_that_are_not_edited() -> None:
    orange, black = 0, len(train_clip.COLOR_NAMES) - 1
    assert (
        train_clip.caption(BY_SLUG["ball-red"], orange, black) == "a photo of a toy bear, a red ball and a black block"
    )
    assert train_clip.caption(BY_SLUG["hat"], orange, orange) == (
        "a photo of a toy bear with a hat, an orange ball and an orange block"
    )
    assert train_clip.toy_colors(range(40)).unique().tolist() == list(range(8))


def test_loss_is_the_cross_entropy_over_distinct_captions() -> None:
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
    wanted = (sum(rows) + sum(columns)) / 8
    loss = train_clip.contrastive_loss(images, texts, which[:, None] == which, torch.tensor(5.0))
    assert loss == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.slow
def test_training_learns(pictures: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    write_tokenizer(tmp_path, train_clip.words(), train_clip.TOKENS)
    train_clip.build_clip().save_pretrained(tmp_path)
    clip, loss, losses = load_clip(str(tmp_path)), train_clip.contrastive_loss, []

    def recorded(*arguments: torch.Tensor) -> torch.Tensor:
        losses.append(loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(train_clip, "contrastive_loss", recorded)
    options = train_clip.Options(tmp_path, steps=16, batch_scenes=2)
    train_clip.train(options, clip, pictures, train_clip.toy_colors(SEEDS))
    # Sixteen steps of a rate that is still rising; nothing learned would leave both sums at about 14.
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.3


def test_demo_pictures_are_held_out_and_each_has_something_to_change(tmp_path: Path, monkeypatch) -> None:
    run_wys(monkeypatch, "demo-pictures", tmp_path, "--count", 3)
    with (tmp_path / "list.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and len(list(tmp_path.glob("*.png"))) == 3
    for row in rows:
        assert row["instruction"] in {wording for edit in EDITS for wording in edit.wordings}
        assert read_image(tmp_path / row["image"]).size == (64, 64)
