"""Relevance maps and edits with an untrained editor, compared with diffusers and with single images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_editor_folder
from profiled import peak_bytes

from wys_nerfstudio import relevance
from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.editing import EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing import edit as edit_module
from wys_nerfstudio.editing.edit import WITH_AND_WITHOUT_TEXT
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.sampling import add_noise, masked_denoise, seeded_noise
from wys_nerfstudio.editing.stable_diffusion import PROFILE, StableDiffusionEditor, timesteps
from wys_nerfstudio.evaluation.metrics import psnr

INSTRUCTION = "turn the bear into a panda"
SETTINGS = EditSettings(guidance_scale=4.0, image_guidance_scale=1.5, diffusion_steps=6)


@pytest.fixture(scope="module")
def editor(editor_folder: Path) -> StableDiffusionEditor:
    return load_editor(str(editor_folder))


@pytest.fixture(scope="module")
def velocity_editor(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionEditor:
    folder = tmp_path_factory.mktemp("editors") / "velocity"
    return load_editor(str(build_editor_folder(folder, prediction_type="v_prediction", seed=1)))


def smooth_images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Return smooth random images."""
    small = torch.rand(count, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
    return resize_images(small, height, width)


def some_mask(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    mask = torch.zeros(count, height, width, dtype=torch.bool)
    for i in range(count):
        mask[i, 5 + i : height // 2 + i, width // 4 : width - 3 * i] = True
    return mask


def full_mask(images: torch.Tensor) -> torch.Tensor:
    return torch.ones(images.shape[:3], dtype=torch.bool)


def edit(editor: StableDiffusionEditor, images: torch.Tensor, mask: torch.Tensor, **changes) -> torch.Tensor:
    arguments = {
        "reference": images,
        "instruction": INSTRUCTION,
        "settings": SETTINGS,
        "strength": 700 / 999,
        "seeds": list(range(len(images))),
        **changes,
    }
    return edit_images(editor, images, mask=mask, **arguments)


# ----------------------------------------------------------------------------------------- comparison with diffusers


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_threshold_zero_equals_diffusers_instruct_pix2pix(prediction_type, editor, velocity_editor):
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline

    tested = editor if prediction_type == "epsilon" else velocity_editor
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        tested.name, safety_checker=None, feature_extractor=None, local_files_only=True
    )
    # With this offset both use the timesteps 999, 888 ... 111; diffusers ends at timestep 0, hence the final level below.
    spacing = {"timestep_spacing": "leading", "steps_offset": 111, "clip_sample": False}
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, **spacing})
    pipeline.set_progress_bar_config(disable=True)
    tested = replace(tested, final_alpha=tested.alphas_cumprod[0])

    captured = smooth_images(1)
    start = tested.encode(captured).latents
    noise = seeded_noise([3], start.shape[1:], start.device)
    expected = pipeline(
        prompt=INSTRUCTION,
        image=captured.permute(0, 3, 1, 2),
        num_inference_steps=9,
        guidance_scale=4.0,
        image_guidance_scale=1.5,
        latents=tested.alphas_cumprod[999].sqrt() * start + (1 - tested.alphas_cumprod[999]).sqrt() * noise,
        output_type="pt",
    ).images.permute(0, 2, 3, 1)
    assert pipeline.scheduler.timesteps.tolist() == timesteps(999, 9, 1000)

    everything = relevance.threshold(torch.rand(1, 32, 32), 0.0)
    nine_steps = replace(SETTINGS, diffusion_steps=9)
    result = edit(tested, captured, everything, settings=nine_steps, strength=1.0, seeds=[3])
    assert psnr(result, expected) >= 40
    assert psnr(result, captured) < 30  # the edit changes the image


# ------------------------------------------------------------------------------------------------------------ masked edits


def test_pixels_outside_the_mask_are_bit_exact(editor):
    captured, render, mask = smooth_images(2), smooth_images(2, seed=1), some_mask(2)
    result = edit(editor, render, mask, reference=captured)
    assert torch.equal(result[~mask], captured[~mask])
    assert not torch.isclose(result[mask], captured[mask]).all(dim=-1).any()


def test_edits_are_in_the_unit_range(editor):
    result = edit(
        editor, smooth_images(1), full_mask(smooth_images(1)), settings=replace(SETTINGS, guidance_scale=50.0)
    )
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


def test_an_empty_mask_returns_the_captured_images(editor):
    captured, render = smooth_images(2), smooth_images(2, seed=1)
    assert torch.equal(edit(editor, render, ~full_mask(captured), reference=captured), captured)


@pytest.mark.parametrize("masked", [False, True])
def test_batches_equal_single_edits(editor, masked):
    captured, render = smooth_images(3), smooth_images(3, seed=1)
    mask = some_mask(3) if masked else full_mask(captured)
    batch = edit(editor, render, mask, reference=captured, seeds=[7, 8, 9])
    for i in range(3):
        one = slice(i, i + 1)
        single = edit(editor, render[one], mask[one], reference=captured[one], seeds=[7 + i])
        torch.testing.assert_close(batch[one], single, atol=1e-4, rtol=0)


def test_an_edit_does_not_depend_on_other_masks_in_the_batch(editor):
    captured = smooth_images(2)
    mask = torch.cat([full_mask(captured[:1]), some_mask(1)])
    single = edit(editor, captured[:1], mask[:1], seeds=[5])
    torch.testing.assert_close(edit(editor, captured, mask, seeds=[5, 6])[:1], single, atol=1e-4, rtol=0)


def test_each_image_has_its_own_seed(editor):
    repeated = smooth_images(1).repeat(2, 1, 1, 1)
    same = edit(editor, repeated, full_mask(repeated), seeds=[4, 4])
    other = edit(editor, repeated, full_mask(repeated), seeds=[4, 5])
    torch.testing.assert_close(same[0], same[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(other[0], same[0], atol=1e-5, rtol=0)
    assert psnr(other[0], other[1]) < 40


def test_edits_do_not_use_the_global_random_generator(editor):
    captured = smooth_images(1)
    torch.manual_seed(1)
    first = edit(editor, captured, some_mask(1))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(edit(editor, captured, some_mask(1)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_edits_depend_on_the_render_and_the_captured_view(editor):
    captured, render = smooth_images(1), smooth_images(1, seed=1)
    both = edit(editor, render, full_mask(render), reference=captured)
    other_start = edit(editor, captured, full_mask(render), reference=captured)
    other_condition = edit(editor, render, full_mask(render), reference=render)
    # Equal inputs give equal results, as tested above.
    assert float((both - other_start).abs().max()) > 1e-4
    assert float((both - other_condition).abs().max()) > 1e-4


@pytest.mark.parametrize(("height", "width"), [(37, 45), (45, 37), (70, 23), (8, 8)])
def test_images_keep_their_size(editor, height, width):
    captured = smooth_images(1, height, width)
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, height // 3 :, : width // 2] = True
    result = edit(editor, captured, mask)
    assert result.shape == captured.shape
    assert torch.equal(result[~mask], captured[~mask])
    assert bool(torch.isfinite(result).all())
    assert psnr(result, captured, mask) < 50


@pytest.mark.parametrize(("height", "width"), [(192, 108), (108, 192)])
def test_renders_are_edited_at_the_size_of_the_view(editor, height, width):
    settings = replace(SETTINGS, resolution=80, diffusion_steps=1)
    size = settings.size_for(editor, height, width)
    assert settings.size_for(editor, *size) != size, "in whole latents, the proportions differ"
    views, renders = smooth_images(1, height, width), smooth_images(1, *size, seed=1)
    edited = edit(editor, renders, full_mask(views), reference=views, settings=settings)
    assert edited.shape == views.shape


def test_unet_inputs_are_noised_render_and_captured_view(editor):
    captured, render, mask, unet_inputs = smooth_images(1), smooth_images(1, seed=1), some_mask(1), []
    hook = editor.unet.register_forward_pre_hook(lambda _, inputs: unet_inputs.append(inputs[0][:1].clone()))
    edit(editor, render, mask, reference=captured, seeds=[3])
    hook.remove()
    noise = seeded_noise([3], (4, 8, 8), editor.device)
    start, reference = editor.encode(render), editor.encode(captured)
    expected_timesteps = timesteps(700, SETTINGS.diffusion_steps, 1000)
    assert len(unet_inputs) == len(expected_timesteps) > 2
    outside = ~relevance.latent_mask(mask, 8, 8)[:, None].expand_as(noise)
    for i, (inputs, t) in enumerate(zip(unet_inputs, expected_timesteps)):
        torch.testing.assert_close(inputs[:, 4:], reference.condition, atol=1e-5, rtol=0)  # the condition is not scaled
        clean = (reference if i else start).latents
        expected = editor.alphas_cumprod[t].sqrt() * clean + (1 - editor.alphas_cumprod[t]).sqrt() * noise
        selected = outside if i else torch.ones_like(outside)
        torch.testing.assert_close(inputs[:, :4][selected], expected[selected], atol=1e-5, rtol=0)


def test_portrait_images_are_edited_in_portrait(editor):
    assert SETTINGS.size_for(editor, 80, 40) == (32, 16)
    assert SETTINGS.size_for(editor, 40, 80) == (16, 32)
    assert replace(SETTINGS, resolution=64).size_for(editor, 80, 40) == (64, 32)


def test_v_predictions_are_split_by_their_definition(velocity_editor):
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = velocity_editor.noise_level(0.6, (8, 8))
    velocity = level.signal * noise - level.noise * clean
    result = velocity_editor.split(velocity, add_noise(clean, noise, level), level)
    torch.testing.assert_close(result, (clean, noise))


def test_v_predictions_without_signal_equal_diffusers_ddim(velocity_editor):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(5)
    final = scheduler.final_alpha_cumprod
    editor = replace(velocity_editor, alphas_cumprod=scheduler.alphas_cumprod, final_alpha=final)
    levels = [editor._levels[time] for time in (*scheduler.timesteps, -1)]
    predict = editor.predictor(editor.encode(smooth_images(1)).condition, INSTRUCTION, WITH_AND_WITHOUT_TEXT[:1])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = noise
    for time, level in zip(scheduler.timesteps, levels):
        expected = scheduler.step(predict(expected, level)[0], time, expected).prev_sample
    zeros = torch.zeros_like(noise)
    result = masked_denoise(
        zeros, zeros, None, noise, levels, lambda noisy, level: editor.split(predict(noisy, level)[0], noisy, level)
    )
    assert levels[0].signal == 0 and result.std() > 0.1
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_guidance_scale_zero_ignores_the_instruction(editor):
    captured = smooth_images(1)
    texts = ("turn the bear into a panda", "make it snow")

    def edited(text: str, guidance_scale: float) -> torch.Tensor:
        settings = replace(SETTINGS, guidance_scale=guidance_scale)
        return edit(editor, captured, full_mask(captured), instruction=text, settings=settings)

    torch.testing.assert_close(edited(texts[0], 0.0), edited(texts[1], 0.0), atol=1e-5, rtol=0)
    assert psnr(edited(texts[0], 8.0), edited(texts[1], 8.0)) < 60


def test_seeded_noise_equals_torchs_generator():
    noise = seeded_noise([3, 2**61], (4, 2, 2), torch.device("cpu"))
    for row, seed in zip(noise, (3, 2**61)):
        assert torch.equal(row, torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------------------------------------------------- relevance maps


def compute_maps(
    editor: StableDiffusionEditor, images: torch.Tensor, instruction: str = INSTRUCTION, **changes
) -> torch.Tensor:
    return torch.cat(list(relevance_maps(editor, images, instruction, **{"seeds": range(len(images)), **changes})))


def slow_map(editor: StableDiffusionEditor, image: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
    """|eps(z_t, I, T) - eps(z_t, I, "")| of one image and one noise sample, with separate network calls."""
    with torch.no_grad():
        mode = editor.vae.encode(image[None].permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
        noisy = editor.alphas_cumprod[t] ** 0.5 * 0.18215 * mode + (1 - editor.alphas_cumprod[t]) ** 0.5 * noise[None]
        predictions = [
            editor.unet(torch.cat([noisy, mode], 1), t, encoder_hidden_states=editor.encode_text(text)).sample
            for text in (INSTRUCTION, "")
        ]
    return (predictions[0] - predictions[1]).abs().mean(dim=1)[0]


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_images_pass_the_vae_one_after_the_other(editor, part):
    inputs = torch.rand(4, 64, 64, 3) if part == "encode" else torch.rand(4, 4, 16, 16)
    one, four = (peak_bytes(lambda count=count: getattr(editor, part)(inputs[:count])) for count in (1, 4))
    assert four < 1.5 * one


def test_relevance_maps_equal_their_slow_reference(editor):
    image = smooth_images(1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))[0]
    expected = slow_map(editor, image[0], noise, 800)
    assert float(expected.max()) > 1e-3
    torch.testing.assert_close(compute_maps(editor, image, seeds=[11])[0], expected, atol=1e-5, rtol=1e-3)


def test_two_noise_samples_are_averaged(editor):
    image = smooth_images(1)
    noises = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    singles = [slow_map(editor, image[0], noise, 300) for noise in noises]
    assert not torch.allclose(*singles, rtol=0.01)
    result = compute_maps(editor, image, seeds=[11], num_samples=2, noise_level=0.3)[0]
    torch.testing.assert_close(result, (singles[0] + singles[1]) / 2, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_maps_do_not_depend_on_the_batch_size(editor, batch_size):
    images = smooth_images(3)
    parts = list(relevance_maps(editor, images, INSTRUCTION, seeds=[5, 6, 7], num_samples=2, batch_size=batch_size))
    assert [len(part) for part in parts] == {1: [1, 1, 1], 2: [2, 1], 3: [3], 8: [3]}[batch_size]
    single = [compute_maps(editor, images[i : i + 1], seeds=[5 + i], num_samples=2) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), torch.cat(single), atol=1e-5, rtol=1e-3)


def test_an_empty_instruction_has_zero_relevance(editor):
    result = compute_maps(editor, smooth_images(2), "")
    assert float(result.max()) < 1e-5
    assert not relevance.normalize((result > 1e-5).float()).any()


def test_maps_depend_on_seed_noise_level_and_instruction(editor):
    image = smooth_images(1)
    plain = compute_maps(editor, image, seeds=[0])
    others = [
        compute_maps(editor, image, seeds=[1]),
        compute_maps(editor, image, seeds=[0], noise_level=0.5),
        compute_maps(editor, image, "make it snow", seeds=[0]),
    ]
    assert torch.equal(compute_maps(editor, image, seeds=[0]), plain)
    assert all(not torch.allclose(other, plain, rtol=0.01) for other in others)


def test_extreme_noise_levels_give_finite_maps(editor):
    for level in (0.0001, 0.9999):
        assert bool(torch.isfinite(compute_maps(editor, smooth_images(1), noise_level=level)).all())


def test_maps_have_latent_size_at_the_editing_resolution(editor):
    assert compute_maps(editor, smooth_images(1, 37, 61)).shape == (1, 5, 8)
    assert compute_maps(editor, smooth_images(1, 61, 37), resolution=64).shape == (1, 15, 9)


@pytest.mark.parametrize("scales, branches", [((1.0, 1.0), 1), ((4.0, 1.0), 2), ((4.0, 1.5), 3), ((1.0, 1.5), 3)])
def test_branches_that_cancel_out_are_not_evaluated(editor, scales, branches, monkeypatch):
    images, batches = smooth_images(2), []
    predict = StableDiffusionEditor.predict

    def count_batches(self, latents, *arguments):
        batches.append(len(latents))
        return predict(self, latents, *arguments)

    monkeypatch.setattr(StableDiffusionEditor, "predict", count_batches)
    exact = edit(editor, images, full_mask(images), settings=EditSettings(*scales, 6))
    assert set(batches) == {2 * branches}
    # All three branches, with nearly equal scales.
    near = edit(editor, images, full_mask(images), settings=EditSettings(scales[0] + 1e-4, scales[1] + 1e-4, 6))
    assert set(batches[len(batches) // 2 :]) == {6}
    assert (exact - near).abs().max() < 1e-2


@pytest.mark.parametrize("solver_order", [1, 2])
def test_edits_take_the_order_of_the_sampler(editor, solver_order, monkeypatch):
    orders, denoise = [], edit_module.masked_denoise
    monkeypatch.setattr(edit_module, "masked_denoise", lambda **a: orders.append(a["solver_order"]) or denoise(**a))
    edit(editor, smooth_images(1), full_mask(smooth_images(1)), settings=replace(SETTINGS, solver_order=solver_order))
    assert orders == [solver_order]


def test_defaults_of_scenes_are_faster_than_those_of_images():
    def steps(options: Any) -> tuple[int, int]:
        return options.diffusion_steps, options.solver_order

    assert [steps(PROFILE.of_images), steps(PROFILE.of_scenes)] == [(100, 1), (8, 2)]
    assert steps(wys_tiny.config.pipeline) == (4, 1)


def test_pixels_are_scaled_before_they_are_rounded_to_half_precision(editor_folder):
    """Gray is 0 in [-1, 1], where half precision is finest; rounded before, grays would be 1/256 apart."""
    editor, received = load_editor(str(editor_folder), dtype="bfloat16"), []
    images = torch.linspace(0.49, 0.51, 32 * 32 * 3).view(1, 32, 32, 3)
    encode = editor.vae.encode
    editor.vae.encode = lambda pixels: (received.append(pixels), encode(pixels))[1]
    editor.encode(images)
    expected = (images.permute(0, 3, 1, 2) * 2 - 1).to(torch.bfloat16)
    assert torch.equal(received[0], expected)
