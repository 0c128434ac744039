"""`edit_image`: comparison with diffusers, masks, seeds, progress, refusals."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_editor_folder
from test_edit import smooth_images

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import EMBEDDED, EditSettings, edit_image, load_editor, relevance_maps
from wys_nerfstudio.editing.sampling import edit_seed, seeded_noise
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor, timesteps
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.utils.errors import WysError

INSTRUCTION = "turn the bear into a panda"
FEW_STEPS = EditSettings(guidance_scale=3.0, diffusion_steps=4)


@pytest.fixture(scope="module")
def editor(editor_folder: Path) -> StableDiffusionEditor:
    return load_editor(str(editor_folder))


# ----------------------------------------------------------------------------------------- comparison with diffusers


def build_random_editor(tmp_path: Path, channels: tuple[int, ...], cross: int, heads: int) -> StableDiffusionEditor:
    """Build an editor with the block types and depth of Stable Diffusion 1.5 and a small text encoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    small = load_editor(str(build_editor_folder(tmp_path / "small")))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=8,
        block_out_channels=channels,
        cross_attention_dim=cross,
        attention_head_dim=heads,
    )
    vae = AutoencoderKL(
        block_out_channels=(*(width * 2 // 5 // 16 * 16 for width in channels[:3]), channels[2] * 2 // 5 // 16 * 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=16,
        sample_size=512,
        scaling_factor=0.18215,
    )
    config = {**small.text_encoder.config.to_dict(), "hidden_size": cross, "num_attention_heads": 8}
    text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    for network in (unet, vae, text_encoder):
        network.eval().requires_grad_(False)
    return replace(small, unet=unet, vae=vae, text_encoder=text_encoder)


def diffusers_edit(editor: StableDiffusionEditor, image: torch.Tensor, settings: EditSettings, spacing: dict[str, Any]):
    """Return the edit of diffusers' InstructPix2Pix pipeline with DDIM or DPM-Solver++(2M), and its timesteps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionInstructPix2PixPipeline

    betas = 1 - editor.alphas_cumprod / torch.cat([torch.ones(1), editor.alphas_cumprod[:-1]])
    ends_clean = float(editor.final_alpha) == 1
    common = {"trained_betas": betas.numpy(), "prediction_type": editor.prediction_type, **spacing}
    if settings.solver_order == 1:
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=ends_clean, **common)
    else:
        final = "zero" if ends_clean else "sigma_min"
        scheduler = DPMSolverMultistepScheduler(euler_at_final=True, final_sigmas_type=final, **common)

    class Pipeline(StableDiffusionInstructPix2PixPipeline):
        # diffusers disables guidance for image guidance scales below 1, such as the paper's 0.8.
        do_classifier_free_guidance = True  # type: ignore

    pipeline_class = StableDiffusionInstructPix2PixPipeline if settings.image_guidance_scale >= 1 else Pipeline
    pipeline = pipeline_class(
        vae=editor.vae,
        text_encoder=editor.text_encoder,
        tokenizer=editor.tokenizer,
        unet=editor.unet,
        scheduler=scheduler,
        safety_checker=None,  # type: ignore
        feature_extractor=None,  # type: ignore
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    clean = editor.encode(image[None]).latents
    noise = seeded_noise([edit_seed(0, 0)], clean.shape[1:], editor.device)
    alpha = editor.alphas_cumprod[editor.num_train_timesteps - 1]
    edited = pipeline(
        prompt=INSTRUCTION,
        image=image[None].permute(0, 3, 1, 2),
        num_inference_steps=settings.diffusion_steps,
        guidance_scale=settings.guidance_scale,
        image_guidance_scale=settings.image_guidance_scale,
        latents=alpha.sqrt() * clean + (1 - alpha).sqrt() * noise,
        output_type="pt",
    ).images
    return edited[0].permute(1, 2, 0), pipeline.scheduler.timesteps.tolist()


def equal_spacing(steps: int) -> dict[str, Any]:
    """Scheduler options with which diffusers uses the timesteps of `timesteps`; 999 must be a multiple of the steps."""
    assert 999 % steps == 0
    return {"timestep_spacing": "leading", "steps_offset": 999 // steps}


def compare(editor: StableDiffusionEditor, image: torch.Tensor, settings: EditSettings) -> float:
    """Return the PSNR between the edit at tau 0 and that of diffusers with equal timesteps and final level."""
    tested = replace(editor, final_alpha=editor.alphas_cumprod[0])
    expected, used_timesteps = diffusers_edit(tested, image, settings, equal_spacing(settings.diffusion_steps))
    assert used_timesteps == timesteps(999, settings.diffusion_steps, 1000)
    result = edit_image(tested, image, INSTRUCTION, settings)
    assert result.mask.all()
    assert psnr(result.edited, image) < 30  # the edit changes the image
    return psnr(result.edited, expected)


def toy_image() -> torch.Tensor:
    from wys_nerfstudio.demo.training.evaluate_editor import INDEX, render_split
    from wys_nerfstudio.demo.world import VALIDATION_SEEDS

    return render_split(VALIDATION_SEEDS[:1])[0, INDEX["no-change"]].float() / 255


PLAIN = EditSettings(mask_threshold=0.0)


@pytest.mark.parametrize("image_guidance_scale", [0.8, 1.5])
def test_the_embedded_editor_equals_diffusers(image_guidance_scale):
    settings = replace(PLAIN, diffusion_steps=27, image_guidance_scale=image_guidance_scale)
    assert compare(load_editor(EMBEDDED), toy_image(), settings) >= 40


def test_the_second_order_equals_diffusers():
    settings = replace(PLAIN, diffusion_steps=27, image_guidance_scale=1.5, solver_order=2)
    embedded, image = load_editor(EMBEDDED), toy_image()
    expected, used_timesteps = diffusers_edit(embedded, image, settings, {"timestep_spacing": "trailing"})
    assert max(abs(a - b) for a, b in zip(used_timesteps, timesteps(999, 27, 1000), strict=True)) == 1
    second, first = (
        edit_image(embedded, image, INSTRUCTION, replace(settings, solver_order=order)).edited for order in (2, 1)
    )
    assert psnr(second, expected) >= 40
    assert psnr(first, expected) < psnr(second, expected) - 5


def test_trailing_timesteps_of_diffusers_differ_by_rounding():
    """With the paper's 100 steps, DDIM's "trailing" timesteps differ by at most 1."""
    embedded, image = load_editor(EMBEDDED), toy_image()
    expected, used_timesteps = diffusers_edit(embedded, image, PLAIN, {"timestep_spacing": "trailing"})
    assert max(abs(a - b) for a, b in zip(used_timesteps, timesteps(999, 100, 1000), strict=True)) == 1
    assert psnr(edit_image(embedded, image, INSTRUCTION, PLAIN).edited, expected) >= 40


def test_stable_diffusion_blocks_equal_diffusers(tmp_path):
    random_editor = build_random_editor(tmp_path, (64, 128, 128, 128), 64, 8)
    assert compare(random_editor, smooth_images(1, 64, 64)[0], replace(PLAIN, diffusion_steps=3, resolution=64)) >= 40


@pytest.mark.skipif("WYS_FULL_SIZE" not in os.environ, reason="WYS_FULL_SIZE=1: 4 GB of memory, minutes on a CPU")
def test_the_full_size_editor_equals_diffusers(tmp_path):
    full = build_random_editor(tmp_path, (320, 640, 1280, 1280), 768, 8)
    assert sum(weights.numel() for weights in full.unet.parameters()) > 8.5e8
    value = compare(full, smooth_images(1, 64, 64)[0], replace(PLAIN, diffusion_steps=3, resolution=64))
    print(f"PSNR to diffusers' pipeline at full size: {value:.1f} dB")
    assert value >= 40


# ------------------------------------------------------------------------------------------------------------ local edits


@pytest.mark.parametrize("method", ["local", "sds"])
@pytest.mark.parametrize(("height", "width"), [(37, 45), (71, 33)])
def test_pixels_outside_the_mask_are_bit_exact(editor, method, height, width):
    image = smooth_images(1, height, width)[0]
    result = edit_image(editor, image, INSTRUCTION, replace(FEW_STEPS, method=method))
    assert result.mask.any() and not result.mask.all()
    assert torch.equal(result.edited[~result.mask], image[~result.mask])
    assert psnr(result.edited, image, result.mask) < 50
    assert float(result.edited.min()) >= 0 and float(result.edited.max()) <= 1


def test_map_and_mask_are_computed_as_for_scenes(editor):
    image = smooth_images(1, 37, 45)[0]
    result = edit_image(editor, image, INSTRUCTION, FEW_STEPS, seed=4)
    raw = next(relevance_maps(editor, image[None], INSTRUCTION, seeds=[edit_seed(4, -1)]))
    assert torch.equal(result.relevance, relevance.resize(relevance.normalize(raw), 37, 45)[0].clamp(0, 1))
    assert torch.equal(result.mask, result.relevance >= 0.4)


def test_num_samples_and_outlier_factor_are_used(editor):
    image = smooth_images(1, 37, 45)[0]
    settings = replace(FEW_STEPS, relevance_num_samples=3, relevance_outlier_factor=0.2)
    result = edit_image(editor, image, INSTRUCTION, settings, seed=4)
    raw = next(relevance_maps(editor, image[None], INSTRUCTION, seeds=[edit_seed(4, -1)], num_samples=3))
    expected = relevance.upsample(raw, 37, 45, outlier_factor=0.2)[0]
    assert torch.equal(result.relevance, expected)
    assert not torch.equal(expected, relevance.upsample(raw, 37, 45)[0])


@pytest.mark.parametrize("method", ["local", "sds"])
def test_a_given_mask_is_used(editor, method):
    image = smooth_images(1, 37, 45)[0]
    mask = torch.zeros(37, 45, dtype=torch.bool)
    mask[10:20, 5:40] = True
    result = edit_image(editor, image, INSTRUCTION, replace(FEW_STEPS, method=method), mask=mask)
    assert torch.equal(result.mask, mask)
    assert torch.equal(result.edited[~mask], image[~mask])
    assert not torch.isclose(result.edited[mask], image[mask]).all(dim=-1).any()


@pytest.mark.parametrize("method", ["local", "sds"])
def test_equal_seeds_give_equal_edits(editor, method):
    image, settings = smooth_images(1)[0], replace(FEW_STEPS, method=method, mask_threshold=0.0)
    first, repeated, other = (edit_image(editor, image, INSTRUCTION, settings, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.edited, repeated.edited) and torch.equal(first.relevance, repeated.relevance)
    assert not torch.equal(first.edited, other.edited) and not torch.equal(first.relevance, other.relevance)


@pytest.mark.parametrize("method", ["local", "sds"])
def test_progress_is_reported_until_the_end(editor, method):
    reports = []
    settings = replace(FEW_STEPS, method=method, relevance_num_samples=2)
    edit_image(editor, smooth_images(1)[0], INSTRUCTION, settings, on_progress=lambda *done: reports.append(done))
    assert reports == [(3, 6), (4, 6), (5, 6), (6, 6)]


def test_an_empty_mask_returns_the_input(editor):
    image = smooth_images(1)[0]
    result = edit_image(editor, image, INSTRUCTION, FEW_STEPS, mask=torch.zeros(32, 32, dtype=torch.bool))
    assert torch.equal(result.edited, image)


def test_sds_changes_nothing_at_guidance_scale_zero(editor):
    image = smooth_images(1)[0]
    settings = replace(FEW_STEPS, method="sds", mask_threshold=0.0, guidance_scale=0.0)
    unchanged, changed = (
        edit_image(editor, image, INSTRUCTION, replace(settings, guidance_scale=scale)).edited for scale in (0.0, 1e-3)
    )
    latents = editor.encode(image[None]).latents
    torch.testing.assert_close(unchanged, editor.decode(latents)[0], atol=1e-5, rtol=0)
    assert not torch.equal(unchanged, changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_threshold": 1.5}, "--mask-threshold must be between 0 and 1"),
        ({"mask_threshold": float("nan")}, "--mask-threshold must be between 0 and 1"),
        ({"relevance_noise_level": 0.0}, "--relevance-noise-level must be above 0 and below 1"),
        ({"relevance_outlier_factor": -1.0}, "--relevance-outlier-factor must be at least 0"),
        ({"diffusion_steps": 0}, "--diffusion-steps must be at least 1"),
        ({"relevance_num_samples": 0}, "--relevance-num-samples must be at least 1"),
        ({"resolution": 0}, "--resolution must be at least 1"),
    ],
)
def test_invalid_settings_are_refused(editor, changes, message):
    with pytest.raises(WysError, match=message):
        edit_image(editor, smooth_images(1)[0], INSTRUCTION, replace(FEW_STEPS, **changes))


def test_empty_instructions_and_wrong_mask_sizes_are_refused(editor):
    with pytest.raises(WysError, match="There is no instruction"):
        edit_image(editor, smooth_images(1)[0], "  ")
    with pytest.raises(WysError, match="The mask has 31x32 pixels, but the image has 32x32"):
        edit_image(editor, smooth_images(1)[0], INSTRUCTION, mask=torch.ones(32, 31, dtype=torch.bool))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("unet", "The editor failed: the relevance map became NaN or Inf. Use --editor-dtype float32."),
        (
            "vae",
            "The editor failed: the edit became NaN or Inf. Lower the guidance scales, or use --editor-dtype float32.",
        ),
    ],
)
def test_results_that_are_not_finite_are_refused(editor_folder, part, sentence):
    editor = load_editor(str(editor_folder))
    network = editor.unet.conv_out if part == "unet" else editor.vae.decoder.conv_out
    torch.nn.init.constant_(network.bias, float("nan"))
    with pytest.raises(WysError, match=sentence):
        edit_image(editor, smooth_images(1)[0], INSTRUCTION, replace(FEW_STEPS, mask_threshold=0.0))


def test_extreme_guidance_is_refused_instead_of_black_pixels(editor):
    settings = replace(FEW_STEPS, guidance_scale=1e38, mask_threshold=0.0)
    with pytest.raises(WysError, match="the edit became NaN or Inf. Lower the guidance scales"):
        edit_image(editor, smooth_images(1)[0], INSTRUCTION, settings)
