"""CLIP in transformers format: it is prepared for as its own image processor does it, and errors are sentences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizer

from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.utils.errors import WysError


def test_pictures_are_prepared_as_by_its_own_image_processor(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    columns, rows = np.meshgrid(np.linspace(0, 1, 90), np.linspace(0, 1, 66))
    pixels = np.stack([columns, rows, 0.5 + 0.5 * np.sin(9 * columns + 7 * rows)], axis=-1)
    picture = (pixels * 255).round().astype(np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    wanted = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = clip.model.vision_model(pixel_values=wanted).pooler_output
        expected = torch.nn.functional.normalize(clip.model.visual_projection(seen), dim=-1)
    embedded = clip.embed_images(torch.from_numpy(picture)[None].float() / 255)
    assert embedded.norm() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(embedded, expected, atol=2e-2)
    assert not torch.allclose(
        clip.embed_images(torch.from_numpy(picture)[None].flip(-1).float() / 255), expected, atol=2e-2
    )


def test_texts_are_read_as_by_transformers(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    tokenizer = CLIPTokenizer.from_pretrained(str(clip_folder))
    embedded = clip.embed_texts(["a photo of a red ball", "a bear"])
    for text, vector in zip(["a photo of a red ball", "a bear"], embedded):
        with torch.no_grad():
            read = clip.model.text_model(tokenizer([text], return_tensors="pt").input_ids).pooler_output
            expected = torch.nn.functional.normalize(clip.model.text_projection(read), dim=-1)
        assert torch.allclose(vector, expected[0], atol=1e-5), "padding must not count"


def test_a_caption_that_is_too_long_is_refused(clip_folder: Path) -> None:
    with pytest.raises(WysError, match="has 13 tokens and the CLIP .* takes 12: shorten it"):
        load_clip(str(clip_folder)).embed_texts(["ball " * 11])


@pytest.mark.parametrize("name", ["nobody/no-such-clip", "/nowhere/clip"])
def test_a_clip_that_cannot_be_had_is_explained(name: str) -> None:
    with pytest.raises(WysError, match=f'The CLIP "{name}" could not be loaded: .* Give a local folder'):
        load_clip(name)
