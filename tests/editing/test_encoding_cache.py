"""Cached encodings of images that are edited many times, compared with encoding them anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_gpu import OnGpu, emulated_gpu
from flux2_folder import build_flux2_folder
from qwen_folder import build_qwen_folder

from wys_nerfstudio.editing import EditOptions, Editor, edit_images, load_editor
from wys_nerfstudio.editing.edit import encode_images
from wys_nerfstudio.editing.editor import ImageEncoding
from wys_nerfstudio.editing.encoding_cache import EncodingCache
from wys_nerfstudio.editing.loading import Precision

FAMILIES = ["InstructPix2Pix", "FLUX.2", "Qwen-Image-Edit"]
IMAGES = torch.rand(3, 64, 80, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, editor_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    others = build_flux2_folder(folder / "flux2", distilled=True), build_qwen_folder(folder / "qwen")
    return dict(zip(FAMILIES, (editor_folder, *others)))


def tensors(encoding: ImageEncoding) -> list[torch.Tensor]:
    condition = encoding.condition
    return [encoding.latents, *([condition] if isinstance(condition, torch.Tensor) else condition)]


def count_images(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each call of the editor's encoder adds its number of images."""
    counts, encode = [], editor.encode

    def counted(images: torch.Tensor) -> ImageEncoding:
        counts.append(len(images))
        return encode(images)

    monkeypatch.setattr(editor, "encode", counted)
    return counts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_encodings_equal_new_ones(folders, family, dtype: Precision, monkeypatch):
    editor, cache = load_editor(str(folders[family]), dtype=dtype), EncodingCache()
    options: dict[str, Any] = {"strength": 0.7, "seeds": [1, 2]}
    settings = EditOptions(diffusion_steps=3, resolution=64).resolve(editor.profile.of_scenes)
    mask = torch.zeros(2, 64, 80, dtype=torch.bool)
    mask[:, 16:48, 8:40] = True
    cache.encode(editor, IMAGES[:1], [0], 64)
    for numbers in ([2, 0], [0, 1], [2, 0]):
        images = IMAGES[numbers]
        cached, expected = cache.encode(editor, images, numbers, 64), encode_images(editor, images, images, 64)
        assert type(cached.condition) is type(expected.condition)
        assert (cached.condition is cached.latents) == (expected.condition is expected.latents)
        for mine, other in zip(tensors(cached), tensors(expected), strict=True):
            assert torch.equal(mine, other) and mine.dtype == other.dtype
        arguments = (editor, IMAGES[:2], images, mask, "make the ball blue", settings)
        edited = edit_images(*arguments, **options, encoded_reference=cached)
        assert torch.equal(edited, edit_images(*arguments, **options))
    counts = count_images(editor, monkeypatch)
    cache.encode(editor, IMAGES, [0, 1, 2], 64)
    assert counts == []
    cache.encode(editor, IMAGES[1:], [1, 5], 64)
    assert counts == [1]  # the new one alone


def test_encodings_of_another_resolution_are_computed(folders, monkeypatch):
    editor, cache = load_editor(str(folders["InstructPix2Pix"])), EncodingCache()
    counts = count_images(editor, monkeypatch)
    small, large = (cache.encode(editor, IMAGES[:1], [0], resolution) for resolution in (40, 80))
    assert counts == [1, 1] and small.latents.shape != large.latents.shape


@pytest.mark.parametrize("family", ["InstructPix2Pix", "FLUX.2"])
def test_encodings_wait_in_main_memory(folders, family):
    with emulated_gpu():
        editor, cache = load_editor(str(folders[family]), "cuda"), EncodingCache()
        first, again = (cache.encode(editor, IMAGES[:2], [0, 1], 64) for _ in range(2))
        expected = encode_images(editor, IMAGES[:2], IMAGES[:2], 64)
        waiting = [tensor for encoding in cache._encodings.values() for tensor in tensors(encoding)]
        assert not any(isinstance(tensor, OnGpu) for tensor in waiting)
        assert waiting[0].device.type == "cpu"
        for encoding in (first, again):
            assert all(isinstance(tensor, OnGpu) for tensor in tensors(encoding))
            assert torch.equal(encoding.latents.cpu(), expected.latents.cpu())
        # A condition that is the latents exists once.
        shared = cache._encodings[str(folders[family]), 64, 0]
        assert (shared.condition is shared.latents) == (family == "FLUX.2")
