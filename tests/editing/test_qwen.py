"""Qwen-Image-Edit with tiny random networks, compared with diffusers' pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from qwen_folder import build_qwen_folder

from wys_nerfstudio.editing import EditOptions, Editor, edit_image, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.qwen import QwenEditor, _picture
from wys_nerfstudio.editing.sampling import edit_seed, seeded_noise
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.utils.errors import WysError

INSTRUCTION = "turn the bear into a panda"
KINDS = ["2509", "2511"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qwen")
    return {kind: build_qwen_folder(folder / kind, clean_reference=kind == "2511") for kind in KINDS}


@pytest.fixture(scope="module")
def editors(folders) -> dict[str, QwenEditor]:
    editors = {kind: load_editor(str(folder)) for kind, folder in folders.items()}
    assert all(isinstance(editor, QwenEditor) and isinstance(editor, Editor) for editor in editors.values())
    return editors  # type: ignore


def images(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator).float() / 255


def diffusers_pipeline(folder: Path) -> Any:
    """Load diffusers' pipeline, with the positions of image tokens that the model was trained with.

    The pipeline does not pass on the processor's token types, without which transformers 5 gives image tokens the positions of
    text (https://github.com/huggingface/diffusers/issues/14194).
    """
    pipeline: Any = pipeline_module().QwenImageEditPlusPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image_token = pipeline.processor.image_token_id
    pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, inputs: (args, inputs | {"mm_token_type_ids": (inputs["input_ids"] == image_token).int()}),
        with_kwargs=True,
    )
    return pipeline


def pipeline_module() -> Any:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    return pipeline_qwenimage_edit_plus


def as_picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 128)])
def test_threshold_zero_equals_diffusers_pipeline(folders, editors, kind, height, width, monkeypatch):
    editor, image = editors[kind], images(1, height, width)[0]
    options = EditOptions(diffusion_steps=6, mask_threshold=0.0, resolution=max(height, width))
    edited = edit_image(editor, image, INSTRUCTION, options).edited
    (noise,) = seeded_noise([edit_seed(0, 0)], (16, height // 4, width // 4), editor.device)
    monkeypatch.setattr(pipeline_module(), "VAE_IMAGE_SIZE", height * width)  # the size of the reference
    expected = diffusers_pipeline(folders[kind])(
        image=as_picture(image), prompt=INSTRUCTION, negative_prompt=" ", height=height, width=width,
        latents=noise.flatten(1).T[None], num_inference_steps=6, true_cfg_scale=4.0, output_type="pt",
    ).images[0].permute(1, 2, 0)  # fmt: skip
    print(kind, height, width, float((edited - expected).abs().max()))
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)
    assert psnr(edited, image) < 25, "the edit must change the image"


def test_text_states_equal_diffusers_pipeline(folders, editors):
    editor, pictures = editors["2509"], [_picture(image) for image in images(2, 64, 128)]
    pipeline = diffusers_pipeline(folders["2509"])
    for text in (INSTRUCTION, " "):
        states = editor._text_states(pictures, text)
        for state, picture in zip(states, pictures):
            expected, mask = pipeline.encode_prompt(prompt=text, image=[picture])
            assert mask is None
            torch.testing.assert_close(state, expected[0], atol=1e-5, rtol=0)
        assert (states[0] - states[1]).abs().max() > 1e-2, "the text encoder must see the image"


def test_default_size_is_that_of_diffusers_pipeline(editors):
    """One megapixel, in the image's proportions, also of small images."""
    for height, width in [(64, 64), (512, 512), (800, 1200), (1200, 800), (1080, 1920), (3000, 4000)]:
        expected = pipeline_module().calculate_dimensions(1024 * 1024, width / height)
        assert editors["2509"].editing_size(height, width, None) == expected[::-1]


# ------------------------------------------------------------------------------------------------- batches and precision


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_single_images(editors, kind):
    editor, views = editors[kind], images(3)
    settings = EditOptions(diffusion_steps=4, resolution=64).resolve(editor.profile.of_scenes)
    mask = torch.zeros(3, 64, 64, dtype=torch.bool)
    mask[:, 16:48, 8:40] = True
    options: dict[str, Any] = {"settings": settings, "strength": 0.7}
    together = edit_images(editor, views, views, mask, INSTRUCTION, seeds=[0, 1, 2], **options)
    maps = next(relevance_maps(editor, views, INSTRUCTION, seeds=[3, 4, 5], resolution=64))
    for i in range(3):
        view, one = views[i : i + 1], slice(i, i + 1)
        alone = edit_images(editor, view, view, mask[one], INSTRUCTION, seeds=[i], **options)
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=0)
        alone = next(relevance_maps(editor, view, INSTRUCTION, seeds=[3 + i], resolution=64))
        torch.testing.assert_close(maps[one], alone, atol=1e-5, rtol=0)
    assert torch.equal(together[~mask], views[~mask])
    assert (together - views)[mask].abs().mean() > 0.05
    assert maps.flatten(1).std(dim=1).min() > 1e-2


def test_relevance_of_a_half_precision_editor_is_computed_in_float32(folders):
    """Its map differs from that of the same weights in float32 by the text states alone, which stay in bfloat16."""
    half, single = (load_editor(str(folders["2511"]), dtype="bfloat16") for _ in range(2))
    assert isinstance(half, QwenEditor) and isinstance(single, QwenEditor)
    for network in (single.transformer, single.vae):
        torch.nn.Module.float(network)
    options: dict[str, Any] = {"instruction": INSTRUCTION, "seeds": [0], "resolution": 64}
    mine, expected = (next(relevance_maps(editor, images(1), **options)) for editor in (half, single))
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------- noise levels and refusals


def test_levels_of_less_strength_are_the_last_of_a_whole_run(editors):
    editor = editors["2509"]
    whole = editor.noise_levels(1.0, 20, (32, 32))
    assert len(whole) == 21
    assert [whole[0].noise, whole[-2].noise, whole[-1].noise] == pytest.approx([1.0, 0.02, 0.0], abs=1e-6)
    assert all(a.noise > b.noise for a, b in zip(whole, whole[1:]))
    assert editor.noise_levels(0.25, 20, (32, 32)) == whole[-6:]
    assert editor.noise_levels(0.02, 20, (32, 32)) == whole[-2:]
    assert editor.noise_levels(1.0, 20, (64, 64))[10].noise > whole[10].noise  # more noise for larger images


def test_a_single_step_is_refused(editors):
    with pytest.raises(WysError, match="--diffusion-steps must be at least 2 for the editor .*, not 1"):
        edit_image(editors["2509"], images(1)[0], INSTRUCTION, EditOptions(diffusion_steps=1, resolution=64))


def test_long_instructions_are_refused(editors):
    assert editors["2509"].encode_text("a" * 1024).shape == (1, 1024)
    with pytest.raises(WysError, match="has 1025 tokens, but the text encoder of .* takes at most 1024: shorten it"):
        editors["2509"].encode_text("a" * 1025)


def test_image_guidance_is_refused(editors):
    with pytest.raises(WysError, match="has no image guidance"):
        edit_image(editors["2509"], images(1)[0], INSTRUCTION, EditOptions(image_guidance_scale=1.5, resolution=64))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|im_end|>"])
def test_special_tokens_are_refused(editors, token):
    with pytest.raises(WysError, match="has special tokens of the text encoder: leave them out"):
        edit_image(editors["2509"], images(1)[0], f"make it {token} red", EditOptions(resolution=64))
