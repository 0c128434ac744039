"""CLIP embeddings, compared with transformers; errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.utils.errors import WysError


def test_images_are_preprocessed_as_by_transformers(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    columns, rows = np.meshgrid(np.linspace(0, 1, 90), np.linspace(0, 1, 66))
    pixels = np.stack([columns, rows, 0.5 + 0.5 * np.sin(9 * columns + 7 * rows)], axis=-1)
    image = (pixels * 255).round().astype(np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processed = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = clip.model.vision_model(pixel_values=processed).pooler_output
        expected = torch.nn.functional.normalize(clip.model.visual_projection(features), dim=-1)
    embedded = clip.embed_images(torch.from_numpy(image)[None].float() / 255)
    assert embedded.norm() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(embedded, expected, atol=2e-2)
    assert not torch.allclose(
        clip.embed_images(torch.from_numpy(image)[None].flip(-1).float() / 255), expected, atol=2e-2
    )


def test_texts_are_embedded_as_by_transformers(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    tokenizer = CLIPTokenizer.from_pretrained(str(clip_folder))
    embedded = clip.embed_texts(["a photo of a red ball", "a bear"])
    for text, vector in zip(["a photo of a red ball", "a bear"], embedded):
        with torch.no_grad():
            features = clip.model.text_model(tokenizer([text], return_tensors="pt").input_ids).pooler_output
            expected = torch.nn.functional.normalize(clip.model.text_projection(features), dim=-1)
        assert torch.allclose(vector, expected[0], atol=1e-5), "padding must be masked"


def test_overlong_captions_are_refused(clip_folder: Path) -> None:
    with pytest.raises(WysError, match="has 13 tokens, but the CLIP model .* takes at most 12: shorten it"):
        load_clip(str(clip_folder)).embed_texts(["ball " * 11])


@pytest.mark.parametrize("name", ["nobody/no-such-clip", "/missing/clip"])
def test_a_clip_model_that_cannot_be_loaded_is_reported(name: str) -> None:
    with pytest.raises(WysError, match=f'The CLIP model "{name}" could not be loaded: .* Give a local folder'):
        load_clip(name)


def test_memory_errors_are_not_taken_for_a_bad_model(clip_folder: Path, monkeypatch) -> None:
    def run_out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(CLIPModel, "from_pretrained", run_out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_clip(str(clip_folder))
