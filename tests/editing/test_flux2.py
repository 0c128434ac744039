"""FLUX.2 klein with tiny random networks, compared with diffusers' pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_folder import LAYERS, TOKENS, build_flux2_folder

from wys_nerfstudio.editing import EditOptions, Editor, edit_image, load_editor
from wys_nerfstudio.editing.flux2 import Flux2Editor
from wys_nerfstudio.editing.sampling import edit_seed, seeded_noise
from wys_nerfstudio.evaluation.metrics import psnr

INSTRUCTION = "turn the bear into a panda"
KINDS = ["base", "distilled"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux2")
    return {kind: build_flux2_folder(folder / kind, distilled=kind == "distilled") for kind in KINDS}


@pytest.fixture(scope="module")
def editors(folders) -> dict[str, Flux2Editor]:
    editors = {kind: load_editor(str(folder)) for kind, folder in folders.items()}
    assert all(isinstance(editor, Flux2Editor) and isinstance(editor, Editor) for editor in editors.values())
    return editors  # type: ignore


def images(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(height))


def diffusers_edit(folder: Path, image: torch.Tensor, noise: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    """Edit by diffusers' pipeline, from pure noise."""
    from diffusers import Flux2KleinPipeline
    from PIL import Image

    pipeline: Any = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    edited = pipeline(
        image=Image.fromarray((image * 255).round().byte().numpy()), prompt=INSTRUCTION, latents=noise[None],
        num_inference_steps=steps, guidance_scale=scale, max_sequence_length=TOKENS, output_type="pt",
        text_encoder_out_layers=(LAYERS // 4, LAYERS // 2, 3 * LAYERS // 4),
    ).images  # fmt: skip
    return edited[0].permute(1, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 112)])
def test_threshold_zero_equals_diffusers_pipeline(folders, editors, kind, height, width):
    editor, image = editors[kind], (images(1, height, width)[0] * 255).round() / 255
    steps, scale = (6, 4.0) if kind == "base" else (4, 1.0)
    options = EditOptions(guidance_scale=scale, diffusion_steps=steps, mask_threshold=0.0)
    edited = edit_image(editor, image, INSTRUCTION, options).edited
    (noise,) = seeded_noise([edit_seed(0, 0)], (16, height // 4, width // 4), editor.device)
    expected = diffusers_edit(folders[kind], image, noise, steps, scale)
    print(kind, height, width, float((edited - expected).abs().max()))
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)
    assert psnr(edited, image) < 25, "the edit must change the image"
