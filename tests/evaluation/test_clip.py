"""CLIP embeddings, compared with transformers; errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, modeling_utils

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


def test_a_clip_model_that_cannot_be_loaded_is_reported() -> None:
    with pytest.raises(WysError, match='The CLIP model "/missing/clip" could not be loaded: .* Give a local folder'):
        load_clip("/missing/clip")


def test_a_clip_model_without_a_network_is_reported() -> None:
    with pytest.raises(
        WysError, match='The CLIP model "nobody/no-such-clip" is not downloaded, and the Hugging Face hub'
    ):
        load_clip("nobody/no-such-clip")


def test_a_clip_model_without_all_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("final_layer_norm.weight"))
    save_file({key: weights[key] for key in weights if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WysError, match="its weights lack .*final_layer_norm.weight"):
        load_clip(str(folder))


def test_configs_of_clip_load_no_attention_kernel(clip_folder: Path, tmp_path: Path, monkeypatch) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["_attn_implementation"] = "someone/attention"
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("code was loaded"))
    load_clip(str(folder))


def test_memory_errors_are_not_taken_for_a_bad_model(clip_folder: Path, monkeypatch) -> None:
    def run_out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(CLIPModel, "from_pretrained", run_out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_clip(str(clip_folder))
